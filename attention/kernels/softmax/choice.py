"""Blocks of keys that a query chooses, in operators of torch: the slow reading of `choose` and `chosen` of softmax.c.

A block is judged by its bounds: no key of it has a larger score with q than the sum over the elements of max(q high, q low).
They are summed in float64 and ranked in float32, so a choice does not depend on how products are cut; chosen keys are gathered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attention.history import Pair
from attention.kernels import LOG2_E
from attention.kernels.softmax import Blocks, Rows
from attention.parts import spread
from attention.shapes import HeadShape

BYTES = 1 << 20  # of scores or of keys that stand at a time


def choose(q: Tensor, bounds: Sequence[Pair], rows: Sequence[Rows], blocks: Blocks) -> Tensor:
    """`Softmax.choose`."""
    groups = bounds[0][0].shape[1]
    table = torch.full((len(q), groups, blocks.best), -1, dtype=torch.int32, device=q.device)
    for first, last, position, source in rows:
        high, low = bounds[source]
        for a, b in spread(first, last, _rows(16 * groups * blocks.behind(position + last - first - 1))):
            _choose(q[a:b], high, low, position + a - first, blocks, table[a:b])
    return table


def _choose(q: Tensor, high: Tensor, low: Tensor, position: int, blocks: Blocks, table: Tensor) -> None:
    """Of consecutive queries (C, H, D) into table (C, G, best)."""
    first, end = blocks.first, blocks.behind(position + len(q) - 1)
    if first >= end:
        return
    scores = bounding(q, high[first:end], low[first:end])  # (G, C, N)
    block = torch.arange(first, end, device=q.device)
    behind = torch.tensor([blocks.behind(position + i) for i in range(len(q))], device=q.device)
    keys = (ranks(scores) << 32) | block
    keys.masked_fill_(block >= behind[:, None], torch.iinfo(torch.int64).min)
    found = keys.topk(min(blocks.best, end - first), dim=-1).values.transpose(0, 1)
    kept = torch.where(found == torch.iinfo(torch.int64).min, -1, found & 0xFFFFFFFF)
    table[..., : kept.shape[-1]] = kept.to(torch.int32)


def bounding(q: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """What keys within bounds (N, G, D) score at most with q (C, H, D), summed over each group's heads: float64 (G, C, N)."""
    asked = q.double().unflatten(1, (high.shape[1], -1))
    above, below = (part.sum(2).transpose(0, 1) for part in (asked.clamp(min=0), asked.clamp(max=0)))
    found: Tensor = above @ high.double().permute(1, 2, 0) + below @ low.double().permute(1, 2, 0)
    return found


def ranks(scores: Tensor) -> Tensor:
    """Whole numbers of 32 bits in the order of the scores, NaN above all others."""
    number = (scores.float() + 0.0).view(torch.int32)
    order = number ^ ((number >> 31) & 0x7FFFFFFF)
    return torch.where(scores.isnan(), 0x7FFFFFFF, order).long()


def chosen(
    q: Tensor,
    sequences: Sequence[Pair],
    rows: Sequence[Rows],
    blocks: Blocks,
    table: Tensor,
    out: Tensor,
    log_total: Tensor,
) -> None:
    """`Softmax.chosen`."""
    for first, last, position, source in rows:
        keys, values = sequences[source]
        entry = keys.shape[1] * keys.shape[2] * blocks.best * blocks.size * keys.itemsize
        for a, b in spread(first, last, _rows(entry)):
            _answer(q[a:b], keys, values, position + a - first, blocks, table[a:b], out[a:b], log_total[a:b])


def _answer(
    q: Tensor, keys: Tensor, values: Tensor, position: int, blocks: Blocks, table: Tensor, out: Tensor, log_total: Tensor
) -> None:
    """Of consecutive queries (C, H, D)."""
    groups, wide = keys.shape[1], log_total.dtype
    place, hidden = _places(table, position, blocks)
    hidden |= place >= len(keys)
    place = place.clamp_(0, len(keys) - 1)
    group = torch.arange(groups, device=q.device)[:, None]
    asked = q.unflatten(1, (groups, -1))  # (C, G, R, D)
    scores = (asked @ keys[place, group].transpose(2, 3)).to(wide) * (LOG2_E / math.sqrt(q.shape[-1]))
    scores.masked_fill_(hidden[:, :, None], -math.inf)
    top = scores.amax(-1, keepdim=True)
    old = log_total.view(*asked.shape[:3], 1)
    highest = torch.maximum(old, top)
    highest = torch.where(highest == -math.inf, 0.0, highest)
    weights, by = torch.exp2(scores - highest), torch.exp2(old - highest)
    seen = values[place, group].masked_fill_(hidden[..., None], 0.0)  # 0 times NaN is NaN
    summed = (weights.to(q.dtype) @ seen).to(wide) + by * out.view(asked.shape).to(wide)
    answer = (summed / (by + weights.sum(-1, keepdim=True))).to(q.dtype)
    is_alone = hidden.all(-1)[:, :, None, None]  # such an answer stays as it is, to the bit
    out.copy_(torch.where(is_alone, out.view(asked.shape), answer).view(out.shape))


def _places(table: Tensor, position: int, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """The keys of the chosen blocks, (C, G, best x size), and whether each is not met."""
    inside = torch.arange(blocks.size, device=table.device)
    place = (table.long()[..., None] * blocks.size + inside).flatten(2)
    near = position - blocks.window + torch.arange(len(table), device=table.device)
    return place, (place < blocks.sinks) | (place < 0) | (place >= near[:, None, None])


def _rows(entry_bytes: int) -> int:
    """Queries whose entries stand at a time."""
    return max(1, min(512, BYTES // max(1, entry_bytes)))


def chosen_bytes(shape: HeadShape, queries: int, blocks: Blocks, candidates: int) -> int:
    """`Softmax.chosen_bytes`."""
    groups, size, keys = shape.key_value_heads, shape.itemsize, blocks.best * blocks.size
    table = queries * groups * blocks.best * 4
    rows = min(queries, _rows(16 * groups * candidates))
    ranking = rows * groups * candidates * 40
    rows = min(queries, _rows(groups * shape.head_width * keys * size))
    gathered = 2 * rows * groups * keys * shape.head_width * size
    scores = rows * shape.query_heads * keys * (2 * max(size, 4) + size)
    return table + max(ranking, gathered + scores)
