"""The softmax kernel of `blocks.py`, and attention through features, in C for CPUs with AVX-512: chosen by a backend's `impl`.

`csrc` computes, built at install; here is what it needs to be told. A score never leaves the core that computed it and keys
are read where they lie, so attention runs near the rate at which the cores multiply, and a decode step near the rate at which
memory is read. `dense`, `band` and `step` are those of `implementation.Softmax`; `blocks.py` is their slow reading.

What a step or a block answers depends on its own keys alone: not on the batch, the threads, or how keys were cut into calls.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from attention.blocks import LOG2_E, Pair, Runs, spread
from attention.interface import HeadShape, Parts

ROWS = 512  # queries that share a call, and a carry
BLOCK = 256  # at most so many of them are one thread's task; their keys are packed once
PART_FLOPS = 2 << 27  # per thread and call: two thirds of a millisecond
PART = 256  # keys of a history that one thread takes at a time, as in softmax.c
CHUNK = 128  # tokens that meet their own triangle of random features, as in features.c
WIDEST, MOST_HEADS, MOST_FEATURES = 256, 128, 4096  # what the kernel's own memory is made for
FREE = 1 << 40  # a distance that binds nothing
WORDS = {torch.float32: 1, torch.bfloat16: 2}  # the dtypes, by the bits with which softmax.c names them

_Run = tuple[int, int, int, int, bool]  # source, first, count, position, free: see softmax.c
_Block = tuple[int, int, int, Sequence[_Run]]  # first and last query, the first one's position, what they may see


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "out", "log_total", "carry")),
        *((name, ctypes.c_int64) for name in ("q_row", "q_head", "out_row", "out_head", "queries", "heads", "groups", "width")),
        *((name, ctypes.c_int64) for name in ("before", "ahead", "call", "calls", "wide")),
        ("scale", ctypes.c_float),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "out", "log_total", "parts")),
        *((name, ctypes.c_int64) for name in ("q_row", "heads", "groups", "width", "wide")),
        ("scale", ctypes.c_float),
    ]


class _Features(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "weights")),
        *((name, ctypes.c_void_p) for name in ("sums", "level", "added", "keys", "levels", "room")),
        *((name, ctypes.c_int64) for name in ("q_row", "q_head", "k_row", "k_head", "v_row", "v_head", "out_row", "out_head")),
        *((name, ctypes.c_int64) for name in ("tokens", "heads", "groups", "width", "count", "wide", "room_words")),
        *((name, ctypes.c_int64) for name in ("adds", "asks")),
        ("near", ctypes.c_void_p),
        *((name, ctypes.c_float) for name in ("half", "reach", "limit", "log_count")),
    ]


class _FeaturesStep(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "weights", "features")),
        *((name, ctypes.c_int64) for name in ("q_row", "k_row", "v_row")),
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "groups", "width", "count", "wide", "adds")),
        ("near", ctypes.c_void_p),
        *((name, ctypes.c_float) for name in ("half", "reach", "limit", "log_count")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, None where the package was installed without a C compiler."""
    beside = (Path(__file__).with_name("_native" + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    found = next((path for path in beside if path.exists()), None)
    if found is None:
        return None
    loaded = ctypes.CDLL(str(found))  # torch's OpenMP is loaded already, and both share its threads
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.attend.argtypes, loaded.attend.restype = (pointer, pointer, pointer, number, pointer, ctypes.c_int), None
    loaded.step.argtypes, loaded.step.restype = (pointer, pointer, number, pointer, ctypes.c_int), None
    loaded.features.argtypes, loaded.features.restype = (pointer, ctypes.c_int), None
    loaded.features_step.argtypes, loaded.features_step.restype = (pointer, pointer, ctypes.c_int), None
    return loaded


def obstacle(shape: HeadShape) -> str | None:
    """Why this kernel cannot answer heads of a shape here; None when it can."""
    if shape.device.type != "cpu":
        return f"the native kernel is for CPUs, the device is {shape.device}"
    if shape.dtype not in WORDS:
        return f"the native kernel takes float32 and bfloat16, the dtype is {shape.dtype}"
    if shape.head_width % 32 or shape.head_width > WIDEST or shape.query_heads > MOST_HEADS:
        limits = f"heads whose width is a multiple of 32 up to {WIDEST}, and at most {MOST_HEADS} of them"
        return f"the native kernel takes {limits}; these are {shape.query_heads} of {shape.head_width}"
    loaded = library()
    if loaded is None:
        return "the native kernel was not built, for which installing needs a C compiler with OpenMP"
    if not loaded.supported() & WORDS[shape.dtype]:
        return f"this CPU lacks the instructions of the native kernel for {shape.dtype} (AVX-512, and for bfloat16 AVX512-bf16)"
    return None


def dense(
    q: Tensor, keys: Tensor, values: Tensor, past: int, causal: bool, out: Tensor, log_total: Tensor | None = None
) -> Parts:
    """Answer queries at positions `past` and on over all of keys, values (G, n, D) into out (C, H, D).

    log_total, float32 (C, H, 1), is written where given: log2 of the sum of each row's 2^s.
    """
    runs = [(0, 0, keys.shape[1], 0, False)]
    each = ((a, b, past + a, runs) for a, b in spread(0, len(q), _rows(len(keys))))
    yield from _attend(q, [(keys, values)], each, FREE, 0 if causal else FREE, out, log_total)


def band(q: Tensor, near: Pair, free: Pair, at: int, before: int, ahead: int, out: Tensor) -> Parts:
    """Answer queries q (C, H, D), the first of which stands at index `at` of near, into out; see `blocks.band`."""
    extra = free[0].shape[1]
    runs = [(0, 0, extra, -extra, True), (1, 0, near[0].shape[1], 0, False)]
    each = ((a, b, at + a, runs) for a, b in spread(0, len(q), _rows(len(near[0]))))
    yield from _attend(q, [free, near], each, before, ahead, out)


def pattern(
    q: Tensor, keys: Tensor, values: Tensor, past: int, causal: bool, seen: Iterable[tuple[int, Runs]], out: Tensor
) -> Parts:
    """Answer queries at positions `past` and on, each block of them over runs of its own of keys, values (G, n, D).

    seen: for each block, where it ends among the queries, and the runs that it sees; causally up to each query's own place.
    """

    def each() -> Iterator[_Block]:
        first = 0
        for last, runs in seen:
            yield first, last, past + first, [(0, a, b - a, a, False) for a, b in runs]
            first = last

    yield from _attend(q, [(keys, values)], each(), FREE, 0 if causal else FREE, out)


def step(
    q: Tensor,
    states: Sequence[dict[str, Tensor]],
    counts: Sequence[int],
    groups: int,
    out: Tensor,
    log_total: Tensor | None = None,
    runs: Sequence[Runs] | None = None,
) -> None:
    """Attend one token of each of B sequences to the first `counts` keys of its state, or along `runs`; see `blocks.step`."""
    _, heads, width = q.shape
    histories, parts = array("q"), 0
    for index, (state, left) in enumerate(zip(states, counts, strict=True)):
        k, v = state["k"], state["v"]
        row = k.stride(0)
        for first, last in ((0, left),) if runs is None else runs[index]:
            taken, at = min(left, last - first), first * row * k.element_size()
            histories.extend((index, k.data_ptr() + at, v.data_ptr() + at, row, taken))
            left, parts = left - taken, parts + -(-taken // PART)
    starts = array("q", bytes(8 * (len(histories) // 5 + 1)))
    room = torch.empty(parts * heads * (width + 2), dtype=torch.float32)
    q = q if q.stride()[1:] == (width, 1) else q.contiguous()
    call = _Step(
        q.data_ptr(),
        _tight(out).data_ptr(),
        None if log_total is None else _tight(log_total).data_ptr(),
        room.data_ptr(),
        q.stride(0),
        heads,
        groups,
        width,
        q.dtype == torch.float32,
        LOG2_E / math.sqrt(width),
    )
    tables = histories.buffer_info()[0], len(starts) - 1, starts.buffer_info()[0]
    _loaded().step(ctypes.byref(call), *tables, torch.get_num_threads())


def dense_workspace_bytes(shape: HeadShape, queries: int, keys: int, asking: int | None = None) -> int:
    """Peak temporaries of `dense`, of `pattern`, and of `step` over `keys` keys, the answer to all queries included.

    asking: how many of the queries go this way; None: all. A thread's own scratch is on its stack.
    """
    heads, width = shape.query_heads, shape.head_width
    rows = -(-keys // PART) if queries == 1 else min(queries if asking is None else asking, ROWS)
    return queries * heads * width * shape.itemsize + rows * heads * (width + 2) * 4


def band_workspace_bytes(shape: HeadShape, queries: int, keys: int, before: int, ahead: int, free: int) -> int:
    """Peak temporaries of `band`, the answer included, for `queries` tokens at the end of `keys` others and themselves."""
    return dense_workspace_bytes(shape, queries, min(keys, before + 1 + free))


def _rows(groups: int) -> int:
    """Queries of a task, so that a call has two or more for each thread."""
    tasks = -(-2 * torch.get_num_threads() // groups)
    return min(BLOCK, max(64, ROWS // tasks))


def _attend(
    q: Tensor,
    sources: Sequence[Pair],
    blocks: Iterable[_Block],
    before: int,
    ahead: int,
    out: Tensor,
    log_total: Tensor | None = None,
) -> Parts:
    """Answer blocks of queries, pausing behind each call; what would take long is cut along the keys into several."""
    count, heads, width = q.shape
    tensors = [q, out, *(x for pair in sources for x in pair)]
    assert all(x.stride(2) == 1 for x in tensors), "the elements of a query, key or value must lie side by side"
    assert log_total is None or log_total.is_contiguous()
    carry = torch.empty(min(count, ROWS) * heads * (width + 2), dtype=torch.float32)
    table = array("q")
    for k, v in sources:
        table.extend((k.data_ptr(), v.data_ptr(), k.stride(1), k.stride(0), v.stride(1), v.stride(0)))
    threads = torch.get_num_threads()
    call = _Call(
        carry=carry.data_ptr(),
        q_row=q.stride(0),
        q_head=q.stride(1),
        out_row=out.stride(0),
        out_head=out.stride(1),
        heads=heads,
        groups=len(sources[0][0]),
        width=width,
        before=before,
        ahead=ahead,
        wide=q.dtype == torch.float32,
        scale=LOG2_E / math.sqrt(width),
    )
    for batch in _batches(blocks):
        first, last = batch[0][0], batch[-1][1]
        call.q, call.out = q[first:].data_ptr(), out[first:].data_ptr()
        call.log_total = None if log_total is None else log_total[first:].data_ptr()
        call.queries = last - first
        pairs = sum((b - a) * sum(_seen(run, b - a, at, before, ahead) for run in runs) for a, b, at, runs in batch)
        call.calls = max(1, round(4 * heads * width * pairs / (PART_FLOPS * threads)))
        rows, runs = array("q"), array("q")
        for a, b, at, own in batch:
            rows.extend((a - first, b - first, at, len(runs) // 5, len(runs) // 5 + len(own)))
            for run in own:
                runs.extend(run)
        addresses = [x.buffer_info()[0] for x in (table, rows, runs)]
        for index in range(call.calls):
            call.call = index
            _loaded().attend(ctypes.byref(call), *addresses[:2], len(batch), addresses[2], threads)
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


@dataclass(frozen=True)
class Features:
    """Features as the kernel reads them; the names are those of `Performer`, which is the slow reading of what follows.

    Attributes:
        count: m, a multiple of 32.
        words: the random rows (D, m); of bfloat16, neighbouring rows side by side, (D / 2, m, 2). None: elu(x) + 1.
        half: |x|^2 times this is |x'|^2 / 2 in powers of two.
        reach: the norm of x up to which features are taken as they are; beyond, relative to their largest.
        limit: a key whose weight would pass 2^limit raises the level of the sums.
    """

    count: int
    words: Tensor | None = None
    half: float = 0.0
    reach: float = math.inf
    limit: float = math.inf

    @classmethod
    def of(cls, weights: Tensor, half: float, reach: float, limit: float) -> Features:
        """Of random rows (D, m), float32 or bfloat16."""
        count = weights.shape[1]
        pairs = weights if weights.dtype == torch.float32 else weights.view(-1, 2, count).transpose(1, 2)
        return cls(count, pairs.contiguous(), half, reach, limit)

    def fields(self) -> dict[str, int | float | None]:
        """What both of the kernel's calls are told of them."""
        return {
            "weights": None if self.words is None else self.words.data_ptr(),
            "count": self.count,
            "half": self.half,
            "reach": self.reach,
            "limit": self.limit,
            "log_count": math.log2(self.count),
        }


def no_features(count: int) -> str:
    """Why the kernel cannot take so many random features; empty when it can."""
    if count % 32 == 0 and count <= MOST_FEATURES:
        return ""
    return f"the native kernel takes a multiple of 32 features up to {MOST_FEATURES}; these are {count}"


def scan(features: Features, q: Tensor, k: Tensor, v: Tensor, s: Tensor, scale: Tensor, out: Tensor) -> Parts:
    """Continue the sums over tokens in order, and answer each over those before it and itself.

    q, out: (C, H, D). k, v: (C, G, D). s: (G, D + 1, m) and scale: (G, 1, 1), float32 and tight, both changed.
    """
    yield from _features(features, (q, out), (k, v), s, scale)


def both_sides(features: Features, q: Tensor, k: Tensor, v: Tensor, s: Tensor, scale: Tensor, out: Tensor) -> Parts:
    """The same with all keys in the sums before the first query asks."""
    yield from absorb(features, k, v, s, scale)
    yield from _features(features, (q, out), None, s, scale)


def absorb(features: Features, k: Tensor, v: Tensor, s: Tensor, scale: Tensor) -> Parts:
    """Add tokens to the sums: k, v (C, G, D)."""
    yield from _features(features, None, (k, v), s, scale)


def join(features: Features, q: Tensor, s: Tensor, scale: Tensor, near: Tensor, out: Tensor) -> Parts:
    """Add the keys in the sums to answers out (C, H, D) over other keys, whose weights sum to 2^near, float32 (C, H, 1)."""
    yield from _features(features, (q, out), None, s, scale, near)


def _features(
    features: Features, asking: Pair | None, adding: Pair | None, s: Tensor, scale: Tensor, near: Tensor | None = None
) -> Parts:
    """Queries and their answers, (C, H, D) each, keys and values, (C, G, D) each, or both, in calls of ROWS tokens."""
    q, out = asking or (None, None)
    k, v = adding or (None, None)
    given = [x for x in (q, out, k, v) if x is not None]
    (count, groups, width), threads = (len(given[0]), len(s), given[0].shape[2]), torch.get_num_threads()
    heads = groups if q is None else q.shape[1]
    assert all(x.stride(2) == 1 for x in given) and s.is_contiguous() and scale.is_contiguous()
    assert near is None or near.is_contiguous()
    scratch = _scratch(features.count, given[0].element_size(), groups, width, min(count, ROWS), adding is not None)
    added, keys, levels, room = (torch.empty(size, dtype=torch.float32) for size in scratch)
    call = _Features(
        **features.fields(),
        sums=s.data_ptr(),
        level=scale.data_ptr(),
        added=added.data_ptr(),
        keys=keys.data_ptr(),
        levels=levels.data_ptr(),
        room=room.data_ptr(),
        heads=heads,
        groups=groups,
        width=width,
        wide=given[0].dtype == torch.float32,
        room_words=len(room) // threads,
        adds=adding is not None,
        asks=asking is not None,
    )
    for name, x in (("q", q), ("out", out), ("k", k), ("v", v)):
        if x is not None:
            setattr(call, f"{name}_row", x.stride(0))
            setattr(call, f"{name}_head", x.stride(1))
    for first, last in spread(0, count, ROWS):
        for name, x in (("q", q), ("out", out), ("k", k), ("v", v), ("near", near)):
            setattr(call, name, None if x is None else x[first:].data_ptr())
        call.tokens = last - first
        _loaded().features(ctypes.byref(call), threads)
        yield


def _scratch(count: int, itemsize: int, groups: int, width: int, tokens: int, adds: bool) -> tuple[int, int, int, int]:
    """Words of scratch for `tokens` tokens: what chunks add, their keys' features, levels, and room of all threads."""
    chunks, words = -(-tokens // CHUNK) if adds else 0, count * itemsize // 4
    room = 2 * max(CHUNK, width) * words * torch.get_num_threads()
    return chunks * groups * (width + 1) * count, chunks * groups * words * CHUNK, groups * (2 * tokens + 1), room


def features_workspace_bytes(shape: HeadShape, count: int, queries: int) -> int:
    """Peak temporaries of `scan` and `both_sides`, with the answer to all queries and fresh sums."""
    heads, groups, width = shape.query_heads, shape.key_value_heads, shape.head_width
    answer = queries * heads * width * shape.itemsize + groups * (width + 1) * count * 4
    return answer + features_scratch_bytes(shape, count, queries, adds=True)


def features_scratch_bytes(shape: HeadShape, count: int, tokens: int, *, adds: bool) -> int:
    """Peak temporaries of `absorb` or, where nothing is added, of `join`; of a step for one token."""
    heads, groups = shape.query_heads, shape.key_value_heads
    if tokens == 1:
        return 4 * (heads + groups) * count
    return 4 * sum(_scratch(count, shape.itemsize, groups, shape.head_width, min(tokens, ROWS), adds))


def features_step(
    features: Features, q: Tensor, k: Tensor, v: Tensor, sums: Sequence[tuple[Tensor, Tensor]], out: Tensor
) -> None:
    """Add one token of each of B sequences to its sums and ask them.

    q, out: (B, H, D). k, v: (B, G, D). sums: of each sequence s (G, D + 1, m) and scale (G, 1, 1), float32, both changed.
    """
    _features_step(features, q, (k, v), sums, out)


def join_step(features: Features, q: Tensor, sums: Sequence[tuple[Tensor, Tensor]], near: Tensor, out: Tensor) -> None:
    """`join` of one token of each of B sequences: q, out (B, H, D), near (B, H, 1)."""
    _features_step(features, q, None, sums, out, near)


def _features_step(
    features: Features,
    q: Tensor,
    adding: Pair | None,
    sums: Sequence[tuple[Tensor, Tensor]],
    out: Tensor,
    near: Tensor | None = None,
) -> None:
    (count, heads, width), groups = q.shape, len(sums[0][0])
    given = [x if x.stride()[1:] == (width, 1) else x.contiguous() for x in (q, *(adding or ()))]
    room = torch.empty(count * (heads + groups) * features.count, dtype=torch.float32)
    call = _FeaturesStep(
        **features.fields(),
        out=_tight(out).data_ptr(),
        features=room.data_ptr(),
        sequences=count,
        heads=heads,
        groups=groups,
        width=width,
        wide=q.dtype == torch.float32,
        adds=adding is not None,
        near=None if near is None else _tight(near).data_ptr(),
    )
    for name, x in zip(("q", "k", "v"), given, strict=False):  # without keys, only the first
        setattr(call, name, x.data_ptr())
        setattr(call, f"{name}_row", x.stride(0))
    addresses = array("q", [x.data_ptr() for pair in sums for x in pair])
    _loaded().features_step(ctypes.byref(call), addresses.buffer_info()[0], torch.get_num_threads())


def _tight(x: Tensor) -> Tensor:
    assert x.is_contiguous(), "an answer of a step, and a log, must be tight"
    return x


def _loaded() -> ctypes.CDLL:
    found = library()
    assert found is not None, "`obstacle` tells whether the kernel can be called"
    return found
