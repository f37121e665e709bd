"""Keys and values in a state: where each position stands, how tokens are put there, and how they are read back.

A state keeps "k" and "v", (kept, G D) each. In 8 bits they are int8, each head's scale behind it, and D + 4 stands in the place
of D in all shapes here (`kernels/int8.py`). Where a pattern keeps all, position p stands at index p. Where it forgets, a `Ring`
tells: the first positions stay for good, all later ones take turns behind them.

    Ring(first=2, length=4), positions 0 to 8 written:    [0][1] [6][7][8][5]
                                                          first   the ring
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attention.pool import StateTensor
from attention.shapes import HeadShape

STEP = 256  # a state that keeps all grows by so many tokens: a decode step in torch looks at multiples of it
Pair = tuple[Tensor, Tensor]  # keys and values, (N, G, D) each


def rounded(count: int, most: int) -> int:
    """The next whole `STEP`, or `most`."""
    return min(-(-count // STEP) * STEP, most)


def whole(count: int) -> int:
    """Keys that stand in a state that keeps all of `count` tokens."""
    return rounded(count, count + STEP)


def keys_and_values(shape: HeadShape, tokens: int, most: int | None = None) -> dict[str, StateTensor]:
    """Room for `tokens` tokens: in whole `STEP`s, or `most` where a pattern keeps no more."""
    kept = whole(tokens) if most is None else rounded(tokens, most)
    spec = StateTensor((kept, shape.key_value_heads * shape.kept_width), shape.kept_dtype)
    return {"k": spec, "v": spec}


def read(state: dict[str, Tensor], count: int, groups: int) -> Pair:
    """The first `count` keys and values of a state as views (N, G, D)."""
    k, v = (state[name][:count].unflatten(1, (groups, -1)) for name in ("k", "v"))
    return k, v


def append(state: dict[str, Tensor], k: Tensor, v: Tensor, past: int) -> Pair:
    """Write k, v (C, G, D) behind the `past` tokens of a state that keeps all; returns all of them, (past + C, G, D)."""
    _write(state, k, v, past)
    _clear(state, past, past + len(k))
    return read(state, past + len(k), k.shape[1])


def carry(state: dict[str, Tensor], into: dict[str, Tensor], tokens: int) -> None:
    """Write the first `tokens` keys and values of a state that keeps all into another, as if they were appended there."""
    for name in ("k", "v"):
        into[name][:tokens] = state[name][:tokens]
    _clear(into, 0, tokens)


def cut(state: dict[str, Tensor], first: int, last: int) -> None:
    """Take what stands at indices first..last out of a state: keys are not looked at there, values weighed by 0."""
    state["v"][first:last] = 0


def append_step(states: Sequence[dict[str, Tensor]], k: Tensor, v: Tensor, past: Sequence[int]) -> None:
    """`append` of one token of each of B sequences, k, v (B, G, D)."""
    for state, at in zip(states, past, strict=True):  # first: several of them may be of one state
        _clear(state, at, at + 1)
    put(states, k, v, past)


def put(states: Sequence[dict[str, Tensor]], k: Tensor, v: Tensor, places: Sequence[int]) -> None:
    """Write one token of each of B sequences, k, v (B, G, D), at its place in its state."""
    rows = [state[name][at] for name in ("k", "v") for state, at in zip(states, places, strict=True)]
    torch._foreach_copy_(rows, [*k.flatten(1).unbind(), *v.flatten(1).unbind()])


@dataclass(frozen=True)
class Ring:
    """The first `first` positions of a sequence for good, and of all later ones the last `length`."""

    first: int
    length: int

    @property
    def size(self) -> int:
        """Positions that it keeps."""
        return self.first + self.length

    def place(self, position: int) -> int:
        """The index of a position."""
        return position if position < self.first else self.first + (position - self.first) % self.length

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(index, position, count) of positions start..end, as runs of neighbours in the state."""
        while start < end:
            at = self.place(start)
            count = min(end - start, (self.first if at < self.first else self.size) - at)
            yield at, start, count
            start += count

    def state(self, shape: HeadShape, tokens: int) -> dict[str, StateTensor]:
        """Room for what it keeps of `tokens` tokens. Values begin as zeros: a step may weigh by 0 what is not there yet."""
        kept = keys_and_values(shape, tokens, self.size)
        return {"k": kept["k"], "v": replace(kept["v"], fill=0.0)}

    def write(self, state: dict[str, Tensor], k: Tensor, v: Tensor, past: int) -> None:
        """Put new tokens (C, G, D) at positions `past` and on: those of the first, and the last that the ring keeps."""
        total = past + len(k)
        last = max(past, self.first, total - self.length)
        for start, end in ((past, min(self.first, total)), (last, total)):
            for at, position, count in self.runs(start, end):
                new = slice(position - past, position - past + count)
                _write(state, k[new], v[new], at)

    def in_order(self, state: dict[str, Tensor], k: Tensor, v: Tensor, base: int, past: int) -> Pair:
        """Positions `base` and on, (N, G, D): those before `past` from the state, then new ones (C, G, D), not written yet."""
        return self._in_order(state["k"], k, base, past), self._in_order(state["v"], v, base, past)

    def _in_order(self, kept: Tensor, new: Tensor, base: int, past: int) -> Tensor:
        old = [kept[at : at + count].view(count, *new.shape[1:]) for at, _, count in self.runs(base, past)]
        new = new[max(base - past, 0) :]
        return torch.cat([*old, new]) if old else new


def _write(state: dict[str, Tensor], k: Tensor, v: Tensor, at: int) -> None:
    """Put k, v (C, G, D) at index `at` and on."""
    state["k"][at : at + len(k)] = k.flatten(1)
    state["v"][at : at + len(k)] = v.flatten(1)


def _clear(state: dict[str, Tensor], past: int, total: int) -> None:
    """Zero the values behind the last of `total` tokens up to the next whole `STEP`, unless that was done for `past`.

    A step multiplies them by zero, and what an empty tensor holds may be no number. A whole state filled with zeros would
    take its memory before there are tokens for it.
    """
    if past % STEP == 0 or past // STEP != (total - 1) // STEP:
        state["v"][total : rounded(total, len(state["v"]))] = 0
