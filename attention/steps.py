"""Several tokens of a sequence by single steps: what a decode step would have answered to each, bit for bit, in one call.

So a guess of the tokens to come is looked over (speculative decoding, Leviathan et al., arXiv 2211.17192, whose draft here is
a text): the model reads all of them at once, and what is wrong is taken back (`StatePool.take_back`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from attention.parts import Parts
from attention.pool import Undo
from attention.shapes import Segments

if TYPE_CHECKING:
    from attention.interface import AttentionBackend

State = dict[str, Tensor]


def through(
    backend: AttentionBackend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    states: Sequence[State],
    undo: Sequence[Undo],
    out: Tensor,
) -> Parts:
    """Answer q (T, H, D), k and v (T, G, D) into `out` (T, H, D) by steps, pausing between them.

    Where the tokens only add to their states, all of them in one step; else one token of each sequence after the other, what
    all but its first write over being kept in its `undo`.
    """
    spans = enumerate(segments.spans())
    rows = [[(index, at, past + at - start) for at in range(start, end)] for index, (start, end, past) in spans]
    if not any(backend.touched(states[index], position) for own in rows for index, _, position in own[1:]):
        every = [row for own in rows for row in own]
        backend.step(q, k, v, [position for *_, position in every], [states[index] for index, *_ in every], out)
        return
    for depth in range(max(segments.lengths)):
        deep = [own[depth] for own in rows if depth < len(own)]
        for index, _, position in deep if depth else ():
            undo[index].keep(position, backend.touched(states[index], position))
        places, past = [at for _, at, _ in deep], [position for *_, position in deep]
        step(backend, q, k, v, places, past, [states[index] for index, *_ in deep], out)
        yield


def step(
    backend: AttentionBackend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Sequence[int],
    past: Sequence[int],
    states: Sequence[State],
    out: Tensor,
) -> None:
    """A step of some rows of a batch: one `past` and one state for each."""
    if len(rows) == 1:
        own = slice(rows[0], rows[0] + 1)
        backend.step(q[own], k[own], v[own], past, states, out[own])
        return
    index, answers = list(rows), out.new_empty(len(rows), *out.shape[1:])
    backend.step(q[index], k[index], v[index], past, states, answers)
    out[index] = answers
