"""Softmax attention: what `torch` (operators of torch, anywhere) and `native` (C, AVX-512) both answer, and the first defines.

Tokens stand first everywhere: q and out are (C, H, D), keys and values (N, G, D), and neither C nor N needs to be the other.
A row that sees nothing is zeros. Nothing that a row does not see changes its answer, not even a NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from attention.history import Pair
from attention.kernels.library import Told
from attention.parts import Parts
from attention.shapes import HeadShape

Runs = Sequence[tuple[int, int]]  # (first, last) of keys that stand one behind the other
Seen = Iterable[tuple[int, Runs]]  # of each block of queries where it ends among them, and the keys that it sees
Rows = tuple[int, int, int, int]  # (first, last) of queries that stand one behind the other, the first's position, its sequence


@dataclass(frozen=True)
class Blocks:
    """Which blocks of keys a query may choose, and how many: those that begin behind its window.

    A window is as wide as a block, so they are whole. The first `sinks` keys and those of the window are seen anyway.
    """

    size: int
    best: int
    window: int
    sinks: int

    @property
    def first(self) -> int:
        """The first block that is not all sinks."""
        return self.sinks // self.size

    def behind(self, position: int) -> int:
        """The last block that the query at a position may choose, itself not counted."""
        return -(-max(0, position - self.window) // self.size)


class Softmax(Protocol):
    """Softmax over keys. The `..._bytes` are the peak of temporaries, the answer to all queries included."""

    def dense(
        self, q: Tensor, keys: Tensor, values: Tensor, past: int, causal: bool, out: Tensor, log_total: Tensor | None = None
    ) -> Parts:
        """Answer queries at positions `past` and on over all keys, causally those up to each query's own position.

        log_total: (C, H, 1) in at least float32, written where given: log2 of the sum of each row's 2^s.
        """

    def band(
        self,
        q: Tensor,
        near: Pair,
        free: Pair,
        at: int,
        before: int,
        ahead: int,
        out: Tensor,
        log_total: Tensor | None = None,
    ) -> Parts:
        """Answer queries, the first of which stands at index `at` of near.

        A query sees itself, `before` keys before and `ahead` keys behind it in near, and all keys of free.
        log_total: as of `dense`.
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

    def told(
        self,
        shape: HeadShape,
        states: Sequence[dict[str, Tensor]],
        places: Sequence[int],
        counts: Sequence[int],
        runs: Sequence[Runs] | None = None,
        log_total: Tensor | None = None,
    ) -> Told | None:
        """What answers `step` at each of some layers, called from C; None where the step is not in C.

        states: of each sequence "k" and "v", (layers, kept, G D). places: where its token is put first. The rest as of `step`.
        """

    def choose(self, q: Tensor, bounds: Sequence[Pair], rows: Sequence[Rows], blocks: Blocks) -> Tensor:
        """The best blocks of each query for each group of heads, int32 (C, G, best), -1 where there are no more.

        The best are those whose keys might have the largest scores, summed over the group's heads, of equals the later ones.

        bounds: of each sequence the highest and the lowest elements of each whole block's keys, (blocks, G, D) each.
        rows: all queries, in their order.
        """

    def chosen(
        self,
        q: Tensor,
        sequences: Sequence[Pair],
        rows: Sequence[Rows],
        blocks: Blocks,
        table: Tensor,
        out: Tensor,
        log_total: Tensor,
    ) -> None:
        """Add the keys of the blocks in `table` (see `choose`) to answers `out` over others, of which `log_total` tells.

        Those of a query's window and of the sinks are not met again. log_total is left as it is.
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

    def chosen_bytes(self, shape: HeadShape, queries: int, blocks: Blocks, candidates: int) -> int:
        """Of `choose` and `chosen`, beside the answer and `log_total`. candidates: blocks that the last query may choose."""
