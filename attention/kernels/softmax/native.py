"""The softmax kernel in C, for CPUs with AVX-512: what `softmax.c` needs to be told. `torch.py` is its slow reading.

A score never leaves the core that computed it and keys are read where they lie, so attention runs near the rate at which the
cores multiply, and a decode step near the rate at which memory is read. What a step or a block answers depends on its own keys
alone: not on the batch, the threads, or how keys were cut into calls.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from attention.history import Pair
from attention.kernels import LOG2_E
from attention.kernels.library import (
    ANSWER,
    FAR,
    HERE,
    INT,
    NUMBER,
    POINTER,
    Kernel,
    Told,
    floats,
    is_by_team,
    no_heads,
    numbers,
    packing,
    room,
    rooms,
    threads,
    view,
    views,
)
from attention.kernels.softmax import Blocks, Rows, Runs, Seen
from attention.kernels.softmax.capped import Capped
from attention.parts import Parts, spread
from attention.shapes import HeadShape

ROWS = 512  # queries that share a call, and a carry
BLOCK = 256  # at most so many of them are one thread's task; their keys are packed once
PART_FLOPS = 2 << 27  # per thread and call: two thirds of a millisecond
PART = 256  # keys of a history that one thread takes at a time, as in softmax.c
ASKING = 48  # queries that choose in one thread's task, as in softmax.c
SOURCE_WORDS, RUN_WORDS, BLOCK_WORDS, HISTORY_WORDS, ROWS_WORDS, STATE_WORDS = 16, 5, 5, 9, 4, 10  # of a row of a table

_Run = tuple[int, int, int, int, bool]  # source, first, count, position, free: see softmax.c
_Block = tuple[int, int, int, Sequence[_Run]]  # first and last query, the first one's position, what they may see


class Call(ctypes.Structure):
    """`Call` of softmax.c."""

    _fields_ = [
        *views("q", "out"),
        *rooms("log_total", "carry"),
        *numbers("queries", "heads", "groups", "width", "before", "ahead", "call", "calls", "wide", "eight"),
        *floats("scale", "cap"),
    ]


class Step(ctypes.Structure):
    """`Step` of softmax.c."""

    _fields_ = [
        *views("q"),
        *rooms("out", "log_total", "parts"),
        *numbers("sequences", "heads", "groups", "width", "wide", "eight"),
        *floats("scale", "cap"),
    ]


class Steps(ctypes.Structure):
    """`Steps` of softmax.c."""

    _fields_ = [
        *rooms("histories", "starts", "states", "parts", "log_total"),
        *numbers("count", "layers", "sequences", "heads", "groups", "width", "wide", "eight"),
        *floats("scale", "cap"),
    ]


class Choice(ctypes.Structure):
    """`Choice` of softmax.c."""

    _fields_ = [
        *views("q", "out"),
        *rooms("log_total", "chosen"),
        *numbers("queries", "heads", "groups", "width", "block", "best", "window", "sinks", "wide", "eight"),
        *floats("scale"),
    ]


KERNEL = Kernel(
    HERE,
    "softmax_layout",
    {
        "attend": (POINTER, POINTER, NUMBER, POINTER, NUMBER, POINTER, NUMBER, INT, INT),
        "step": (POINTER, POINTER, NUMBER, POINTER, NUMBER, INT),
        "step_layer": ANSWER,
        "choose": (POINTER, POINTER, NUMBER, POINTER, NUMBER, INT),
        "chosen": (POINTER, POINTER, NUMBER, POINTER, NUMBER, INT),
    },
    (8, SOURCE_WORDS, RUN_WORDS, BLOCK_WORDS, HISTORY_WORDS, ROWS_WORDS, STATE_WORDS),
    (Call, Step, Steps, Choice),
)
_call, _step, _steps, _choice = packing(Call), packing(Step), packing(Steps), packing(Choice)


def obstacle(shape: HeadShape) -> str | None:
    """Why this kernel cannot answer heads of a shape here; None when it can."""
    return KERNEL.obstacle(shape.dtype, shape.device, no_heads(shape))


def dense(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    past: int,
    causal: bool,
    out: Tensor,
    log_total: Tensor | None = None,
    *,
    cap: float = 0.0,
) -> Parts:
    """`Softmax.dense`; cap: a score s is weighed as cap tanh(s / cap), 0: as it is. The slow reading of caps is `capped.py`."""
    runs = [(0, 0, len(keys), 0, False)]
    each = ((a, b, past + a, runs) for a, b in spread(0, len(q), _rows(keys.shape[1])))
    yield from _attend(q, [(keys, values)], each, FAR, 0 if causal else FAR, out, log_total, cap)


def band(
    q: Tensor,
    near: Pair,
    free: Pair,
    at: int,
    before: int,
    ahead: int,
    out: Tensor,
    log_total: Tensor | None = None,
    *,
    cap: float = 0.0,
) -> Parts:
    """`Softmax.band`; cap: as of `dense`."""
    extra = len(free[0])
    runs = [(0, 0, extra, -extra, True), (1, 0, len(near[0]), 0, False)]
    each = ((a, b, at + a, runs) for a, b in spread(0, len(q), _rows(near[0].shape[1])))
    yield from _attend(q, [free, near], each, before, ahead, out, log_total, cap)


def pattern(q: Tensor, keys: Tensor, values: Tensor, past: int, causal: bool, seen: Seen, out: Tensor) -> Parts:
    """`Softmax.pattern`."""

    def each() -> Iterator[_Block]:
        first = 0
        for last, runs in seen:
            keys_seen = [(0, a, b - a, a, False) for a, b in runs]
            for a, b in spread(first, last, _rows(keys.shape[1])):
                yield a, b, past + a, keys_seen
            first = last

    yield from _attend(q, [(keys, values)], each(), FAR, 0 if causal else FAR, out)


def step(
    q: Tensor,
    states: Sequence[dict[str, Tensor]],
    counts: Sequence[int],
    groups: int,
    out: Tensor,
    log_total: Tensor | None = None,
    runs: Sequence[Runs] | None = None,
    *,
    cap: float = 0.0,
) -> None:
    """`Softmax.step`; cap: as of `dense`."""
    _, heads, width = q.shape
    histories, parts = array("q"), 0
    for index, state in enumerate(states):
        k, v = state["k"], state["v"]
        kept, columns = k.shape
        where = (index, k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0), min(kept, len(v)), columns)
        parts += _seek(histories, where, counts[index], None if runs is None else runs[index])
    number = len(histories) // HISTORY_WORDS
    starts = array("q", bytes(8 * (number + 1)))
    scratch = torch.empty(parts * heads * (width + 2), dtype=torch.float32)
    q = q if q.stride(1) == width else q.contiguous()
    call = _step(
        *view(q),
        *room(out),
        *room(log_total),
        scratch.data_ptr(),
        4 * len(scratch),
        len(q),
        heads,
        groups,
        width,
        q.dtype == torch.float32,
        bool(states) and states[0]["k"].dtype == torch.int8,
        LOG2_E / math.sqrt(width),
        LOG2_E * cap,
    )
    tables = histories.buffer_info()[0], number, starts.buffer_info()[0], 8 * len(starts)
    KERNEL.call("step", call, *tables, threads())


def told(
    shape: HeadShape,
    states: Sequence[dict[str, Tensor]],
    places: Sequence[int],
    counts: Sequence[int],
    runs: Sequence[Runs] | None = None,
    log_total: Tensor | None = None,
    *,
    cap: float = 0.0,
) -> Told | None:
    """`Softmax.told`; cap: as of `dense`."""
    heads, groups, width = shape.query_heads, shape.key_value_heads, shape.head_width
    histories, table, parts = array("q"), array("q"), 0
    for index, (state, place) in enumerate(zip(states, places, strict=True)):
        k, v = state["k"], state["v"]
        if k.dtype != shape.kept_dtype or v.dtype != shape.kept_dtype:
            return None
        (layers, kept, columns), (k_layer, k_row, _), (v_layer, v_row, _) = k.shape, k.stride(), v.stride()
        kept = min(kept, v.shape[1])
        table.extend((k.data_ptr(), v.data_ptr(), k.nbytes, v.nbytes, k_layer, v_layer, k_row, v_row, kept, place))
        own = None if runs is None else runs[index]
        parts += _seek(histories, (index, 0, 0, 0, 0, kept, columns), counts[index], own)
    number, scratch = len(histories) // HISTORY_WORDS, torch.empty(parts * heads * (width + 2), dtype=torch.float32)
    starts = array("q", bytes(8 * (number + 1)))
    memory = [part for x in (histories, starts, table) for part in (x.buffer_info()[0], 8 * len(x))]
    sizes = number, layers, len(states), heads, groups, width, shape.dtype == torch.float32, shape.kv is not None
    call = _steps(*memory, *room(scratch), *room(log_total), *sizes, LOG2_E / math.sqrt(width), LOG2_E * cap)
    return Told(KERNEL.address("step_layer"), call, (histories, starts, table, scratch, states, log_total))


def _seek(histories: array[int], where: Sequence[int], left: int, runs: Runs | None) -> int:
    """Add the histories of a sequence to a table, `left` keys along its runs. Returns their parts."""
    parts = 0
    for first, last in ((0, left),) if runs is None else runs:
        taken = min(left, last - first)
        histories.extend((*where, first, taken))
        left, parts = left - taken, parts + -(-taken // PART)
    return parts


def choose(q: Tensor, bounds: Sequence[Pair], rows: Sequence[Rows], blocks: Blocks) -> Tensor:
    """`Softmax.choose`."""
    table = torch.empty(len(q), bounds[0][0].shape[1], blocks.best, dtype=torch.int32)
    _choose("choose", q, bounds, rows, blocks, table)
    return table


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
    _choose("chosen", q, sequences, rows, blocks, table, out, log_total)


def _choose(
    function: str,
    q: Tensor,
    sources: Sequence[Pair],
    rows: Sequence[Rows],
    blocks: Blocks,
    table: Tensor,
    out: Tensor | None = None,
    log_total: Tensor | None = None,
) -> None:
    """One of the two functions in C that are about choices."""
    tasks = array("q")
    for first, last, position, source in rows:
        for a, b in spread(first, last, ASKING):
            tasks.extend((a, b, position + a - first, source))
    pairs = array("q", chain.from_iterable((*view(k), *view(v)) for k, v in sources))
    count, heads, width = q.shape
    kinds = q.dtype == torch.float32, sources[0][0].dtype == torch.int8
    numbers = blocks.size, blocks.best, min(blocks.window, FAR), min(blocks.sinks, FAR), *kinds
    told = _choice(
        *(*view(q), *view(out), *room(log_total), *room(table), count, heads, sources[0][0].shape[1], width, *numbers),
        LOG2_E / math.sqrt(width),
    )
    tables = pairs.buffer_info()[0], len(sources), tasks.buffer_info()[0], len(tasks) // ROWS_WORDS
    KERNEL.call(function, told, *tables, threads())


def edge(shape: HeadShape) -> int:
    """`Softmax.edge`."""
    return ROWS + 1


def dense_bytes(shape: HeadShape, queries: int, keys: int, asking: int | None = None) -> int:
    """`Softmax.dense_bytes`. A thread's own scratch is on its stack."""
    heads, width = shape.query_heads, shape.head_width
    rows = min(queries if asking is None else asking, ROWS)
    return queries * heads * width * shape.itemsize + rows * heads * (width + 2) * 4


