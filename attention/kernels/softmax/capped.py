"""Softmax over capped scores, as Gemma 2 has them (arXiv 2408.00118, section 2): a score s becomes cap tanh(s / cap).

For the layers of `layered`; the slow reading of caps in `native`. A block of queries meets all keys it sees at once. Cost per
token and workspace are O(keys seen). Shapes and meaning are those of `Softmax`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attention import history
from attention.history import Pair
from attention.kernels.int8 import dequantize, told_bytes
from attention.kernels.library import Told
from attention.kernels.softmax import Blocks, Rows, Runs, Seen
from attention.kernels.softmax.streaming import Band, query_rows, tokens_first, weigh
from attention.parts import Parts, spread
from attention.shapes import HeadShape

ROWS = 64  # queries of a block: their scores are all there is of them at one time


class Capped:
    """An implementation of softmax for one cap."""

    def __init__(self, cap: float) -> None:
        self.cap = cap

    def dense(
        self, q: Tensor, keys: Tensor, values: Tensor, past: int, causal: bool, out: Tensor, log_total: Tensor | None = None
    ) -> Parts:
        assert log_total is None, "no layer of `layered` asks for it"
        for first, last in spread(0, len(q), ROWS):
            seen = past + last if causal else len(keys)
            band = Band(high=past + first) if causal else Band()
            self._answer(q[first:last], keys[:seen], values[:seen], band, out[first:last], past + first)
            yield

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
        assert log_total is None, "no layer of `layered` asks for it"
        extra = len(free[0])
        for first, last in spread(0, len(q), ROWS):
            low, high = max(0, at + first - before), min(len(near[0]), at + last + ahead)
            k, v = (torch.cat((f, x[low:high])) for x, f in zip(near, free, strict=True))
            place = extra + at + first - low
            self._answer(q[first:last], k, v, Band(place - before, place + ahead, extra), out[first:last])
            yield

    def pattern(self, q: Tensor, keys: Tensor, values: Tensor, past: int, causal: bool, seen: Seen, out: Tensor) -> Parts:
        raise AssertionError("no layer of `layered` asks for it")

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
        assert log_total is None and runs is None, "no layer of `layered` asks for it"
        for i, (state, count) in enumerate(zip(states, counts, strict=True)):
            self._answer(q[i : i + 1], *history.read(state, count, groups), Band(), out[i : i + 1])

    def told(self, *args: Any, **kwargs: Any) -> Told | None:
        return None

    def choose(self, q: Tensor, bounds: Sequence[Pair], rows: Sequence[Rows], blocks: Blocks) -> Tensor:
        raise AssertionError("no layer of `layered` asks for it")

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
        raise AssertionError("no layer of `layered` asks for it")

    def chosen_bytes(self, shape: HeadShape, queries: int, blocks: Blocks, candidates: int) -> int:
        raise AssertionError("no layer of `layered` asks for it")

    def _alter(self, scores: Tensor, scale: float, rows: int, at: int) -> None:
        """Make of products (G, R C, N) times scale the scores to weigh, those of `rows` queries from position `at` on."""
        scores.mul_(scale / self.cap).tanh_().mul_(self.cap)

    def _answer(self, q: Tensor, keys: Tensor, values: Tensor, band: Band, out: Tensor, at: int = 0) -> None:
        """Answer a block of queries (C, H, D) over keys and values (N, G, D) of which each sees its band."""
        k, v = (dequantize(x, q.dtype).transpose(0, 1) for x in (keys, values))  # (G, N, D)
        hidden = band.hidden(len(q), len(keys), q.device)  # first: on its way it takes more than it leaves
        rows = query_rows(q, len(k))
        scores = torch.bmm(rows, k.transpose(1, 2)).float()  # (G, R C, N)
        self._alter(scores, 1 / math.sqrt(q.shape[-1]), len(q), at)
        scores.view(len(k), -1, *hidden.shape).masked_fill_(hidden, -math.inf)
        scores.sub_(scores.amax(-1, keepdim=True)).exp_()
        total = scores.sum(-1, keepdim=True)
        summed = weigh(scores.to(q.dtype), v, lambda: hidden)
        out.copy_(tokens_first(summed.float() / total, len(q)))

    def edge(self, shape: HeadShape) -> int:
        return ROWS + 1

    def step_bytes(self, shape: HeadShape, keys: int, runs: int = 1, logs: bool = False) -> int:
        return self._workspace_bytes(shape, 1, keys)

    def dense_bytes(self, shape: HeadShape, queries: int, keys: int, asking: int | None = None) -> int:
        return self._workspace_bytes(shape, queries, keys)

    def band_bytes(self, shape: HeadShape, queries: int, keys: int, before: int, ahead: int, free: int) -> int:
        seen = min(keys, before + min(queries, ROWS) + ahead + free)
        gathered = 2 * seen * shape.kept_bytes
        return self._workspace_bytes(shape, queries, seen) + gathered

    def pattern_bytes(self, shape: HeadShape, queries: int, seen: Seen) -> int:
        raise AssertionError("no layer of `layered` asks for it")

    def _workspace_bytes(self, shape: HeadShape, queries: int, seen: int) -> int:
        """Peak temporaries of blocks that see so many keys: scores in float32, beside them in the dtype if that is another."""
        width, size, rows = shape.head_width, shape.itemsize, shape.query_heads * min(queries, ROWS)
        element = 4 if size >= 4 else 4 + size
        answer = queries * shape.query_heads * width * size
        tight = 0 if size >= 4 else shape.key_value_heads * seen * width * size + (3 << 17)  # what oneDNN lays out, and its own
        told = told_bytes(shape, seen)
        return answer + rows * seen * element + rows * width * (2 * size + 8) + min(queries, ROWS) * seen + tight + told
