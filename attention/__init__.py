"""Efficient attention for inference: dense, sparse and linear backends behind one interface.

The face of the library: `names()` lists the backends, `build()` makes one, the rest are the words of `interface`, `shapes` and
`pool`. A backend is one file in `backends/`; nothing registers it. `native`, beside
them, is one of them per layer (`layered`); `whole` makes one serve encoders.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from attention import backends
from attention.interface import AttentionBackend, BackendOptions
from attention.layered import NAME as NATIVE
from attention.layered import Layered, shares
from attention.parts import result
from attention.pool import PoolExhausted, StatePool, StateTensor
from attention.shapes import Cost, HeadShape, Segments
from attention.whole import whole

__all__ = [
    "NATIVE",
    "AttentionBackend",
    "BackendOptions",
    "Cost",
    "HeadShape",
    "PoolExhausted",
    "Segments",
    "StatePool",
    "StateTensor",
    "backend_class",
    "build",
    "names",
    "result",
    "shares",
    "whole",
]


@cache
def names() -> tuple[str, ...]:
    """The backends there are: the file names in `attention/backends`, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(backends.__path__)))


@cache
def backend_class(name: str) -> type[AttentionBackend]:
    """The backend class of a file in `attention/backends`, or of `native`. Raises ValueError naming the backends there are."""
    if name == NATIVE:
        return Layered
    if name not in names():
        raise ValueError(f"unknown attention backend {name!r}, the backends are {', '.join((*names(), NATIVE))}")
    module = importlib.import_module(f"attention.backends.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, AttentionBackend) and value.__module__ == module.__name__
    ]
    assert len(found) == 1, f"attention/backends/{name}.py must define one backend, it defines {found}"
    return found[0]


def build(name: str, options: Mapping[str, Any] | BackendOptions | None, shape: HeadShape) -> AttentionBackend:
    """Build a backend for heads of a shape.

    Args:
        name: one of `names()`, or `native`, whose options must say the windows of each layer.
        options: the backend's options; None takes its defaults.
        shape: heads, width, dtype and device.

    Raises:
        ValueError: an unknown name or options the backend refuses (pydantic's ValidationError is a ValueError).
    """
    cls = backend_class(name)
    if not isinstance(options, cls.Options):
        options = cls.Options.model_validate(dict(options or {}))
    return cls(options, shape)