def step_bytes(shape: HeadShape, keys: int, runs: int = 1, logs: bool = False) -> int:
    """`Softmax.step_bytes`."""
    heads, width, parts = shape.query_heads, shape.head_width, -(-keys // PART) + runs - 1
    return heads * width * shape.itemsize + parts * heads * (width + 2) * 4


def band_bytes(shape: HeadShape, queries: int, keys: int, before: int, ahead: int, free: int) -> int:
    """`Softmax.band_bytes`."""
    return dense_bytes(shape, queries, keys)


def pattern_bytes(shape: HeadShape, queries: int, seen: Seen) -> int:
    """`Softmax.pattern_bytes`."""
    return dense_bytes(shape, queries, 0)


def chosen_bytes(shape: HeadShape, queries: int, blocks: Blocks, candidates: int) -> int:
    """`Softmax.chosen_bytes`."""
    return queries * shape.key_value_heads * blocks.best * 4


class NativeCapped(Capped):
    """This kernel for one cap, as `Capped`, which is its slow reading."""

    def dense(self, *args: Any, **kwargs: Any) -> Parts:
        return dense(*args, **kwargs, cap=self.cap)

    def band(self, *args: Any, **kwargs: Any) -> Parts:
        return band(*args, **kwargs, cap=self.cap)

    def step(self, *args: Any, **kwargs: Any) -> None:
        step(*args, **kwargs, cap=self.cap)

    def told(self, *args: Any, **kwargs: Any) -> Told | None:
        return told(*args, **kwargs, cap=self.cap)

    edge = staticmethod(edge)
    dense_bytes = staticmethod(dense_bytes)
    band_bytes = staticmethod(band_bytes)
    step_bytes = staticmethod(step_bytes)


def _rows(groups: int) -> int:
    """Queries of a task, so that a call has two or more for each thread."""
    tasks = -(-2 * threads() // groups)
    return min(BLOCK, max(64, ROWS // tasks))


def _attend(
    q: Tensor,
    sources: Sequence[Pair],
    blocks: Iterable[_Block],
    before: int,
    ahead: int,
    out: Tensor,
    log_total: Tensor | None = None,
    cap: float = 0.0,
) -> Parts:
    """Answer blocks of queries, pausing behind each call; what would take long is cut along the keys into several."""
    total, heads, width = q.shape
    carry = torch.empty(min(total, ROWS) * heads * (width + 2), dtype=torch.float32)
    table = array("q")
    for k, v in sources:
        table.extend((*view(k), *view(v)))
    workers, shape = threads(), (heads, sources[0][0].shape[1], width)
    kinds = q.dtype == torch.float32, sources[0][0].dtype == torch.int8
    near, far = min(before, FAR), min(ahead, FAR)
    for batch in _batches(blocks):
        first, last = batch[0][0], batch[-1][1]
        pairs = sum((b - a) * sum(_seen(run, b - a, at, near, far) for run in runs) for a, b, at, runs in batch)
        calls = max(1, round(4 * heads * width * pairs / (PART_FLOPS * workers)))
        rows, runs = array("q"), array("q")
        for a, b, at, own in batch:
            number = len(runs) // RUN_WORDS
            rows.extend((a - first, b - first, at, number, number + len(own)))
            for run in own:
                runs.extend(run)
        logs = None if log_total is None else log_total[first:last]
        told = (*view(q[first:last]), *view(out[first:last]), *room(logs), *room(carry))
        scale = LOG2_E / math.sqrt(width)
        tables = [
            (x.buffer_info()[0], len(x) // words)
            for x, words in ((table, SOURCE_WORDS), (rows, BLOCK_WORDS), (runs, RUN_WORDS))
        ]
        for index in range(calls):
            call = _call(*told, last - first, *shape, near, far, index, calls, *kinds, scale, LOG2_E * cap)
            KERNEL.call("attend", call, *chain(*tables), workers, is_by_team())
            yield


def _seen(run: _Run, count: int, at: int, before: int, ahead: int) -> int:
    """Keys of a run that `count` queries from position `at` on may see."""
    _, _, keys, position, free = run
    start = 0 if free else max(0, at - position - before)
    return max(0, min(keys, at - position + count + ahead) - start)


def _batches(blocks: Iterable[_Block]) -> Iterator[list[_Block]]:
    """Consecutive blocks of ROWS queries together, at most."""
    batch: list[_Block] = []
    for block in blocks:
        if batch and block[1] - batch[0][0] > ROWS:
            yield batch
            batch = []
        batch.append(block)
    if batch:
        yield batch
