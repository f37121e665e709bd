"""The softmax kernel in operators of torch: it runs anywhere, and is the slow reading of `native`.

Here blocks of queries are cut and the keys that they see are put together; `streaming` answers them, `decode` answers steps,
`choice` what queries choose.
Blocks of one shape go together, several to a product, in scratch memory that is kept from block to block: a fresh megabyte
costs 256 page faults, and a call of a small product costs as much as the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attention.history import Pair
from attention.kernels.int8 import dequantize, told_bytes
from attention.kernels.library import Told
from attention.kernels.softmax import Runs, Seen
from attention.kernels.softmax.choice import choose, chosen, chosen_bytes
from attention.kernels.softmax.decode import step, step_bytes
from attention.kernels.softmax.streaming import Band, Piece, Room, answer, columns, split
from attention.parts import Parts, spread
from attention.shapes import HeadShape

__all__ = [
    "band",
    "band_bytes",
    "choose",
    "chosen",
    "chosen_bytes",
    "dense",
    "dense_bytes",
    "edge",
    "pattern",
    "pattern_bytes",
    "step",
    "step_bytes",
    "told",
]

ROWS = 128  # queries of a block of a band: fewer lose speed in the products, more score keys that their rows do not see
DENSE_ROWS = 512  # where all keys are seen there is no such waste


def dense(
    q: Tensor, keys: Tensor, values: Tensor, past: int, causal: bool, out: Tensor, log_total: Tensor | None = None
) -> Parts:
    """`Softmax.dense`."""
    keys, values = (heads_first(dequantize(x, q.dtype)) for x in (keys, values))
    most, room = columns(q.shape[1], q.itemsize, DENSE_ROWS), Room(q)
    for first, last in spread(0, len(q), DENSE_ROWS):
        seen = past + last if causal else keys.shape[1]
        band = Band(high=past + first) if causal else Band()
        pieces = split(Piece(keys[:, :seen], values[:, :seen], band), most)
        logs = None if log_total is None else log_total[first:last]
        yield from answer(q[first:last], pieces, out[first:last], room, log_total=logs)


def band(
    q: Tensor, near: Pair, free: Pair, at: int, before: int, ahead: int, out: Tensor, log_total: Tensor | None = None
) -> Parts:
    """`Softmax.band`. Blocks whose keys all lie within near are of one shape; as many go together as a piece has room for."""
    near, free = _heads_first(near, q), _heads_first(free, q)
    extra, wide = free[0].shape[1], before + ROWS + ahead
    most, keys = columns(q.shape[1], q.itemsize, ROWS), near[0].shape[1]
    fitting, room = max(1, most // (wide + extra)), Room(q)
    first = 0
    while first < len(q):
        low = at + first - before
        whole = min(fitting, max(0, keys - ahead - at - first) // ROWS, (len(q) - first) // ROWS) if low >= 0 else 0
        together, rows = max(1, whole), min(len(q) - first, ROWS)
        low = max(0, low)
        high = low + wide if whole else max(low, min(keys, at + first + rows + ahead))
        shape = (len(near[0]), together, extra + high - low, q.shape[-1])
        k, v = (_windows(x, low, f, room.take(name, *shape)) for name, x, f in zip(("k", "v"), near, free, strict=True))
        seen = Band(extra + at + first - before - low, extra + at + first + ahead - low, extra)
        pieces = [Piece(k, v, seen)] if whole > 1 else split(Piece(k, v, seen), most)
        last = first + together * rows
        logs = None if log_total is None else log_total[first:last]
        yield from answer(q[first:last], pieces, out[first:last], room, together, logs)
        first = last
        del pieces, k, v  # or the room stays twice when the next blocks need more of it


def pattern(q: Tensor, keys: Tensor, values: Tensor, past: int, causal: bool, seen: Seen, out: Tensor) -> Parts:
    """`Softmax.pattern`. Consecutive blocks of one shape go together, their keys gathered."""
    keys, values = (heads_first(dequantize(x, q.dtype)) for x in (keys, values))
    room = Room(q)
    for first, last, runs in _groups(seen, q.shape[1], q.itemsize):
        together = len(runs)
        rows = (last - first) // together
        k, v = (_gather(x, runs, room, name) for name, x in (("k", keys), ("v", values)))
        seen_by = Band(high=k.shape[1] - rows) if causal else Band()
        pieces = split(Piece(k, v, seen_by), columns(q.shape[1], q.itemsize, rows))
        yield from answer(q[first:last], pieces, out[first:last], room, together)
        del pieces, k, v  # or the room stays twice when the next blocks need more of it


def _groups(seen: Seen, heads: int, itemsize: int) -> Iterator[tuple[int, int, list[Runs]]]:
    """(first, last, runs of each block) of the blocks that go together: of one shape, and half a piece of keys at most.

    What is gathered stays near the cores, too.
    """
    first = last = 0
    shape, held = (0, 0), list[Runs]()
    for end, runs in seen:
        rows, keys = end - last, _length(runs)
        is_alike = (rows, keys) == shape and (len(held) + 1) * keys <= columns(heads, itemsize, rows) // 2
        if held and not is_alike:
            yield first, last, held
            first, held = last, []
        held.append(runs)
        last, shape = end, (rows, keys)
    if held:
        yield first, last, held


def _length(runs: Runs) -> int:
    return sum(last - first for first, last in runs)


def _is_run(held: list[Runs]) -> bool:
    """Whether one block goes alone and sees neighbouring keys only, which need no gathering."""
    return len(held) == 1 and len(held[0]) == 1


def _gather(x: Tensor, held: list[Runs], room: Room, name: str) -> Tensor:
    """The keys that each of b blocks sees: (G, n, D) to (G b, N, D), tight unless it is one run."""
    if _is_run(held):
        first, last = held[0][0]
        return x[:, first:last]
    groups, _, width = x.shape
    starts, ends = torch.tensor([run for runs in held for run in runs], device=x.device).unbind(1)
    counts = ends - starts
    behind = counts.cumsum(0)
    tokens = torch.arange(len(held) * _length(held[0]), device=x.device)
    tokens += torch.repeat_interleave(starts - behind + counts, counts, output_size=len(tokens))
    picked = room.take("picked", len(tokens), groups, width)
    torch.index_select(x.transpose(0, 1), 0, tokens, out=picked)
    gathered = room.take(name, groups, len(held), len(tokens) // len(held), width)
    gathered.copy_(picked.view(len(held), -1, groups, width).permute(2, 0, 1, 3))
    return gathered.view(groups * len(held), -1, width)


def _windows(x: Tensor, low: int, free: Tensor, out: Tensor) -> Tensor:
    """The keys that each of b blocks sees, into out (G, b, N, D): the free ones, then those from `low` + block * ROWS on."""
    groups, together, count, width = out.shape
    extra = free.shape[1]
    wide = count - extra
    out[:, :, :extra] = free[:, None]
    out[:, :, extra:] = x[:, low : low + wide + (together - 1) * ROWS].unfold(1, wide, ROWS).transpose(2, 3)
    return out.view(groups * together, count, width)


def heads_first(x: Tensor) -> Tensor:
    """A view of (N, G, D) as (G, N, D), as products want it."""
    return x.transpose(0, 1)


def _heads_first(pair: Pair, q: Tensor) -> Pair:
    return heads_first(dequantize(pair[0], q.dtype)), heads_first(dequantize(pair[1], q.dtype))


def told(*args: Any, **kwargs: Any) -> Told | None:
    """`Softmax.told`."""
    return None


def edge(shape: HeadShape) -> int:
    """`Softmax.edge`."""
    return columns(shape.query_heads, shape.itemsize, DENSE_ROWS) + 1


def dense_bytes(shape: HeadShape, queries: int, keys: int, asking: int | None = None) -> int:
    """`Softmax.dense_bytes`."""
    return _workspace_bytes(shape, queries, DENSE_ROWS, keys, asking=asking) + told_bytes(shape, keys)


def band_bytes(shape: HeadShape, queries: int, keys: int, before: int, ahead: int, free: int) -> int:
    """`Softmax.band_bytes`."""
    wide = before + ROWS + ahead
    seen = min(keys, before + min(queries, ROWS) + ahead + free)
    fitting = columns(shape.query_heads, shape.itemsize, ROWS) // (wide + free)
    early = max(0, before + free - (keys - queries)) + ROWS - 1  # queries of blocks that reach before the first key
    whole = (queries - early // ROWS * ROWS - ahead) // ROWS  # blocks whose keys all lie within the sequence
    near = min(max(0, keys - free), before + queries)
    told = told_bytes(shape, min(free, keys) + near)
    return told + _workspace_bytes(shape, queries, ROWS, seen, gathered=True, together=max(1, min(fitting, whole)), free=free)


def pattern_bytes(shape: HeadShape, queries: int, seen: Seen) -> int:
    """`Softmax.pattern_bytes`: the most of each kind of scratch memory over all groups, for a room keeps what it has taken."""
    entry = shape.key_value_heads * shape.head_width * shape.itemsize
    gathered = copied = scores = sums = keys = 0
    for first, last, held in _groups(seen, shape.query_heads, shape.itemsize):
        rows, tokens = shape.query_heads * (last - first), _length(held[0])
        keys = max(keys, *(end for runs in held for _, end in runs))
        piece = min(tokens, columns(shape.query_heads, shape.itemsize, (last - first) // len(held)))
        gathered = max(gathered, 0 if _is_run(held) else 3 * len(held) * tokens * entry)
        copied = max(copied, 2 * piece * entry if _is_run(held) or piece < tokens else 0)
        scores = max(scores, rows * piece * shape.itemsize)
        wide = max(shape.itemsize, 4) if piece < tokens else 0  # of sums over several pieces
        sums = max(sums, rows * ((2 * shape.head_width + 1) * shape.itemsize + (shape.head_width + 1) * wide))
    answers = queries * shape.query_heads * shape.head_width * shape.itemsize
    return answers + gathered + copied + scores + sums + _scratch_bytes(shape) + told_bytes(shape, keys)


def _workspace_bytes(
    shape: HeadShape,
    queries: int,
    rows: int,
    seen: int,
    *,
    gathered: bool = False,
    together: int = 1,
    free: int = 0,
    asking: int | None = None,
) -> int:
    """Peak temporaries of `softmax` over blocks of `rows` queries that see `seen` keys, the answer to all queries included.

    `gathered`: the backend puts the keys and values of its blocks together before it asks, of `together` blocks at a time.
    `free`: columns that no band binds. `asking`: how many of the queries go this way; None: all.
    """
    size, width, groups = shape.itemsize, shape.head_width, shape.key_value_heads
    block = shape.query_heads * min(queries if asking is None else asking, rows) * together
    widest = min(seen, columns(shape.query_heads, size, rows))
    whole = widest == seen
    tight = 0 if gathered and whole else groups * widest * width * size
    gather = 2 * groups * seen * width * size * together if gathered else 0
    part = block * max((width + 1) * size, min(free, widest) * size)  # sums, or weights that are kept from being cleared
    totals = 0 if whole else block * (width + 1) * max(size, 4)
    part = max(part, totals if size < 4 else 0)  # their quotient before it is narrow
    answer = queries * shape.query_heads * width * size
    return answer + block * (widest + width) * size + gather + 2 * tight + part + totals + _scratch_bytes(shape)


def _scratch_bytes(shape: HeadShape) -> int:
    """About what oneDNN takes beside, which multiplies what is narrower than float32."""
    return 0 if shape.itemsize >= 4 else 3 << 17
