"""Softmax over scores with a bias by distance (`attention.relative`), for the layers of `layered` that see everything.

In torch alone, with the cost of `capped`: O(keys seen) a token, and so much workspace for each of a block's queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attention import relative
from attention.history import Pair
from attention.kernels.softmax import Runs
from attention.kernels.softmax.capped import ROWS, Capped
from attention.parts import Parts
from attention.shapes import HeadShape


class Biased(Capped):
    """An implementation of softmax for one table of biases."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

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
        raise AssertionError("layers with a window have no bias")

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
        raise AssertionError("only encoders have a bias, and they are read whole")

    def _alter(self, scores: Tensor, scale: float, rows: int, at: int) -> None:
        keys = scores.shape[-1]
        i, j = torch.arange(at, at + rows, device=scores.device)[:, None], torch.arange(keys, device=scores.device)
        scores.mul_(scale)
        scores.view(-1, rows, keys).add_(relative.bias(self.table, i, j))

    def _workspace_bytes(self, shape: HeadShape, queries: int, seen: int) -> int:
        rows = min(queries, ROWS)
        return super()._workspace_bytes(shape, queries, seen) + rows * seen * (4 * shape.query_heads + 8)
