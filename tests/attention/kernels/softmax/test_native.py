"""The softmax kernel in C against its slow reading in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attention import HeadShape
from attention.kernels.softmax import native
from attention.kernels.softmax.streaming import Band, Piece, Room, answer
from attention.kernels.softmax.torch import heads_first
from attention.parts import finish
from attention.truth import BOUNDS
from tests.attention.laws import largest, need_native

DTYPES = [torch.float32, torch.bfloat16]


def packed(dtype: torch.dtype, queries: int, keys: int, heads: int, groups: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal q (C, H, D) and k, v (N, G, D), the last two as views of one tensor, as a model hands them on."""
    need_native(HeadShape(heads, groups, width, dtype))
    generator = torch.Generator().manual_seed(queries + keys)
    q = torch.randn(queries, heads, width, generator=generator).to(dtype)
    kv = torch.randn(keys, 2 * groups, width, generator=generator).to(dtype)
    return q, kv[:, :groups], kv[:, groups:]


def by_torch(q: Tensor, k: Tensor, v: Tensor, band: Band) -> tuple[Tensor, Tensor]:
    """The answer and log2 of the sums, by the slow reading in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    out, logs = torch.empty_like(q), q.new_empty(*q.shape[:2], 1)
    finish(answer(q, [Piece(heads_first(k), heads_first(v), band)], out, Room(q), log_total=logs))
    return out, logs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 64), (6, 2, 32), (3, 1, 96), (2, 2, 128), (5, 1, 256)])
def test_dense_and_band_answer_what_their_slow_reading_does(dtype: torch.dtype, heads: int, groups: int, width: int) -> None:
    for queries, past in ((1, 0), (7, 0), (253, 130), (1010, 0), (5, 2000)):
        q, k, v = packed(dtype, queries, past + queries, heads, groups, width)
        for causal in (True, False):
            out, logs = torch.empty_like(q), torch.empty(queries, heads, 1)
            finish(native.dense(q, k, v, past, causal, out, logs))
            wanted, wanted_logs = by_torch(q, k, v, Band(high=past if causal else None))
            assert largest(out.double() - wanted) <= BOUNDS[dtype], (queries, past, causal)
            assert largest(logs.double() - wanted_logs) <= BOUNDS[dtype]
        for before, ahead, first in ((1, 0, 0), (40, 40, 0), (200, 0, 3), (15, 16, 150), (3000, 0, 0)):
            if first > past + queries:
                continue
            near, free = (k[first:], v[first:]), (k[:first], v[:first])
            finish(native.band(q, near, free, past - first, before, ahead, out))
            wanted, _ = by_torch(q, k, v, Band(past - before, past + ahead, first))
            assert largest(out.double() - wanted) <= BOUNDS[dtype], (queries, past, before, ahead, first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 64), (6, 2, 32), (3, 1, 96), (5, 1, 256)])
def test_a_step_answers_what_its_slow_reading_does(dtype: torch.dtype, heads: int, groups: int, width: int) -> None:
    counts = (1, 15, 16, 17, 255, 256, 257, 1000)
    q, k, v = packed(dtype, len(counts), 1100, heads, groups, width)
    kept = {"k": k.flatten(1), "v": v.flatten(1)}
    out, logs = torch.empty_like(q), torch.empty(len(counts), heads, 1)
    native.step(q, [kept] * len(counts), counts, groups, out, logs)
    for n, count in enumerate(counts):
        wanted, wanted_logs = by_torch(q[n : n + 1], k[:count], v[:count], Band())
        assert largest(out[n].double() - wanted[0]) <= BOUNDS[dtype], count
        assert largest(logs[n].double() - wanted_logs[0]) <= BOUNDS[dtype]
    runs = [(3, 20), (300, 700), (1000, 1100)]
    seen = torch.tensor([*range(3, 20), *range(300, 700), *range(1000, 1050)])
    native.step(q[:1], [kept], [len(seen)], groups, out[:1], runs=[runs])
    wanted, _ = by_torch(q[:1], k[seen], v[seen], Band())
    assert largest(out[0].double() - wanted[0]) <= BOUNDS[dtype]


def test_a_long_prefill_pauses_many_times_and_cuts_its_keys() -> None:
    q, k, v = packed(torch.bfloat16, 504, 16384, 8, 8, 64)
    out, whole = torch.empty_like(q), torch.empty_like(q)
    assert sum(1 for _ in native.dense(q, k, v, 16384 - 504, True, out)) >= 8  # 17 GFLOP are some 25 ms on two cores
    finish(native.pattern(q, k, v, 16384 - 504, True, [(504, [(0, 9000), (9000, 16384)])], whole))
    assert largest(out.double() - whole.double()) <= 2**-7


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_no_query_sees_may_be_no_number_and_a_row_that_sees_nothing_is_zeros(dtype: torch.dtype) -> None:
    q, k, v = packed(dtype, 20, 60, 4, 2, 64)
    out, empty = torch.empty_like(q), (k[:0], v[:0])
    k[30:], v[30:] = float("nan"), float("inf")
    finish(native.band(q, (k, v), empty, 0, 5, 0, out))
    assert out.isfinite().all()
    finish(native.band(q, (k[:10], v[:10]), empty, 0, 2, 0, out))
    assert out[:12].count_nonzero() > 0 and out[12:].count_nonzero() == 0


def test_an_empty_block_of_queries_is_refused() -> None:
    q, k, v = packed(torch.float32, 9, 9, 2, 2, 32)
    runs = [(0, 0, 9, 0, False)]
    for blocks in ([(0, 0, 0, runs)], [(0, 9, 0, runs), (9, 9, 9, runs)]):
        with pytest.raises(RuntimeError, match="blocks must be of the queries, in their order, and none empty"):
            finish(native._attend(q, [(k, v)], blocks, 9, 0, torch.empty_like(q)))
