"""Softmax attention over blocks of keys, the one kernel under every exact backend.

A backend names, for a block of queries, the pieces of keys they see; `softmax` answers them. The scores of one piece exist
at a time, so a block costs rows x piece of workspace, never L x L, and stays in the caches.

Source: the streaming softmax of Milakov and Gimelshein (arXiv 1805.02867) and Rabe and Staats (arXiv 2112.05682), with one
change. Their running maximum only keeps exp from leaving the floats' range, and costs two passes over the scores. Here
2^s is taken unshifted first and each row's sum tells afterwards whether that was sound (`is_sound`); a row that was not is
answered again with the running maximum. The answers are those of softmax either way.

Keys and values are copied into tight (G, N, D) blocks before their products: oneDNN, which multiplies bfloat16 on CPU,
otherwise makes copies of its own, and that of the keys, transposed, costs as much as the product.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attention.interface import HeadShape, Parts, StateTensor

LOG2_E = math.log2(math.e)
# A row sum between these shows that no 2^s overflowed, and that what underflowed (below 2^-126) was at most 2^-66 of the row.
_own = threading.local()  # of each thread: the memory in which its steps stack histories
SOUND = (2.0**-60, 2.0**100)
ROWS = 128  # queries of a block of a band: fewer lose speed in the products, more score keys that their rows do not see
DENSE_ROWS = 512  # where all keys are seen there is no such waste
PIECE_BYTES = 2 << 20  # per thread; the scores of a piece should stay near the cores between the two products
STEP = 256  # a step looks at a multiple of so many keys, for each count is a shape that oneDNN compiles a kernel for (4 ms)
STACKED_BYTES = 4 << 20  # of keys: so many histories that step together are stacked for one product, in memory that stays warm


@dataclass(frozen=True)
class Band:
    """Which keys of a piece a query sees: column j and row i of the block with `low <= j - i <= high`.

    `low` does not bind the first `free` columns: sinks and globals stay visible behind every row.
    """

    low: int | None = None  # None: open
    high: int | None = None
    free: int = 0

    def clear(self, weights: Tensor) -> None:
        """Zero the weights outside the band, in place. weights: (..., C, N)."""
        rows, columns = weights.shape[-2:]
        if self.high is not None and self.high < columns - 1:
            weights.tril_(self.high)
        if self.low is not None and self.low - self.free > 1 - rows and self.free < columns:
            free = weights[..., : self.free].clone()  # put back afterwards: triu_ of a slice would copy it twice
            weights.triu_(self.low)
            weights[..., : self.free] = free

    def hidden(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Bool (rows, columns): True where a row does not see a column."""
        column = torch.arange(columns, device=device)
        offset = column - torch.arange(rows, device=device)[:, None]
        low = -rows if self.low is None else self.low
        high = columns if self.high is None else self.high
        return ((offset < low) & (column >= self.free)) | (offset > high)

    def part(self, first: int, last: int) -> Band:
        """The band of the columns first..last, counted from `first`."""
        low = None if self.low is None else self.low - first
        high = None if self.high is None else self.high - first
        return Band(low, high, min(max(self.free - first, 0), last - first))


@dataclass(frozen=True)
class Piece:
    """Keys and values (G, N, D) that a block of queries sees, and the band of them that each row sees."""

    k: Tensor
    v: Tensor
    band: Band = Band()


class Room:
    """Scratch memory of one call: each block works where the one before it did, for fresh memory costs a fault per page."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape. What was taken under the name before is lost."""
        count = math.prod(shape)
        if name not in self._held or self._held[name].numel() < count:
            self._held.pop(name, None)
            self._held[name] = self._like.new_empty(count)
        return self._held[name][:count].view(shape)


def spread(start: int, end: int, block: int) -> Iterator[tuple[int, int]]:
    """(first, last) of the consecutive blocks that cover start..end."""
    for first in range(start, end, block):
        yield first, min(first + block, end)


