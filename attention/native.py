"""The softmax kernel of `blocks.py`, and attention through features, in C for CPUs with AVX-512: chosen by a backend's `impl`.

`csrc` computes, built at install; here is what it needs to be told. A score never leaves the core that computed it and keys
are read where they lie, so attention runs near the rate at which the cores multiply, and a decode step near the rate at which
memory is read. `dense`, `band` and `step` are those of `implementation.Softmax`, `scan` and what follows those of
`implementation.Sums`; `blocks.py` and `sums.py` are their slow reading.

What a step or a block answers depends on its own keys alone: not on the batch, the threads, or how keys were cut into calls.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, count, takewhile
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

from attention.blocks import LOG2_E, Pair, Runs, spread
from attention.interface import HeadShape, Parts
from attention.sums import LIMIT, State

ROWS = 512  # queries that share a call, and a carry
BLOCK = 256  # at most so many of them are one thread's task; their keys are packed once
PART_FLOPS = 2 << 27  # per thread and call: two thirds of a millisecond
PART = 256  # keys of a history that one thread takes at a time, as in softmax.c
CHUNK = 128  # tokens that meet their own triangle of random features, as in features.c
WIDEST, MOST_HEADS, MOST_FEATURES = 256, 128, 4096  # what the kernel's own memory is made for
FREE = 1 << 40  # a distance that binds nothing, FAR in given.h
WORDS = {torch.float32: 1, torch.bfloat16: 2}  # the dtypes, by the bits with which softmax.c names them

_Run = tuple[int, int, int, int, bool]  # source, first, count, position, free: see softmax.c
_Block = tuple[int, int, int, Sequence[_Run]]  # first and last query, the first one's position, what they may see


_VIEW = ("at", "size", "rows", "heads", "width", "row", "head", "element")  # a tensor, as in given.h
_Field = tuple[str, type]


def _views(*names: str) -> list[_Field]:
    return [
        (f"{name}_{part}", ctypes.c_int64 if index else ctypes.c_void_p) for name in names for index, part in enumerate(_VIEW)
    ]


def _rooms(*names: str) -> list[_Field]:
    return [field for name in names for field in ((name, ctypes.c_void_p), (f"{name}_bytes", ctypes.c_int64))]


def _counts(*names: str) -> list[_Field]:
    return [(name, ctypes.c_int64) for name in names]


class _Call(ctypes.Structure):
    _fields_ = [
        *_views("q", "out"),
        *_rooms("log_total", "carry"),
        *_counts("queries", "heads", "groups", "width", "before", "ahead", "call", "calls", "wide"),
        ("scale", ctypes.c_float),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *_views("q"),
        *_rooms("out", "log_total", "parts"),
        *_counts("sequences", "heads", "groups", "width", "wide"),
        ("scale", ctypes.c_float),
    ]


class _Features(ctypes.Structure):
    _fields_ = [
        *_views("q", "k", "v", "out"),
        *_rooms("weights", "sums", "level", "added", "keys", "room", "near"),
        *_counts("tokens", "heads", "groups", "width", "count", "wide", "adds", "asks"),
        *((name, ctypes.c_float) for name in ("half", "limit", "log_count")),
    ]


class _FeaturesStep(ctypes.Structure):
    _fields_ = [
        *_views("q", "k", "v"),
        *_rooms("out", "weights", "features", "near"),
        *_counts("sequences", "heads", "groups", "width", "count", "wide", "adds"),
        *((name, ctypes.c_float) for name in ("half", "limit", "log_count")),
    ]


def _packing(struct: type[ctypes.Structure]) -> Callable[..., bytes]:
    """Its fields, in their order, as the struct in memory: twice as fast as to fill one in, and a step does feel it."""
    kinds = ("f" if kind is ctypes.c_float else "q" for _, kind, *_ in struct._fields_)
    return Struct("".join(kinds) + "0q").pack  # the last: to the struct's whole size


_call, _step, _many, _one = (_packing(struct) for struct in (_Call, _Step, _Features, _FeaturesStep))

SOURCE_WORDS, RUN_WORDS, BLOCK_WORDS, HISTORY_WORDS, STATE_WORDS = 16, 5, 5, 9, 4  # words of a row of a table
_LAYOUTS = {
    "softmax_layout": ((len(_VIEW), SOURCE_WORDS, RUN_WORDS, BLOCK_WORDS, HISTORY_WORDS), (_Call, _Step)),
    "features_layout": ((len(_VIEW), STATE_WORDS), (_Features, _FeaturesStep)),
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, None where the package was installed without a C compiler.

    Raises:
        RuntimeError: it was built from other sources than these.
    """
    beside = (Path(__file__).with_name("_native" + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    found = next((path for path in beside if path.exists()), None)
    if found is None:
        return None
    loaded = ctypes.CDLL(str(found))  # torch's OpenMP is loaded already, and both share its threads
    for name, (tables, structs) in _LAYOUTS.items():
        if _layout(loaded, name) != [*(8 * words for words in tables), *(n for struct in structs for n in _offsets(struct))]:
            raise RuntimeError(f"{found} was built from other sources than these: install the package again")
    pointer, number, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    loaded.attend.argtypes = (pointer, pointer, number, pointer, number, pointer, number, threads)
    loaded.step.argtypes = (pointer, pointer, number, pointer, number, threads)
    loaded.features.argtypes = (pointer, threads)
    loaded.features_step.argtypes = (pointer, pointer, number, threads)
    for function in (loaded.attend, loaded.step, loaded.features, loaded.features_step):
        function.restype = ctypes.c_char_p  # null, or what was wrong
    return loaded


def _layout(loaded: ctypes.CDLL, name: str) -> list[int]:
    """A table of sizes and offsets; empty where there is none."""
    if not hasattr(loaded, name):
        return []
    table = ctypes.cast(getattr(loaded, name), ctypes.POINTER(ctypes.c_int64))
    return list(takewhile(lambda x: x >= 0, (table[i] for i in count())))


def _offsets(struct: type[ctypes.Structure]) -> list[int]:
    """Its size and where its fields stand, a view counted as one."""
    inner = tuple(f"_{part}" for part in _VIEW[1:])
    names = [name for name, *_ in struct._fields_ if not name.endswith(inner)]
    return [ctypes.sizeof(struct), *(getattr(struct, name).offset for name in names)]


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
            keys_seen = [(0, a, b - a, a, False) for a, b in runs]
            for a, b in spread(first, last, _rows(len(keys))):
                yield a, b, past + a, keys_seen
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
        kept, columns = k.shape
        kept = min(kept, len(v))
        where = (index, k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0), kept, columns)
        for first, last in ((0, left),) if runs is None else runs[index]:
            taken = min(left, last - first)
            histories.extend((*where, first, taken))
            left, parts = left - taken, parts + -(-taken // PART)
    number = len(histories) // HISTORY_WORDS
    starts = array("q", bytes(8 * (number + 1)))
    room = torch.empty(parts * heads * (width + 2), dtype=torch.float32)
    q = q if q.stride(1) == width else q.contiguous()
    call = _step(
        *_view(q),
        *_room(out),
        *_room(log_total),
        room.data_ptr(),
        4 * len(room),
        len(q),
        heads,
        groups,
        width,
        q.dtype == torch.float32,
        LOG2_E / math.sqrt(width),
    )
    tables = histories.buffer_info()[0], number, starts.buffer_info()[0], 8 * len(starts)
    _done(_loaded().step(call, *tables, torch.get_num_threads()))


def dense_workspace_bytes(shape: HeadShape, queries: int, keys: int, asking: int | None = None) -> int:
    """Peak temporaries of `dense` and of `pattern` over `keys` keys, the answer to all queries included.

    asking: how many of the queries go this way; None: all. A thread's own scratch is on its stack.
    """
    heads, width = shape.query_heads, shape.head_width
    rows = min(queries if asking is None else asking, ROWS)
    return queries * heads * width * shape.itemsize + rows * heads * (width + 2) * 4


def step_workspace_bytes(shape: HeadShape, keys: int, runs: int = 1, logs: bool = False) -> int:
    """Peak temporaries of `step` of one sequence that looks at `keys` keys in several runs, the answer included."""
    heads, width, parts = shape.query_heads, shape.head_width, -(-keys // PART) + runs - 1
    return heads * width * shape.itemsize + parts * heads * (width + 2) * 4


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
    total, heads, width = q.shape
    carry = torch.empty(min(total, ROWS) * heads * (width + 2), dtype=torch.float32)
    table = array("q")
    for k, v in sources:
        table.extend((*_view(k.transpose(0, 1)), *_view(v.transpose(0, 1))))
    threads, shape = torch.get_num_threads(), (heads, len(sources[0][0]), width)
    near, far = min(before, FREE), min(ahead, FREE)
    for batch in _batches(blocks):
        first, last = batch[0][0], batch[-1][1]
        pairs = sum((b - a) * sum(_seen(run, b - a, at, near, far) for run in runs) for a, b, at, runs in batch)
        calls = max(1, round(4 * heads * width * pairs / (PART_FLOPS * threads)))
        rows, runs = array("q"), array("q")
        for a, b, at, own in batch:
            number = len(runs) // RUN_WORDS
            rows.extend((a - first, b - first, at, number, number + len(own)))
            for run in own:
                runs.extend(run)
        logs = _room(None if log_total is None else log_total[first:last])
        views = (*_view(q[first:last]), *_view(out[first:last]), *logs, *_room(carry))
        scale = LOG2_E / math.sqrt(width)
        tables = [
            (x.buffer_info()[0], len(x) // words)
            for x, words in ((table, SOURCE_WORDS), (rows, BLOCK_WORDS), (runs, RUN_WORDS))
        ]
        for index in range(calls):
            call = _call(*views, last - first, *shape, near, far, index, calls, q.dtype == torch.float32, scale)
            _done(_loaded().attend(call, *chain(*tables), threads))
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


class Features:
    """Features as the kernel reads them: `sums.Features`, which is the slow reading of what follows."""

    def __init__(self, weights: Tensor | None, half: float, shape: HeadShape) -> None:
        self.shape = shape
        self.count = shape.head_width if weights is None else weights.shape[1]
        # the random rows (D, m); of bfloat16, neighbouring rows side by side, (D / 2, m, 2)
        self.words = weights
        if weights is not None and weights.dtype == torch.bfloat16:
            self.words = weights.view(-1, 2, self.count).transpose(1, 2).contiguous()
        self._half = half

    @property
    def numbers(self) -> tuple[float, float, float]:
        """What both of the kernel's calls are told of them last."""
        return self._half, LIMIT, math.log2(self.count)


def no_features(count: int) -> str:
    """Why the kernel cannot take so many random features; empty when it can."""
    if count % 32 == 0 and count <= MOST_FEATURES:
        return ""
    return f"the native kernel takes a multiple of 32 features up to {MOST_FEATURES}; these are {count}"


def scan(features: Features, q: Tensor, k: Tensor, v: Tensor, s: Tensor, level: Tensor, out: Tensor) -> Parts:
    """Continue the sums over tokens in order, and answer each over those before it and itself.

    q, out: (C, H, D). k, v: (C, G, D). s: (G, D + 1, m) and level: (G, 1, m), float32 and tight, both changed.
    """
    yield from _features(features, (q, out), (k, v), s, level)


def both_sides(features: Features, q: Tensor, k: Tensor, v: Tensor, s: Tensor, level: Tensor, out: Tensor) -> Parts:
    """The same with all keys in the sums before the first query asks."""
    yield from absorb(features, k, v, s, level)
    yield from _features(features, (q, out), None, s, level)


def absorb(features: Features, k: Tensor, v: Tensor, s: Tensor, level: Tensor) -> Parts:
    """Add tokens to the sums: k, v (C, G, D)."""
    yield from _features(features, None, (k, v), s, level)


def join(features: Features, q: Tensor, s: Tensor, level: Tensor, near: Tensor, out: Tensor) -> Parts:
    """Add the keys in the sums to answers out (C, H, D) over other keys, whose weights sum to 2^near, float32 (C, H, 1)."""
    yield from _features(features, (q, out), None, s, level, near)


def _features(
    features: Features, asking: Pair | None, adding: Pair | None, s: Tensor, level: Tensor, near: Tensor | None = None
) -> Parts:
    """Queries and their answers, (C, H, D) each, keys and values, (C, G, D) each, or both, in calls of ROWS tokens."""
    q, out = asking or (None, None)
    k, v = adding or (None, None)
    given = next(x for x in (q, k) if x is not None)
    tokens, groups, threads = len(given), len(s), torch.get_num_threads()
    heads, width = groups if q is None else q.shape[1], given.shape[2]
    scratch = _scratch(features.count, given.element_size(), groups, width, min(tokens, ROWS), adding is not None)
    rooms = [torch.empty(size, dtype=torch.float32) for size in scratch]
    kept = [*_room(features.words), *_room(s), *_room(level), *chain(*map(_room, rooms))]
    rest = heads, groups, width, features.count, given.dtype == torch.float32, adding is not None, asking is not None
    for first, last in spread(0, tokens, ROWS):
        q_, k_, v_, out_, near_ = (None if x is None else x[first:last] for x in (q, k, v, out, near))
        views = chain(*map(_view, (q_, k_, v_, out_)))
        call = _many(*views, *kept, *_room(near_), last - first, *rest, *features.numbers)
        _done(_loaded().features(call, threads))
        yield


def _scratch(count: int, itemsize: int, groups: int, width: int, tokens: int, adds: bool) -> tuple[int, int, int]:
    """Words of scratch for `tokens` tokens: what chunks add, their keys' features, and room of all threads."""
    chunks, words = -(-tokens // CHUNK) if adds else 0, count * itemsize // 4
    room = 2 * max(CHUNK, width) * words * torch.get_num_threads()
    return chunks * groups * (width + 1) * count, chunks * groups * words * CHUNK, room


def features_workspace_bytes(features: Features, queries: int, causal: bool) -> int:
    """Peak temporaries of `scan` and `both_sides`, and for one query of `features_step`, the answer included."""
    shape = features.shape
    answer = queries * shape.query_heads * shape.head_width * shape.itemsize
    step = 4 * (shape.query_heads + shape.key_value_heads) * features.count
    return answer + (step if queries == 1 else absorb_workspace_bytes(features, queries))


def absorb_workspace_bytes(features: Features, tokens: int) -> int:
    """Peak temporaries of `absorb`."""
    shape = features.shape
    return 4 * sum(_scratch(features.count, shape.itemsize, shape.key_value_heads, shape.head_width, min(tokens, ROWS), True))


def join_workspace_bytes(features: Features, tokens: int) -> int:
    """Peak temporaries of `join`, for one token of `join_step`."""
    shape = features.shape
    if tokens == 1:
        return 4 * (shape.query_heads + shape.key_value_heads) * features.count
    return 4 * sum(_scratch(features.count, shape.itemsize, shape.key_value_heads, shape.head_width, min(tokens, ROWS), False))


def features_step(features: Features, q: Tensor, k: Tensor, v: Tensor, sums: Sequence[State], out: Tensor) -> None:
    """Add one token of each of B sequences to its sums and ask them.

    q, out: (B, H, D). k, v: (B, G, D). sums: of each sequence s (G, D + 1, m) and level (G, 1, m), float32, both changed.
    """
    _features_step(features, q, (k, v), sums, out)


def join_step(features: Features, q: Tensor, sums: Sequence[State], near: Tensor, out: Tensor) -> None:
    """`join` of one token of each of B sequences: q, out (B, H, D), near (B, H, 1)."""
    _features_step(features, q, None, sums, out, near)


def _features_step(
    features: Features,
    q: Tensor,
    adding: Pair | None,
    sums: Sequence[State],
    out: Tensor,
    near: Tensor | None = None,
) -> None:
    (sequences, heads, width), groups = q.shape, len(sums[0][0])
    q, k, v = (x if x is None or x.stride(1) == width else x.contiguous() for x in (q, *(adding or (None, None))))
    room = torch.empty(sequences * (heads + groups) * features.count, dtype=torch.float32)
    call = _one(
        *_view(q),
        *_view(k),
        *_view(v),
        *_room(out),
        *_room(features.words),
        *_room(room),
        *_room(near),
        sequences,
        heads,
        groups,
        width,
        features.count,
        q.dtype == torch.float32,
        adding is not None,
        *features.numbers,
    )
    states = array("q")
    for s, level in sums:  # tight, as all state is
        states.extend((s.data_ptr(), s.nbytes, level.data_ptr(), level.nbytes))
    _done(_loaded().features_step(call, states.buffer_info()[0], len(sums), torch.get_num_threads()))


def _view(x: Tensor | None) -> tuple[int, ...]:
    """A tensor (rows, heads, width) as the kernel is told of it."""
    return _NOTHING if x is None else (x.data_ptr(), x.itemsize, *x.shape, *x.stride())


_NOTHING = (0,) * len(_VIEW)


def _room(x: Tensor | None) -> tuple[int, int]:
    """Tight memory as the kernel is told of it."""
    if x is None:
        return 0, 0
    if not x.is_contiguous():
        raise RuntimeError(f"what the kernel takes as it lies in memory must be tight, received strides {x.stride()}")
    return x.data_ptr(), x.nbytes


def _done(reason: bytes | None) -> None:
    """Raise RuntimeError where the kernel refused what it was given, before it touched any of it."""
    if reason is not None:
        raise RuntimeError(f"the native kernel was given what it cannot take: {reason.decode()}")


def _loaded() -> ctypes.CDLL:
    found = library()
    assert found is not None, "`obstacle` tells whether the kernel can be called"
    return found
