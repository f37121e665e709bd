"""Who computes a backend's softmax: settled once from its option `impl` and the machine, and reported by `describe`.

    torch      blocks.py, operators of torch: runs anywhere, the slow reading of the next
    native     native.py, a kernel in C for CPUs with AVX-512: for an exact backend on CPU the default where it can run
    xformers   cuda.py, for dense and windowed attention on CUDA: there the default where it can run

`auto` takes the first that can run, in the order native, xformers, torch. A name that cannot run here is refused at start-up
with the reason. Nothing changes over later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, cast

from torch import Tensor

from attention import blocks, cuda, native
from attention import sums as features_by_torch
from attention.blocks import Pair, Runs
from attention.interface import HeadShape, Parts
from attention.sums import State

Impl = Literal["auto", "torch", "native", "xformers"]
CpuImpl = Literal["auto", "torch", "native"]


class Softmax(Protocol):
    """Softmax over keys: what `blocks` and `native` both answer. Shapes and meaning are told in `blocks`."""

    def dense(
        self, q: Tensor, keys: Tensor, values: Tensor, past: int, causal: bool, out: Tensor, log_total: Tensor | None = None
    ) -> Parts: ...

    def band(self, q: Tensor, near: Pair, free: Pair, at: int, before: int, ahead: int, out: Tensor) -> Parts: ...

    def step(
        self,
        q: Tensor,
        states: Sequence[dict[str, Tensor]],
        counts: Sequence[int],
        groups: int,
        out: Tensor,
        log_total: Tensor | None = None,
        runs: Sequence[Runs] | None = None,
    ) -> None: ...

    def step_workspace_bytes(self, shape: HeadShape, keys: int, runs: int = 1, logs: bool = False) -> int: ...

    def dense_workspace_bytes(self, shape: HeadShape, queries: int, keys: int, asking: int | None = None) -> int: ...

    def band_workspace_bytes(self, shape: HeadShape, queries: int, keys: int, before: int, ahead: int, free: int) -> int: ...


class Sums(Protocol):
    """Attention through features: what `sums` and `native` both answer. Shapes and meaning are told in `sums`."""

    Features: Callable[[Tensor | None, float, HeadShape], Any]

    def scan(self, features: Any, q: Tensor, k: Tensor, v: Tensor, s: Tensor, level: Tensor, out: Tensor) -> Parts: ...

    def both_sides(self, features: Any, q: Tensor, k: Tensor, v: Tensor, s: Tensor, level: Tensor, out: Tensor) -> Parts: ...

    def absorb(self, features: Any, k: Tensor, v: Tensor, s: Tensor, level: Tensor) -> Parts: ...

    def join(self, features: Any, q: Tensor, s: Tensor, level: Tensor, near: Tensor, out: Tensor) -> Parts: ...

    def features_step(self, features: Any, q: Tensor, k: Tensor, v: Tensor, sums: Sequence[State], out: Tensor) -> None: ...

    def join_step(self, features: Any, q: Tensor, sums: Sequence[State], near: Tensor, out: Tensor) -> None: ...

    def features_workspace_bytes(self, features: Any, queries: int, causal: bool) -> int: ...

    def absorb_workspace_bytes(self, features: Any, tokens: int) -> int: ...

    def join_workspace_bytes(self, features: Any, tokens: int) -> int: ...


def settle(impl: Impl, shape: HeadShape, no_xformers: str = "xformers has no such mask", no_native: str = "") -> str:
    """The implementation in force. The last two: why a backend or its options rule one out; empty: nothing does.

    Raises:
        ValueError: one is asked for that cannot run; the message has the reason.
    """
    obstacles = {"native": no_native or native.obstacle(shape), "xformers": no_xformers or cuda.obstacle(shape), "torch": None}
    if impl == "auto":
        return next(name for name, reason in obstacles.items() if reason is None)
    if obstacles[impl] is not None:
        allowed = ", ".join(repr(name) for name, reason in {"auto": None, **obstacles}.items() if reason is None)
        raise ValueError(f"impl is {impl!r}, but {obstacles[impl]}; allowed here: {allowed}")
    return impl


def softmax(impl: str) -> Softmax:
    """The softmax of an implementation; what xformers does not answer (chunks and steps) is torch's."""
    return cast(Softmax, native if impl == "native" else blocks)


def sums(impl: str) -> Sums:
    """Attention through features, of an implementation."""
    return cast(Sums, native if impl == "native" else features_by_torch)