def columns(heads: int, itemsize: int, rows: int = ROWS) -> int:
    """Keys per piece so that the scores of `heads` x `rows` stay in the caches; a multiple of 64, for the products."""
    fitting = PIECE_BYTES * torch.get_num_threads() // (heads * rows * itemsize)
    return max(64, fitting // 64 * 64)


def split(piece: Piece, most: int) -> list[Piece]:
    """The piece in parts of `most` keys and a remainder.

    Parts of equal length would waste less on the remainder, but each length is a shape of its own, and the matrix library
    compiles and keeps a kernel for every shape it meets: a first long prompt then pays for hundreds of them.
    """
    parts = spread(0, piece.k.shape[1], most)
    return [Piece(piece.k[:, a:b], piece.v[:, a:b], piece.band.part(a, b)) for a, b in parts]


def heads_first(x: Tensor) -> Tensor:
    """A view of (T, G, D) as (G, T, D)."""
    return x.transpose(0, 1)


def query_rows(q: Tensor, heads: int, together: int = 1) -> Tensor:
    """(bC, H, D) to (G b, RC, D), tight: of each of b blocks the R query heads of a group one behind the other."""
    return _by_group(q, heads, together).contiguous().view(heads * together, -1, q.shape[-1])


def tokens_first(rows: Tensor, count: int) -> Tensor:
    """A view of (G, RC, d) as (C, H, d): `query_rows` back, of one block of `count` tokens."""
    return rows.reshape(-1, count, rows.shape[-1]).transpose(0, 1)


def _by_group(x: Tensor, groups: int, together: int) -> Tensor:
    """A view of (bC, H, D) as (G, b, R, C, D)."""
    return x.view(together, -1, groups, x.shape[1] // groups, x.shape[2]).permute(2, 0, 3, 1, 4)


def softmax(
    q: Tensor, pieces: Sequence[Piece], out: Tensor, room: Room, together: int = 1, log_total: Tensor | None = None
) -> Parts:
    """Attend a block of queries to its pieces of keys, pausing behind each; or several blocks that see equally many.

    Args:
        q: (bC, H, D), b blocks of C queries.
        pieces: at least one, each of keys and values (G b, N, D), block behind block within a group, and a band that is the
            same for all blocks. Together they are the keys a block sees, none twice.
        out: (bC, H, D), written. A row that sees nothing is zeros.
        together: b.
        log_total: (bC, H, 1), written where given: log2 of the sum of each row's 2^s.
    """
    count, groups = len(q) // together, pieces[0].k.shape[0] // together
    rows = query_rows(q, groups, together)
    sums, total = yield from _unshifted(rows, count, pieces, room)
    answer = _by_group(out, groups, together)
    torch.div(sums.view(answer.shape), total.view(*answer.shape[:-1], 1), out=answer)
    logs = None if log_total is None else _by_group(log_total, groups, together)
    if logs is not None:
        logs.copy_(total.to(logs.dtype).log2().view(logs.shape))
    low, high = torch.aminmax(total)
    narrow = q.dtype == torch.float16  # its range ends at 2^16: no unshifted sum of it proves anything
    if narrow or not (low.item() > SOUND[0] and high.item() < SOUND[1]):
        _again(rows, count, pieces, is_sound(total) & (not narrow), answer, logs)


def is_sound(total: Tensor) -> Tensor:
    """Row by row, whether a sum of unshifted 2^s proves that nothing overflowed and nothing that matters underflowed."""
    return (total > SOUND[0]) & (total < SOUND[1])


def _again(rows: Tensor, count: int, pieces: Sequence[Piece], sound: Tensor, answer: Tensor, logs: Tensor | None) -> None:
    """Replace the answers of the unsound rows, and of no other: no row depends on what its neighbours see."""
    sums, total, top = _shifted(rows, count, pieces)
    for found, shifted in ((answer, sums / total), (logs, total.log2() + top)):
        if found is not None:
            replaced = shifted.to(found.dtype).view(found.shape)
            found.copy_(torch.where(sound.view(*found.shape[:-1], 1), found, replaced))


def _unshifted(rows: Tensor, count: int, pieces: Sequence[Piece], room: Room) -> Generator[None, None, tuple[Tensor, Tensor]]:
    """Sums of 2^s v (G, RC, D) and of 2^s (G, RC, 1) over all pieces; more than one are summed in at least float32."""
    sums, total = _piece(rows, count, pieces[0], room)
    yield
    if len(pieces) > 1:
        sums, total = sums.to(_wide(rows)), total.to(_wide(rows))
    for piece in pieces[1:]:
        more, more_total = _piece(rows, count, piece, room)
        sums += more
        total += more_total
        del more, more_total  # or they stand beside the next
        yield
    return sums, total


def _piece(rows: Tensor, count: int, piece: Piece, room: Room) -> tuple[Tensor, Tensor]:
    """The two sums of one piece; its scores and weights stand in `room`."""
    keys, values = (
        x if x.is_contiguous() else room.take(name, *x.shape).copy_(x) for name, x in (("keys", piece.k), ("values", piece.v))
    )
    weights = room.take("weights", *rows.shape[:2], keys.shape[1])
    scores(rows, keys, weights).exp2_()
    piece.band.clear(weights.view(len(rows), -1, count, keys.shape[1]))
    return weigh(weights, values, lambda: _hidden(piece, count)), weights.sum(-1, keepdim=True)


def _hidden(piece: Piece, count: int) -> Tensor:
    return piece.band.hidden(count, piece.k.shape[1], piece.k.device)


def weigh(weights: Tensor, values: Tensor, hidden: Callable[[], Tensor]) -> Tensor:
    """weights (G, RC, N) times values (G, N, d), where a value that a row does not see leaves it as it is: 0 times NaN is NaN.

    hidden: tells which, bool (C, N), their weights being 0. Asked only where a value is NaN or infinite; a row that sees one
    has NaN in its place.
    """
    product = torch.bmm(weights, values)
    if math.isfinite(product.sum().item()) or (numbers := values.isfinite()).all():
        return product
    seen = (~hidden()).to(torch.float32)
    met = (seen @ (~numbers).to(torch.float32)) > 0  # (G, C, d)
    product = torch.bmm(weights, values.where(numbers, 0.0))
    return product.view(len(values), -1, *met.shape[1:]).masked_fill_(met[:, None], math.nan).view(product.shape)


def scores(rows: Tensor, k: Tensor, out: Tensor) -> Tensor:
    """q.k log2(e) / sqrt D of rows (G, RC, D) and k (G, N, D) into out (G, RC, N): 2^s is softmax's exp(q.k / sqrt D)."""
    scale = LOG2_E / math.sqrt(rows.shape[-1])
    return torch.baddbmm(out, rows, k.contiguous().transpose(1, 2), beta=0, alpha=scale, out=out)


def _shifted(rows: Tensor, count: int, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor, Tensor]:
    """The same two sums relative to each row's largest score, and that: for scores whose 2^s leaves the floats' range."""
    wide = _wide(rows)
    sums = rows.new_zeros(rows.shape, dtype=wide)
    total = rows.new_zeros((*rows.shape[:2], 1), dtype=wide)
    top = torch.full_like(total, -math.inf)
    for piece in pieces:
        s = scores(rows, piece.k, rows.new_empty(*rows.shape[:2], piece.k.shape[1]))
        hidden = _hidden(piece, count)
        s.view(rows.shape[0], -1, count, s.shape[-1]).masked_fill_(hidden, -math.inf)
        new = torch.maximum(top, s.amax(-1, keepdim=True))
        finite = torch.where(new == -math.inf, 0.0, new)  # a row that has seen nothing yet keeps its zeros
        scale = torch.exp2(top - finite)
        weights = torch.exp2(s - finite).to(rows.dtype)
        sums = sums * scale + weigh(weights, piece.v, lambda hidden=hidden: hidden)  # type: ignore[misc]
        total = total * scale + weights.sum(-1, keepdim=True, dtype=wide)
        top = new
    return sums, torch.where(total == 0, 1.0, total), top


def step(
    q: Tensor,
    states: Sequence[dict[str, Tensor]],
    counts: Sequence[int],
    groups: int,
    out: Tensor,
    log_total: Tensor | None = None,
    runs: Sequence[Runs] | None = None,
) -> None:
    """Attend one token of each of B sequences to the first `counts` keys of its state: q and out are (B, H, D).

    log_total, float32 (B, H, 1), is written where given: log2 of the sum of each row's 2^s. runs: where in its state each
    sequence's keys stand, one run behind the other, where that is not at its beginning; `counts` then counts along them.
    Values behind the count, to the end of the runs, must be numbers.

    A step reads every key once for a handful of products, so it is as fast as memory is read. One product serves all heads
    of a sequence: each query stands at its own group's place in a row of zeros, (G D), and meets whole rows of the history
    as they lie in memory. The zeros' products cost nothing beside the reading.
    """
    count, heads, width = q.shape
    place, own = _places(heads, groups, q.dtype, q.device)
    rows = torch.mul(q[:, :, None], place).view(count, heads, -1)  # (B, H, G D)
    if runs is None:
        runs = [((0, rounded(seen, len(state["k"]))),) for state, seen in zip(states, counts, strict=True)]
    sizes = [sum(last - first for first, last in each) for each in runs]
    together = _together(sizes, groups * width * q.itemsize) if count > 1 else [[0]]
    if len(together) == 1:
        found = _step(rows, states, counts, runs, sizes[0], width, log_total)
    else:
        found = torch.empty_like(rows)
        for some in together:
            logs = None if log_total is None else log_total.new_empty(len(some), heads, 1)
            those, seen, at = [states[i] for i in some], [counts[i] for i in some], [runs[i] for i in some]
            found[some] = _step(rows[some], those, seen, at, sizes[some[0]], width, logs)
            if log_total is not None and logs is not None:
                log_total[some] = logs
    torch.index_select(found.view(count, heads * groups, width), 1, own, out=out)


def _together(sizes: Sequence[int], row_bytes: int) -> list[list[int]]:
    """The indices of histories in groups of one size each, none of more than STACKED_BYTES of keys."""
    found = []
    for size in set(sizes):
        these = [i for i, other in enumerate(sizes) if other == size]
        most = max(1, STACKED_BYTES // (size * row_bytes))
        found += [these[first:last] for first, last in spread(0, len(these), most)]
    return found


@lru_cache(maxsize=64)
def _places(heads: int, groups: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each query head's group, as a one-hot column (H, G, 1) and as an index into the heads' groups laid flat, (H,)."""
    head = torch.arange(heads)
    group = head // (heads // groups)
    one_hot = torch.nn.functional.one_hot(group, groups)[:, :, None]
    return one_hot.to(device, dtype), (head * groups + group).to(device)


def _step(
    rows: Tensor,
    states: Sequence[dict[str, Tensor]],
    counts: Sequence[int],
    runs: Sequence[Runs],
    size: int,
    width: int,
    log_total: Tensor | None,
) -> Tensor:
    """Softmax of rows (b, H, G D) over the `size` keys in each state's runs, those behind `counts` left out: (b, H, G D)."""
    keys = _histories(states, "k", runs, size)
    weights = rows.new_empty(len(rows), rows.shape[1], size)
    torch.baddbmm(weights, rows, keys.transpose(1, 2), beta=0, alpha=1 / math.sqrt(width), out=weights)
    if len(counts) == 1 and counts[0] < size:
        weights[..., counts[0] :].fill_(-math.inf)
    elif min(counts) < size:
        weights.masked_fill_(_behind(tuple(counts), size, rows.device), -math.inf)
    if log_total is not None:
        torch.mul(weights.to(log_total.dtype).logsumexp(-1, keepdim=True), LOG2_E, out=log_total)
    return torch.bmm(weights.softmax(-1), _histories(states, "v", runs, size))


def _histories(states: Sequence[dict[str, Tensor]], name: str, runs: Sequence[Runs], size: int) -> Tensor:
    """The `size` keys or values in each state's runs as (b, size, G D); a view, or gone with this thread's next call."""
    found = [state[name][first:last] for state, own in zip(states, runs, strict=True) for first, last in own]
    if len(found) == 1:
        return found[0][None]
    stack = _stack(found[0], len(states) * size)
    torch.cat(found, out=stack)
    return stack.view(len(states), size, -1)


def _stack(like: Tensor, count: int) -> Tensor:
    """Uninitialised (count, G D) for as many rows like these. On CPU it is this thread's, one step after the other:

    fresh memory costs a fault per page, and 4 MB of them take longer than all else that a step does with a layer.
    """
    if like.device.type != "cpu":
        return like.new_empty(count, like.shape[1])
    rooms: dict[torch.dtype, Room] = _own.__dict__.setdefault("rooms", {})
    with torch.inference_mode(False):  # memory that was taken in inference mode can be used nowhere else
        return rooms.setdefault(like.dtype, Room(torch.empty(0, dtype=like.dtype))).take("stack", count, like.shape[1])


@lru_cache(maxsize=8)
def _behind(counts: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """Bool (b, 1, size): True at and behind each sequence's count; the layers of a step ask for the same."""
    return (torch.arange(size) >= torch.tensor(counts)[:, None])[:, None].to(device)


def rounded(count: int, most: int) -> int:
    """The next whole `STEP`, or `most`."""
    return min(-(-count // STEP) * STEP, most)


def _wide(x: Tensor) -> torch.dtype:
    """The dtype in which sums over pieces are kept: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def dense(
    q: Tensor, keys: Tensor, values: Tensor, past: int, causal: bool, out: Tensor, log_total: Tensor | None = None
) -> Parts:
    """Answer queries at positions `past` and on over all of keys, values (G, n, D) into out (C, H, D); see `softmax`."""
    most, room = columns(q.shape[1], q.itemsize, DENSE_ROWS), Room(q)
    for first, last in spread(0, len(q), DENSE_ROWS):
        seen = past + last if causal else keys.shape[1]
        band = Band(high=past + first) if causal else Band()
        pieces = split(Piece(keys[:, :seen], values[:, :seen], band), most)
        logs = None if log_total is None else log_total[first:last]
        yield from softmax(q[first:last], pieces, out[first:last], room, log_total=logs)


Runs = Sequence[tuple[int, int]]  # (first, last) of keys that stand one behind the other
Pair = tuple[Tensor, Tensor]  # keys and values, (G, n, D) each


def band(q: Tensor, near: Pair, free: Pair, at: int, before: int, ahead: int, out: Tensor) -> Parts:
    """Answer queries q (C, H, D), the first of which stands at index `at` of near, into out.

    A query sees itself, `before` keys before and `ahead` keys behind it in near, and all f keys of free. Blocks whose keys
    all lie within near are of one shape, and as many go together as a piece has room for.
    """
    extra, wide = free[0].shape[1], before + ROWS + ahead
    most, keys = columns(q.shape[1], q.itemsize), near[0].shape[1]
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
        yield from softmax(q[first:last], pieces, out[first:last], room, together)
        first = last
        del pieces, k, v  # or the room stays twice when the next blocks need more of it


def _windows(x: Tensor, low: int, free: Tensor, out: Tensor) -> Tensor:
    """The keys that each of b blocks sees, into out (G, b, N, D): the free ones, then those from `low` + block * ROWS on."""
    groups, together, count, width = out.shape
    extra = free.shape[1]
    wide = count - extra
    out[:, :, :extra] = free[:, None]
    out[:, :, extra:] = x[:, low : low + wide + (together - 1) * ROWS].unfold(1, wide, ROWS).transpose(2, 3)
    return out.view(groups * together, count, width)


def key_value_state(shape: HeadShape, tokens: int, most: int | None = None) -> dict[str, StateTensor]:
    """Keys and values of `tokens` tokens, (N, G D) each: in whole `STEP`s, or `most` where a pattern keeps no more."""
    kept = rounded(tokens, tokens + STEP if most is None else most)
    spec = StateTensor((kept, shape.key_value_heads * shape.head_width), shape.dtype)
    return {"k": spec, "v": spec}


def write(state: dict[str, Tensor], k: Tensor, v: Tensor, at: int) -> None:
    """Put k, v (C, G, D) at index `at` and on."""
    state["k"][at : at + len(k)] = k.flatten(1)
    state["v"][at : at + len(k)] = v.flatten(1)


def write_step(states: Sequence[dict[str, Tensor]], k: Tensor, v: Tensor, places: Sequence[int]) -> None:
    """Put one token of each of B sequences, k, v (B, G, D), at its place in its state."""
    rows = [state[name][at] for name in ("k", "v") for state, at in zip(states, places, strict=True)]
    torch._foreach_copy_(rows, [*k.flatten(1).unbind(), *v.flatten(1).unbind()])


def history(state: dict[str, Tensor], count: int, groups: int) -> Pair:
    """The first `count` keys and values of a state as views (G, n, D)."""
    k, v = (state[name][:count].unflatten(1, (groups, -1)) for name in ("k", "v"))
    return heads_first(k), heads_first(v)


def append(state: dict[str, Tensor], k: Tensor, v: Tensor, past: int) -> Pair:
    """Write k, v (C, G, D) behind the `past` tokens of a state that keeps all; returns all of them, (G, past + C, D)."""
    write(state, k, v, past)
    _clear(state, past, past + len(k))
    return history(state, past + len(k), k.shape[1])


def _clear(state: dict[str, Tensor], past: int, total: int) -> None:
    """Zero the values behind the last of `total` tokens up to the next whole `STEP`, unless that was done for `past`.

    A step multiplies them by zero, and what an empty tensor holds may be no number. A whole state filled with zeros would
    take its memory before there are tokens for it.
    """
    if past % STEP == 0 or past // STEP != (total - 1) // STEP:
        state["v"][total : rounded(total, len(state["v"]))] = 0.0


def put_step(states: Sequence[dict[str, Tensor]], k: Tensor, v: Tensor, past: Sequence[int]) -> None:
    """`append` of one token of each of B sequences, k, v (B, G, D)."""
    write_step(states, k, v, past)
    for state, at in zip(states, past, strict=True):
        _clear(state, at, at + 1)


def dense_workspace_bytes(shape: HeadShape, queries: int, keys: int, asking: int | None = None) -> int:
    """Peak temporaries of `dense`, the answer included. asking: how many of the queries go this way; None: all."""
    return _workspace_bytes(shape, queries, DENSE_ROWS, keys, asking=asking)


def step_workspace_bytes(shape: HeadShape, keys: int, runs: int = 1, logs: bool = False) -> int:
    """Peak temporaries of `step` of one sequence that looks at `keys` keys in several runs, the answer included."""
    heads, size, width = shape.query_heads, shape.itemsize, shape.key_value_heads * shape.head_width
    scores = heads * keys * (2 * size + (8 if logs else 0))
    stack = keys * width * size if runs > 1 else 0
    scratch = 0 if size >= 4 else max(100 * width, min(256 * keys, 3 << 16))  # oneDNN's, about
    return heads * (2 * width + shape.head_width) * size + scores + stack + scratch


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
    return answer + block * (widest + width) * size + gather + 2 * tight + part + totals + scratch_bytes(shape)


def scratch_bytes(shape: HeadShape) -> int:
    """About what oneDNN takes beside, which multiplies what is narrower than float32."""
    return 0 if shape.itemsize >= 4 else 3 << 17


def band_workspace_bytes(shape: HeadShape, queries: int, keys: int, before: int, ahead: int, free: int) -> int:
    """Peak temporaries of `band`, the answer included, for `queries` tokens at the end of `keys` others and themselves."""
    wide = before + ROWS + ahead
    seen = min(keys, before + min(queries, ROWS) + ahead + free)
    fitting = columns(shape.query_heads, shape.itemsize) // (wide + free)
    early = max(0, before + free - (keys - queries)) + ROWS - 1  # queries of blocks that reach before the first key
    whole = (queries - early // ROWS * ROWS - ahead) // ROWS  # blocks whose keys all lie within the sequence
    return _workspace_bytes(shape, queries, ROWS, seen, gathered=True, together=max(1, min(fitting, whole)), free=free)
