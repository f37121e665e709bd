"""Softmax attention over blocks of keys, the one kernel under every exact backend, and the layouts it works on.

A backend names, for a block of queries, the pieces of keys they see; `softmax` answers them. Scores of one piece exist at
a time, so a block costs rows x piece of workspace, never L x L, and stays in the cores' L2 caches.

Source: the streaming softmax of Milakov and Gimelshein (arXiv 1805.02867) and Rabe and Staats (arXiv 2112.05682), with one
change. Their running maximum only keeps exp from leaving the floats' range, and costs two passes over the scores. Here
2^s is taken unshifted first and the row sums tell afterwards whether that was sound (`settled`); a block that was not is
answered again with the running maximum. The answers are those of softmax either way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
# Row sums between these show that no 2^s overflowed and that what underflowed (below 2^-126) was at most 2^-66 of the row.
SETTLED = (2.0**-60, 2.0**100)


@dataclass(frozen=True)
class Band:
    """Which keys of a piece a query sees: column j and row i of the block with `low <= j - i <= high`."""

    low: int | None = None  # None: open
    high: int | None = None

    def clear(self, weights: Tensor) -> None:
        """Zero the weights outside the band, in place. weights: (..., C, N)."""
        if self.high is not None and self.high < weights.shape[-1] - 1:
            weights.tril_(self.high)
        if self.low is not None and self.low > 1 - weights.shape[-2]:
            weights.triu_(self.low)

    def hidden(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Bool (rows, columns): True where a row does not see a column."""
        offset = torch.arange(columns, device=device) - torch.arange(rows, device=device)[:, None]
        low = offset < (self.low if self.low is not None else -rows)
        return low | (offset > (self.high if self.high is not None else columns))


@dataclass(frozen=True)
class Piece:
    """Keys and values (G, N, D) that a block of queries sees, and the band of them that each row sees; None: all."""

    k: Tensor
    v: Tensor
    band: Band | None = None


def heads_first(x: Tensor) -> Tensor:
    """(T, G, D) to (G, T, D), contiguous: the layout in which matrix products need no copies."""
    return x.transpose(0, 1).contiguous()


def query_rows(q: Tensor, heads: int) -> Tensor:
    """(C, H, D) to (G, R, C, D), scaled so that 2^(q.k) is softmax's exp(q.k / sqrt D)."""
    count, _, width = q.shape
    rows = q.view(count, heads, -1, width).permute(1, 2, 0, 3)
    return rows * (LOG2_E / math.sqrt(width))


def spread(length: int, block: int) -> Iterator[tuple[int, int]]:
    """(start, end) of consecutive blocks that cover `length`."""
    for start in range(0, length, block):
        yield start, min(start + block, length)


def softmax(q: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """Attend a block of queries to its pieces of keys.

    Args:
        q: (G, R, C, D) from `query_rows`.
        pieces: at least one; together they are the keys the block sees, none twice.

    Returns:
        (C, H, D) of the inputs' dtype. A row that sees nothing is zeros.
    """
    groups, group, count, width = q.shape
    rows = q.reshape(groups, group * count, width)
    sums, total = _unshifted(rows, count, pieces)
    answer = (sums / total).to(q.dtype)
    sound = settled(total)
    if not sound.all():  # row by row, so that no row's answer depends on what its neighbours see
        sums, total = _shifted(rows, count, pieces)
        answer = torch.where(sound, answer, (sums / total).to(q.dtype))
    return answer.view(groups * group, count, width).transpose(0, 1)


def settled(total: Tensor) -> Tensor:
    """Row by row, whether a sum of unshifted 2^s proves that nothing overflowed and nothing that matters underflowed."""
    return (total > SETTLED[0]) & (total < SETTLED[1])


def _unshifted(rows: Tensor, count: int, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
    """Sums of 2^s v (G, RC, D) and of 2^s (G, RC, 1) over all pieces."""
    answer = total = None
    wide = _wide(rows)
    for piece in pieces:
        weights = torch.bmm(rows, piece.k.transpose(1, 2)).exp2_()
        if piece.band is not None:
            piece.band.clear(weights.view(rows.shape[0], -1, count, weights.shape[-1]))
        part, part_total = torch.bmm(weights, piece.v), weights.sum(-1, keepdim=True)
        answer = part if answer is None else answer.to(wide) + part
        total = part_total if total is None else total.to(wide) + part_total
    assert answer is not None and total is not None, "a block of queries needs at least one piece of keys"
    return answer, total


def _shifted(rows: Tensor, count: int, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
    """The same two sums relative to each row's largest score: for scores whose 2^s leaves the floats' range."""
    wide = _wide(rows)
    answer = rows.new_zeros(rows.shape, dtype=wide)
    total = rows.new_zeros((*rows.shape[:2], 1), dtype=wide)
    top = torch.full_like(total, -math.inf)
    for piece in pieces:
        scores = torch.bmm(rows, piece.k.transpose(1, 2))
        if piece.band is not None:
            blocks = scores.view(rows.shape[0], -1, count, scores.shape[-1])
            blocks.masked_fill_(piece.band.hidden(count, scores.shape[-1], rows.device), -math.inf)
        new = torch.maximum(top, scores.amax(-1, keepdim=True))
        finite = torch.where(new == -math.inf, 0.0, new)  # a row that has seen nothing yet keeps its zeros
        scale = torch.exp2(top - finite)
        weights = torch.exp2(scores - finite).to(rows.dtype)
        answer = answer * scale + torch.bmm(weights, piece.v)
        total = total * scale + weights.sum(-1, keepdim=True, dtype=wide)
        top = new
    return answer, torch.where(total == 0, 1.0, total)


def _wide(x: Tensor) -> torch.dtype:
    """The dtype in which sums over pieces are kept: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)
