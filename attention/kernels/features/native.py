"""Attention through features in C, for CPUs with AVX-512: what `features.c` needs to be told. Its slow reading: `torch.py`."""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Sequence
from itertools import chain
from struct import Struct

import torch
from torch import Tensor

from attention.history import Pair
from attention.kernels.features import CHUNK, LIMIT, Sums
from attention.kernels.library import (
    ANSWER,
    HERE,
    INT,
    NUMBER,
    POINTER,
    Kernel,
    Told,
    floats,
    no_heads,
    numbers,
    packing,
    room,
    rooms,
    threads,
    view,
    views,
)
from attention.parts import Parts, spread
from attention.shapes import HeadShape

ROWS = 512  # tokens of a call
MOST_FEATURES = 4096  # what the kernel's own memory is made for
STATE_WORDS = 4  # words of a row of a table


class Call(ctypes.Structure):
    """`Features` of features.c."""

    _fields_ = [
        *views("q", "k", "v", "out"),
        *rooms("weights", "sums", "level", "added", "keys", "room", "near"),
        *numbers("tokens", "heads", "groups", "width", "count", "wide", "adds", "asks"),
        *floats("half", "limit", "log_count"),
    ]


class Step(ctypes.Structure):
    """`FeaturesStep` of features.c."""

    _fields_ = [
        *views("q", "k", "v"),
        *rooms("out", "weights", "features", "near"),
        *numbers("sequences", "heads", "groups", "width", "count", "wide", "adds"),
        *floats("half", "limit", "log_count"),
    ]


class Steps(ctypes.Structure):
    """`FeaturesSteps` of features.c."""

    _fields_ = [
        ("step", Step),
        *rooms("states", "own"),
        *numbers("layers"),
        ("answer", POINTER),
        ("told", POINTER),
    ]


KERNEL = Kernel(
    HERE,
    "features_layout",
    {"features": (POINTER, INT), "features_step": (POINTER, POINTER, NUMBER, INT), "features_layer": ANSWER},
    (8, STATE_WORDS),
    (Call, Step, Steps),
)
_call, _step = packing(Call), packing(Step)
_layers = Struct("7q").pack  # what `Steps` has behind its step


def obstacle(shape: HeadShape, count: int) -> str | None:
    """Why this kernel cannot answer heads of a shape through `count` features here; None when it can."""
    limits = no_heads(shape)
    if not limits and (count % 32 or count > MOST_FEATURES):
        limits = f"a multiple of 32 features up to {MOST_FEATURES}; these are {count}"
    return KERNEL.obstacle(shape.dtype, shape.device, limits)


