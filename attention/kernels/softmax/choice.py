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
from attention.kernels.int8 import TOGETHER, dequantize
from attention.kernels.softmax import Blocks, Rows
from attention.parts import spread
from attention.shapes import HeadShape

LOOK_BYTES, GATHER_BYTES = 4 << 20, 1 << 20  # of what stands at a time: of queries and bounds, of keys
BLOCKS = 128  # whose bounds are widened at a time


def choose(q: Tensor, bounds: Sequence[Pair], rows: Sequence[Rows], blocks: Blocks) -> Tensor:
    """`Softmax.choose`."""
    groups = bounds[0][0].shape[1]
    table = torch.full((len(q), groups, blocks.best), -1, dtype=torch.int32, device=q.device)
    for first, last, position, source in rows:
        high, low = bounds[source]
        candidates = blocks.behind(position + last - first - 1) - blocks.first
        for a, b in spread(first, last, _together(LOOK_BYTES, _look_bytes(q.shape[1], q.shape[2], groups, candidates))):
            _choose(q[a:b], high, low, position + a - first, blocks, table[a:b])
    return table


def _choose(q: Tensor, high: Tensor, low: Tensor, position: int, blocks: Blocks, table: Tensor) -> None:
    """Of consecutive queries (C, H, D) into table (C, G, best)."""
    first, end = blocks.first, blocks.behind(position + len(q) - 1)
    if first >= end:
        return
    keys = ranks(bounding(q, high[first:end], low[first:end]))  # (G, C, N)
    block = torch.arange(first, end, device=q.device)
    behind = torch.tensor([blocks.behind(position + i) for i in range(len(q))], device=q.device)
    keys.bitwise_left_shift_(32).bitwise_or_(block)
    keys.masked_fill_(block >= behind[:, None], NONE)
    found = keys.topk(min(blocks.best, end - first), dim=-1).values.transpose(0, 1)
    table[..., : found.shape[-1]] = torch.where(found == NONE, -1, found & 0xFFFFFFFF).to(torch.int32)


NONE = torch.iinfo(torch.int64).min  # no rank with its block is as low


def bounding(q: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """What keys within bounds (N, G, D) score at most with q (C, H, D), summed over each group's heads: float32 (G, C, N)."""
    groups = high.shape[1]
    asked = q.double().unflatten(1, (groups, -1))
    above, below = (part.sum(2).transpose(0, 1) for part in (asked.clamp(min=0), asked.clamp(max=0)))
    scores = q.new_empty(groups, len(q), len(high), dtype=torch.float32)
    for a, b in spread(0, len(high), BLOCKS):
        scores[..., a:b] = above @ high[a:b].double().permute(1, 2, 0) + below @ low[a:b].double().permute(1, 2, 0)
    return scores


def ranks(scores: Tensor) -> Tensor:
    """Whole numbers of 32 bits, int64, in the order of float32 scores, NaN above all others."""
    number = (scores + 0.0).view(torch.int32)  # -0 is 0
    order = number.bitwise_xor_((number >> 31).bitwise_and_(0x7FFFFFFF))
    return order.masked_fill_(scores.isnan(), 0x7FFFFFFF).long()


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
        entry = keys.shape[1] * q.shape[2] * blocks.best * blocks.size * q.itemsize
        for a, b in spread(first, last, _together(GATHER_BYTES, entry)):
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
    scores = (asked @ _told(keys, place, group, q).transpose(2, 3)).to(wide) * (LOG2_E / math.sqrt(q.shape[-1]))
    scores.masked_fill_(hidden[:, :, None], -math.inf)
    top = scores.amax(-1, keepdim=True)
    old = log_total.view(*asked.shape[:3], 1)
    highest = torch.maximum(old, top)
    highest = torch.where(highest == -math.inf, 0.0, highest)
    weights, by = torch.exp2(scores - highest), torch.exp2(old - highest)
    seen = _told(values, place, group, q).masked_fill_(hidden[..., None], 0.0)  # 0 times NaN is NaN
    summed = (weights.to(q.dtype) @ seen).to(wide) + by * out.view(asked.shape).to(wide)
    answer = (summed / (by + weights.sum(-1, keepdim=True))).to(q.dtype)
    is_alone = hidden.all(-1)[:, :, None, None]  # such an answer stays as it is, to the bit
    out.copy_(torch.where(is_alone, out.view(asked.shape), answer).view(out.shape))


def _told(kept: Tensor, place: Tensor, group: Tensor, q: Tensor) -> Tensor:
    """Keys or values at places (C, G, N), as q has numbers: (C, G, N, D)."""
    return dequantize(kept[place, group].flatten(0, 2), q.dtype).view(*place.shape, -1)


def _places(table: Tensor, position: int, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """The keys of the chosen blocks, (C, G, best x size), and whether each is not met."""
    inside = torch.arange(blocks.size, device=table.device)
    place = (table.long()[..., None] * blocks.size + inside).flatten(2)
    near = position - blocks.window + torch.arange(len(table), device=table.device)
    return place, (place < blocks.sinks) | (place < 0) | (place >= near[:, None, None])


def _together(most: int, entry_bytes: int) -> int:
    """Queries whose entries stand at a time."""
    return max(1, min(512, most // entry_bytes))


def _look_bytes(heads: int, width: int, groups: int, candidates: int) -> int:
    """What a query that looks at so many blocks takes, in float64: its parts, products of them, or ranks of scores."""
    parts = 8 * width * (2 * heads + groups)
    products = 8 * width * (heads + 2 * groups) + groups * (24 * min(candidates, BLOCKS) + 4 * candidates)
    return max(parts, products, 20 * groups * candidates)


def chosen_bytes(shape: HeadShape, queries: int, blocks: Blocks, candidates: int) -> int:
    """`Softmax.chosen_bytes`."""
    heads, groups, width, size = shape.query_heads, shape.key_value_heads, shape.head_width, shape.itemsize
    look = _look_bytes(heads, width, groups, candidates)
    looking = min(queries, _together(LOOK_BYTES, look)) * look + 8 * min(candidates, BLOCKS) * groups * width
    keys = blocks.best * blocks.size
    rows = min(queries, _together(GATHER_BYTES, groups * width * keys * size))
    wide = max(size, 4)
    gathering = rows * keys * (groups * width * size + heads * (wide + size) + (0 if shape.kv is None else shape.kept_bytes))
    gathering += 0 if shape.kv is None else 8 * min(TOGETHER, rows * keys * groups * width)
    return queries * groups * blocks.best * 4 + max(looking, gathering)
