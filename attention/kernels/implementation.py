"""A backend's option `impl`: who computes, settled once from the option and the machine, and reported by `describe`.

    torch      operators of torch: runs anywhere, the slow reading of the next
    native     kernels in C for CPUs with AVX-512: on CPU the default where they can run
    xformers   cuda.py, for dense and windowed attention on CUDA: there the default where it can run

`auto` takes the first that can run, in the order native, xformers, torch. A name that cannot run here is refused at start-up
with the reason. Nothing changes over later. What xformers does not answer (chunks and steps) is torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from attention import cuda
from attention.kernels.features import Features
from attention.kernels.features import native as native_features
from attention.kernels.features import torch as torch_features
from attention.kernels.softmax import Softmax
from attention.kernels.softmax import native as native_softmax
from attention.kernels.softmax import torch as torch_softmax
from attention.kernels.softmax.capped import Capped
from attention.shapes import HeadShape, Segments

Impl = Annotated[
    Literal["auto", "torch", "native", "xformers"],
    Field(description="torch, native (CPU), xformers (CUDA, whole sequences, no sinks), or auto: what can run here"),
]
CpuImpl = Annotated[
    Literal["auto", "torch", "native"], Field(description="torch, native (CPU), or auto: native where it can run")
]
Packed = Callable[[Tensor, Tensor, Tensor, Segments], Tensor]  # a whole packed batch in one call

SOFTMAX: Mapping[str, Softmax] = {"native": native_softmax, "torch": torch_softmax, "xformers": torch_softmax}


def softmax(impl: str, shape: HeadShape, no_xformers: str = "xformers has no such mask") -> tuple[str, Softmax]:
    """The implementation in force by name, and its softmax. no_xformers: why a backend rules it out; empty: it does not.

    Raises:
        ValueError: one is asked for that cannot run; the message has the reason.
    """
    settled = settle(impl, native_softmax.obstacle(shape), no_xformers or cuda.obstacle(shape))
    return settled, SOFTMAX[settled]


def features(impl: str, weights: Tensor | None, half: float, shape: HeadShape) -> tuple[str, Features]:
    """The same of attention through features, with the features that `weights` and `half` make.

    Raises:
        ValueError: see `softmax`.
    """
    count = shape.head_width if weights is None else weights.shape[1]
    settled = settle(impl, native_features.obstacle(shape, count), "xformers has no features")
    made = native_features.Features if settled == "native" else torch_features.Features
    return settled, made(weights, half, shape)


def capped(impl: str, shape: HeadShape, cap: float) -> tuple[str, Softmax]:
    """The same of scores s that are weighed as cap tanh(s / cap).

    Raises:
        ValueError: see `softmax`.
    """
    settled, _ = softmax(impl, shape, "xformers caps no scores")
    return settled, native_softmax.NativeCapped(cap) if settled == "native" else Capped(cap)


def packed(impl: str, directions: tuple[bool, ...], window: int | None = None) -> dict[bool, Packed]:
    """By direction (`causal`), what answers a whole packed batch in one call, where the implementation has that."""
    if impl != "xformers":
        return {}
    return {causal: partial(cuda.attend, causal=causal, window=window) for causal in directions}


def settle(impl: str, no_native: str | None, no_xformers: str | None) -> str:
    """The implementation in force. The last two: why one cannot run; None: it can.

    Raises:
        ValueError: one is asked for that cannot run.
    """
    obstacles = {"native": no_native, "xformers": no_xformers, "torch": None}
    if impl == "auto":
        return next(name for name, reason in obstacles.items() if reason is None)
    if obstacles[impl] is not None:
        allowed = ", ".join(repr(name) for name, reason in {"auto": None, **obstacles}.items() if reason is None)
        raise ValueError(f"impl is {impl!r}, but {obstacles[impl]}; allowed here: {allowed}")
    return impl
