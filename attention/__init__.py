"""Efficient attention for inference: dense, sparse and linear backends behind one interface.

The face of the library: `names()` lists the backends, `build()` makes one, the rest are the words of `interface`, `shapes` and
`pool`. A backend is one file in `backends/`; nothing registers it. `native` and `layered`, beside them, are one of them per
layer (`layered.py`); `whole` makes one serve encoders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attention.backends import named, names
from attention.interface import AttentionBackend, BackendOptions
from attention.kernels.library import gather_team
from attention.layered import LAYERED, NATIVE, Layered, Native, layers_of, shares
from attention.parts import result
from attention.passage import Passage
from attention.pool import PoolExhausted, StatePool, StateTensor
from attention.shapes import Cost, HeadShape, Segments
from attention.whole import whole

__all__ = [
    "LAYERED",
    "NATIVE",
    "AttentionBackend",
    "BackendOptions",
    "Cost",
    "HeadShape",
    "Passage",
    "PoolExhausted",
    "Segments",
    "StatePool",
    "StateTensor",
    "backend_class",
    "build",
    "gather_team",
    "layers_of",
    "names",
    "result",
    "shares",
    "whole",
]


PER_LAYER: Mapping[str, type[AttentionBackend]] = {NATIVE: Native, LAYERED: Layered}


def backend_class(name: str) -> type[AttentionBackend]:
    """The backend class of a file in `attention/backends`, of `native` or of `layered`.

    Raises:
        ValueError: another name; the message has the backends there are.
    """
    if name in PER_LAYER:
        return PER_LAYER[name]
    if name not in names():
        raise ValueError(f"unknown attention backend {name!r}, the backends are {', '.join((*names(), *PER_LAYER))}")
    return named(name)


def build(name: str, options: Mapping[str, Any] | BackendOptions | None, shape: HeadShape) -> AttentionBackend:
    """Build a backend for heads of a shape.

    Args:
        name: one of `names()`; or `native` or `layered`, whose options must say what each layer is.
        options: the backend's options; None takes its defaults.
        shape: heads, width, dtype and device.

    Raises:
        ValueError: an unknown name or options the backend refuses (pydantic's ValidationError is a ValueError).
    """
    cls = backend_class(name)
    if not isinstance(options, cls.Options):
        options = cls.Options.model_validate(dict(options or {}))
    return cls(options, shape)
