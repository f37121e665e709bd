"""A streaming softmax over pieces of keys, the inside of the reading in torch.

The scores of one piece exist at a time, so a block of queries costs rows x piece of workspace, never L x L, and stays in the
caches.

Source: the streaming softmax of Milakov and Gimelshein (arXiv 1805.02867) and Rabe and Staats (arXiv 2112.05682), with one
change. Their running maximum only keeps exp from leaving the floats' range, and costs two passes over the scores. Here
2^s is taken unshifted first and each row's sum tells afterwards whether that was sound (`is_sound`); a row that was not is
answered again with the running maximum. The answers are those of softmax either way.

Keys and values are copied into tight (G, N, D) blocks before their products: oneDNN, which multiplies bfloat16 on CPU,
otherwise makes copies of its own, and that of the keys, transposed, costs as much as the product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention.kernels import LOG2_E
from attention.parts import Parts, spread

# A row sum between these shows that no 2^s overflowed, and that what underflowed (below 2^-126) was at most 2^-66 of the row.
SOUND = (2.0**-60, 2.0**100)
PIECE_BYTES = 2 << 20  # per thread; the scores of a piece should stay near the cores between the two products


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


def columns(heads: int, itemsize: int, rows: int) -> int:
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


def query_rows(q: Tensor, heads: int, together: int = 1) -> Tensor:
    """(bC, H, D) to (G b, RC, D), tight: of each of b blocks the R query heads of a group one behind the other."""
    return _by_group(q, heads, together).contiguous().view(heads * together, -1, q.shape[-1])


def tokens_first(rows: Tensor, count: int) -> Tensor:
    """A view of (G, RC, d) as (C, H, d): `query_rows` back, of one block of `count` tokens."""
    return rows.reshape(-1, count, rows.shape[-1]).transpose(0, 1)


def _by_group(x: Tensor, groups: int, together: int) -> Tensor:
    """A view of (bC, H, D) as (G, b, R, C, D)."""
    return x.view(together, -1, groups, x.shape[1] // groups, x.shape[2]).permute(2, 0, 3, 1, 4)


def answer(
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


def _wide(x: Tensor) -> torch.dtype:
    """The dtype in which sums over pieces are kept: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)