class Features:
    """`features.Features`."""

    def __init__(self, weights: Tensor | None, half: float, shape: HeadShape) -> None:
        self.shape = shape
        self.count = shape.head_width if weights is None else weights.shape[1]
        self.half = half
        self._words = weights  # of bfloat16, neighbouring rows side by side, (D / 2, m, 2)
        if weights is not None and weights.dtype == torch.bfloat16:
            self._words = weights.view(-1, 2, self.count).transpose(1, 2).contiguous()
        self._told_last = half, LIMIT, math.log2(self.count)

    def scan(self, q: Tensor, k: Tensor, v: Tensor, sums: Sums, out: Tensor) -> Parts:
        return self._many((q, out), (k, v), sums)

    def both_sides(self, q: Tensor, k: Tensor, v: Tensor, sums: Sums, out: Tensor) -> Parts:
        yield from self._many(None, (k, v), sums)
        yield from self._many((q, out), None, sums)

    def absorb(self, k: Tensor, v: Tensor, sums: Sums) -> Parts:
        return self._many(None, (k, v), sums)

    def join(self, q: Tensor, sums: Sums, near: Tensor, out: Tensor) -> Parts:
        return self._many((q, out), None, sums, near)

    def step(self, q: Tensor, k: Tensor, v: Tensor, states: Sequence[dict[str, Tensor]], out: Tensor) -> None:
        self._one(q, (k, v), states, out)

    def join_step(self, q: Tensor, states: Sequence[dict[str, Tensor]], near: Tensor, out: Tensor) -> None:
        self._one(q, None, states, out, near)

    def told(self, states: Sequence[dict[str, Tensor]], near: Tensor | None = None, other: Told | None = None) -> Told | None:
        shape, sums, count = self.shape, array("q"), len(states)
        for state in states:
            sums.extend((*room(state["s"]), *room(state["level"])))
        own = array("q", bytes(8 * len(sums)))
        scratch = torch.empty(count * (shape.query_heads + shape.key_value_heads) * self.count, dtype=torch.float32)
        rooms = 0, 0, *room(self._words), *room(scratch), *room(near)
        step = _step(*view(None) * 3, *rooms, *self._sizes(count, near is None), *self._told_last)
        answer, address = (0, 0) if other is None else other.addresses
        memory = [part for x in (sums, own) for part in (x.buffer_info()[0], 8 * len(x))]
        call = step + _layers(*memory, len(states[0]["s"]), answer, address)
        return Told(KERNEL.address("features_layer"), call, (sums, own, scratch, states, near, other))

    def _sizes(self, sequences: int, adds: bool) -> tuple[int, ...]:
        """The numbers of a step's struct."""
        shape = self.shape
        numbers = sequences, shape.query_heads, shape.key_value_heads, shape.head_width, self.count
        return *numbers, shape.dtype == torch.float32, adds

    def attend_bytes(self, queries: int, causal: bool) -> int:
        shape = self.shape
        answer = queries * shape.query_heads * shape.head_width * shape.itemsize
        step = 4 * (shape.query_heads + shape.key_value_heads) * self.count
        return answer + (step if queries == 1 else self.absorb_bytes(queries))

    def absorb_bytes(self, tokens: int) -> int:
        return 4 * sum(self._scratch(min(tokens, ROWS), adds=True))

    def join_bytes(self, tokens: int) -> int:
        if tokens == 1:
            return 4 * (self.shape.query_heads + self.shape.key_value_heads) * self.count
        return 4 * sum(self._scratch(min(tokens, ROWS), adds=False))

    def _many(self, asking: Pair | None, adding: Pair | None, sums: Sums, near: Tensor | None = None) -> Parts:
        """Queries and their answers, (C, H, D) each, keys and values, (C, G, D) each, or both, in calls of ROWS tokens."""
        q, out = asking or (None, None)
        k, v = adding or (None, None)
        given = next(x for x in (q, k) if x is not None)
        tokens, groups, workers = len(given), len(sums.s), threads()
        heads, width = groups if q is None else q.shape[1], given.shape[2]
        scratch = [torch.empty(size, dtype=torch.float32) for size in self._scratch(min(tokens, ROWS), adding is not None)]
        kept = [*room(self._words), *room(sums.s), *room(sums.level), *chain(*map(room, scratch))]
        rest = heads, groups, width, self.count, given.dtype == torch.float32, adding is not None, asking is not None
        for first, last in spread(0, tokens, ROWS):
            q_, k_, v_, out_, near_ = (None if x is None else x[first:last] for x in (q, k, v, out, near))
            tensors = chain(*map(view, (q_, k_, v_, out_)))
            call = _call(*tensors, *kept, *room(near_), last - first, *rest, *self._told_last)
            KERNEL.call("features", call, workers)
            yield

    def _scratch(self, tokens: int, adds: bool) -> tuple[int, int, int]:
        """Words of scratch for `tokens` tokens: what chunks add, their keys' features, and room of all threads."""
        groups, width = self.shape.key_value_heads, self.shape.head_width
        chunks, words = -(-tokens // CHUNK) if adds else 0, self.count * self.shape.itemsize // 4
        return (
            chunks * groups * (width + 1) * self.count,
            chunks * groups * words * CHUNK,
            2 * max(CHUNK, width) * words * threads(),
        )

    def _one(
        self, q: Tensor, adding: Pair | None, states: Sequence[dict[str, Tensor]], out: Tensor, near: Tensor | None = None
    ) -> None:
        """One query of each of B sequences, (B, H, D), and keys and values where they are added, (B, G, D)."""
        (sequences, heads, width), groups = q.shape, len(states[0]["s"])
        q, k, v = (x if x is None or x.stride(1) == width else x.contiguous() for x in (q, *(adding or (None, None))))
        scratch = torch.empty(sequences * (heads + groups) * self.count, dtype=torch.float32)
        call = _step(
            *view(q),
            *view(k),
            *view(v),
            *room(out),
            *room(self._words),
            *room(scratch),
            *room(near),
            *self._sizes(sequences, adding is not None),
            *self._told_last,
        )
        sums = array("q")
        for state in states:
            s, level = state["s"], state["level"]  # tight, as all state is
            sums.extend((s.data_ptr(), s.nbytes, level.data_ptr(), level.nbytes))
        KERNEL.call("features_step", call, sums.buffer_info()[0], len(states), threads())
