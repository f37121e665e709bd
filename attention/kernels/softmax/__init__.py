"""Softmax attention: what `torch` (operators of torch, anywhere) and `native` (C, AVX-512) both answer, and the first defines.

Tokens stand first everywhere: q and out are (C, H, D), keys and values (N, G, D), and neither C nor N needs to be the other.
A row that sees nothing is zeros. Nothing that a row does not see changes its answer, not even a NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from attention.history import Pair
from attention.parts import Parts
from attention.shapes import HeadShape

Runs = Sequence[tuple[int, int]]  # (first, last) of keys that stand one behind the other
Seen = Iterable[tuple[int, Runs]]  # of each block of queries where it ends among them, and the keys that it sees


class Softmax(Protocol):
    """Softmax over keys. The `..._bytes` are the peak of temporaries, the answer to all queries included."""

    def dense(
        self, q: Tensor, keys: Tensor, values: Tensor, past: int, causal: bool, out: Tensor, log_total: Tensor | None = None
    ) -> Parts:
        """Answer queries at positions `past` and on over all keys, causally those up to each query's own position.

        log_total: (C, H, 1) in at least float32, written where given: log2 of the sum of each row's 2^s.
        """

    def band(self, q: Tensor, near: Pair, free: Pair, at: int, before: int, ahead: int, out: Tensor) -> Parts:
        """Answer queries, the first of which stands at index `at` of near.

        A query sees itself, `before` keys before and `ahead` keys behind it in near, and all keys of free.
        """

    def pattern(self, q: Tensor, keys: Tensor, values: Tensor, past: int, causal: bool, seen: Seen, out: Tensor) -> Parts:
        """Answer queries at positions `past` and on, each block of them over runs of its own of the keys.

        seen: in the order of the queries. Causally a block's own tokens are the last of its keys, each query sees them up to
        itself, and all others come before the block.
        """

    def step(
        self,
        q: Tensor,
        states: Sequence[dict[str, Tensor]],
        counts: Sequence[int],
        groups: int,
        out: Tensor,
        log_total: Tensor | None = None,
        runs: Sequence[Runs] | None = None,
    ) -> None:
        """Attend one token of each of B sequences to the first `counts` keys of its state: q and out are (B, H, D).

        runs: where in its state each sequence's keys stand, one run behind the other, where that is not at its beginning;
        `counts` then counts along them. Values behind the count, to the end of the runs, must be numbers.
        log_total: (B, H, 1), as of `dense`.
        """

    def edge(self, shape: HeadShape) -> int:
        """Sequence length from which queries or keys go in several parts: checks look beyond it."""

    def dense_bytes(self, shape: HeadShape, queries: int, keys: int, asking: int | None = None) -> int:
        """Of `dense`. asking: how many of the queries go this way; None: all."""

    def band_bytes(self, shape: HeadShape, queries: int, keys: int, before: int, ahead: int, free: int) -> int:
        """Of `band`, for `queries` tokens at the end of `keys` others and themselves."""

    def pattern_bytes(self, shape: HeadShape, queries: int, seen: Seen) -> int:
        """Of `pattern`."""

    def step_bytes(self, shape: HeadShape, keys: int, runs: int = 1, logs: bool = False) -> int:
        """Of `step` of one sequence that looks at `keys` keys in several runs."""
