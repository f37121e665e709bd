"""The kernel in C: the laws of every backend that uses it, its slow reading in torch as an oracle, and when it is refused."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attention import AttentionBackend, HeadShape, Segments, build, native, reference
from attention.backends.performer import projection
from attention.blocks import Band, Piece, Room, heads_first, softmax
from attention.interface import finish
from attention.memory import peak_bytes
from attention.truth import BOUNDS
from tests.attention import test_bigbird, test_chunked, test_dense, test_linear, test_longformer, test_sliding_window
from tests.attention.laws import Laws, extend_in, largest, tokens

REASON = native.obstacle(HeadShape(4, 2, 64)) or native.obstacle(HeadShape(4, 2, 64, torch.bfloat16))
needs_native = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = [torch.float32, torch.bfloat16]


@needs_native
class NativeLaws(Laws):
    width = 32
    impl = "native"
    pauses = 2

    def backends(self, dtype: torch.dtype = torch.float32, heads: tuple[int, int] = (4, 2)) -> list[AttentionBackend]:
        if dtype == torch.float64:
            pytest.skip("the kernel takes float32 and bfloat16")
        return super().backends(dtype, heads)


class TestDense(NativeLaws):
    name = "dense"
    variants = test_dense.TestDense.variants


class TestSlidingWindow(NativeLaws):
    name = "sliding_window"
    variants = test_sliding_window.TestSlidingWindow.variants


class TestLongformer(NativeLaws):
    name = "longformer"
    variants = test_longformer.TestLongformer.variants


class TestBigBird(NativeLaws):
    name = "bigbird"
    variants = test_bigbird.TestBigBird.variants


class TestChunked(NativeLaws):
    name = "chunked"
    variants = test_chunked.TestChunked.variants


class TestPerformer(NativeLaws):
    name = "performer"
    variants = ({"features": 64}, {"features": 16, "hyperbolic": True, "seed": 3}, {"features": 64, "local_chunk": 70})


class TestLinear(NativeLaws):
    name = "linear"
    variants = test_linear.TestLinear.variants


def packed(dtype: torch.dtype, queries: int, keys: int, heads: int, groups: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal q (C, H, D) and k, v (G, N, D), the last two as views of one tensor, as a model hands them on."""
    generator = torch.Generator().manual_seed(queries + keys)
    q = torch.randn(queries, heads, width, generator=generator).to(dtype)
    kv = torch.randn(keys, 2 * groups, width, generator=generator).to(dtype)
    return q, heads_first(kv[:, :groups]), heads_first(kv[:, groups:])


def by_torch(q: Tensor, k: Tensor, v: Tensor, band: Band) -> tuple[Tensor, Tensor]:
    """The answer and log2 of the sums, by the slow reading in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    out, logs = torch.empty_like(q), q.new_empty(*q.shape[:2], 1)
    finish(softmax(q, [Piece(k, v, band)], out, Room(q), log_total=logs))
    return out, logs


@needs_native
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
            near, free = (k[:, first:], v[:, first:]), (k[:, :first], v[:, :first])
            finish(native.band(q, near, free, past - first, before, ahead, out))
            wanted, _ = by_torch(q, k, v, Band(past - before, past + ahead, first))
            assert largest(out.double() - wanted) <= BOUNDS[dtype], (queries, past, before, ahead, first)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 64), (6, 2, 32), (3, 1, 96), (5, 1, 256)])
def test_a_step_answers_what_its_slow_reading_does(dtype: torch.dtype, heads: int, groups: int, width: int) -> None:
    counts = (1, 15, 16, 17, 255, 256, 257, 1000)
    q, k, v = packed(dtype, len(counts), 1100, heads, groups, width)
    kept = {"k": heads_first(k).flatten(1), "v": heads_first(v).flatten(1)}
    out, logs = torch.empty_like(q), torch.empty(len(counts), heads, 1)
    native.step(q, [kept] * len(counts), counts, groups, out, logs)
    for n, count in enumerate(counts):
        wanted, wanted_logs = by_torch(q[n : n + 1], k[:, :count], v[:, :count], Band())
        assert largest(out[n].double() - wanted[0]) <= BOUNDS[dtype], count
        assert largest(logs[n].double() - wanted_logs[0]) <= BOUNDS[dtype]
    runs = [(3, 20), (300, 700), (1000, 1100)]
    seen = torch.tensor([*range(3, 20), *range(300, 700), *range(1000, 1050)])
    native.step(q[:1], [kept], [len(seen)], groups, out[:1], runs=[runs])
    wanted, _ = by_torch(q[:1], k[:, seen], v[:, seen], Band())
    assert largest(out[0].double() - wanted[0]) <= BOUNDS[dtype]


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_answers_are_the_same_to_the_bit_however_the_keys_are_cut_and_on_any_number_of_threads(dtype: torch.dtype) -> None:
    backend = build("dense", {"impl": "native"}, HeadShape(4, 2, 64, dtype))
    q, k, v = tokens(backend.shape, 3000, scale=3.0)
    threads = torch.get_num_threads()
    whole = backend.attend(q, k, v, Segments((3000,)), causal=True)
    try:
        for other in (1, 3):
            torch.set_num_threads(other)
            assert torch.equal(backend.attend(q, k, v, Segments((3000,)), causal=True), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(extend_in(backend, q, k, v, [1000, 2, 998, 7, 993]), whole)


@needs_native
def test_a_long_prefill_pauses_many_times_and_cuts_its_keys() -> None:
    q, k, v = packed(torch.bfloat16, 504, 16384, 8, 8, 64)
    out, whole = torch.empty_like(q), torch.empty_like(q)
    assert sum(1 for _ in native.dense(q, k, v, 16384 - 504, True, out)) >= 8  # 17 GFLOP are some 25 ms on two cores
    finish(native.pattern(q, k, v, 16384 - 504, True, [(504, [(0, 9000), (9000, 16384)])], whole))
    assert largest(out.double() - whole.double()) <= 2**-7


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_no_query_sees_may_be_no_number_and_a_row_that_sees_nothing_is_zeros(dtype: torch.dtype) -> None:
    q, k, v = packed(dtype, 20, 60, 4, 2, 64)
    out, empty = torch.empty_like(q), (k[:, :0], v[:, :0])
    k[:, 30:], v[:, 30:] = float("nan"), float("inf")
    finish(native.band(q, (k, v), empty, 0, 5, 0, out))
    assert out.isfinite().all()
    finish(native.band(q, (k[:, :10], v[:, :10]), empty, 0, 2, 0, out))
    assert out[:12].count_nonzero() > 0 and out[12:].count_nonzero() == 0


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"block": 513}, {"block": 1024, "window_blocks": 1, "random_blocks": 1}])
def test_a_block_of_more_queries_than_share_a_call_is_answered_like_others(dtype: torch.dtype, options: dict[str, int]) -> None:
    backend = build("bigbird", {"impl": "native", **options}, HeadShape(4, 2, 64, dtype))
    q, k, v = tokens(backend.shape, 2500)
    for causal in (True, False):
        answer = backend.attend(q, k, v, Segments((2500,)), causal=causal)
        assert largest(answer.double() - reference.answer(backend, q, k, v, causal=causal)) <= BOUNDS[dtype]
    law = backend.cost(2500, 2500, causal=True).workspace_bytes
    assert abs(peak_bytes(lambda: backend.attend(q, k, v, Segments((2500,)), causal=True)) - law) <= 1 << 20


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "row", "head"), [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 3, 5)])
@pytest.mark.parametrize("heads", [(4, 2), (1, 1)])
@pytest.mark.parametrize("name", ["dense", "sliding_window", "bigbird", "performer", "linear"])
def test_tensors_at_odd_places_with_odd_strides_are_answered_to_the_bit_like_tight_ones(
    name: str, dtype: torch.dtype, offset: int, row: int, head: int, heads: tuple[int, int]
) -> None:
    backend = build(name, {"impl": "native"}, HeadShape(*heads, 64, dtype))

    def moved(x: Tensor) -> Tensor:
        count, heads, width = x.shape
        strides = (heads * (width + head) + row, width + head, 1)
        return torch.zeros(offset + count * strides[0], dtype=dtype).as_strided(x.shape, strides, offset).copy_(x)

    for count in (1, 300):
        given = tokens(backend.shape, count)
        odd = [moved(x) for x in given]
        for causal in (True, False):
            tight = backend.attend(*given, Segments((count,)), causal=causal)
            assert torch.equal(backend.attend(*odd, Segments((count,)), causal=causal), tight)
        assert torch.equal(extend_in(backend, *odd, [count]), extend_in(backend, *given, [count]))


class Meddler:
    """The compiled kernel, with one field of what it is told changed on the way."""

    def __init__(self, field: str, change: Callable[[int], int]) -> None:
        self.field, self.change, self.met = field, change, 0
        self.kernel = native.library()

    def __getattr__(self, function: str) -> Callable[..., bytes | None]:
        def call(packed: bytes, *rest: Any) -> bytes | None:
            told = STRUCTS[function].from_buffer_copy(packed)
            value = getattr(told, self.field, None)
            is_given = value or not self.field.endswith(PARTS)  # what is null has no size
            if value is not None and is_given and self.change(value) != value:
                self.met += 1
                setattr(told, self.field, self.change(value))
            return getattr(self.kernel, function)(bytes(told), *rest)

        return call


def changes(field: str) -> list[Callable[[int], int]]:
    """What makes a field wrong."""
    if field.endswith(("_bytes", "_rows")):
        return [lambda x: x - 1, lambda x: -x]
    if field.endswith(PARTS) or field in (
        "sequences",
        "tokens",
        "queries",
        "heads",
        "groups",
        "width",
        "count",
        "wide",
    ):
        return [lambda x: x + 1, lambda x: -x, lambda x: x + (1 << 62)]
    return [lambda x: -1, lambda x: x + (1 << 62)] if field in ("call", "calls", "before", "ahead") else []


PARTS = ("_bytes", "_rows", "_heads", "_width", "_size", "_element")
STRUCTS = {"attend": native._Call, "step": native._Step, "features": native._Features, "features_step": native._FeaturesStep}
TOLD = [
    (field, change)
    for field in sorted({name for s in STRUCTS.values() for name, *_ in s._fields_})
    for change in changes(field)
]


@needs_native
@pytest.mark.parametrize(("field", "change"), TOLD, ids=[f"{field}-{n}" for n, (field, _) in enumerate(TOLD)])
def test_the_kernel_refuses_what_does_not_fit_before_it_touches_it(
    monkeypatch: pytest.MonkeyPatch, field: str, change: Callable[[int], int]
) -> None:
    meddler = Meddler(field, change)
    monkeypatch.setattr(native, "_loaded", lambda: meddler)
    for name, options in (("bigbird", {"block": 16}), ("linear", {}), ("performer", {"features": 64, "local_chunk": 64})):
        backend = build(name, {"impl": "native", **options}, HeadShape(4, 2, 32))
        q, k, v = tokens(backend.shape, 200)
        for chunks in ([200], [199, 1]):
            met = meddler.met
            try:
                extend_in(backend, q, k, v, chunks)
            except RuntimeError as error:
                assert "what it cannot take" in str(error)
                assert meddler.met > met
            else:
                assert meddler.met == met, (name, chunks)
    assert meddler.met


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (HeadShape(2, 2, 16), "a multiple of 32 up to 256, and at most 128 of them; these are 2 of 16"),
        (HeadShape(129, 129, 32), "these are 129 of 32"),
        (HeadShape(2, 2, 64, torch.float64), "takes float32 and bfloat16, the dtype is torch.float64"),
    ],
)
def test_heads_the_kernel_cannot_answer_are_refused_with_the_reason_and_auto_reports_torch(
    shape: HeadShape, reason: str
) -> None:
    with pytest.raises(ValueError, match=f"impl is 'native', but .*{reason}; allowed here: 'auto', 'torch'"):
        build("chunked", {"impl": "native"}, shape)
    assert build("chunked", {}, shape).describe()["impl"] == "torch"


@pytest.mark.parametrize(("features", "count"), [(20, 40), (4096, 8192)])
def test_features_the_kernel_cannot_take_are_refused_with_the_reason(features: int, count: int) -> None:
    with pytest.raises(
        ValueError, match=f"multiple of 32 features up to 4096; these are {count}; allowed here: 'auto', 'torch'"
    ):
        build("performer", {"impl": "native", "features": features, "hyperbolic": True}, HeadShape(2, 2, 64))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4, 64), (7, 1, 32), (3, 3, 128), (2, 1, 256)])
def test_performer_answers_what_its_definition_does_at_every_width(dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    backend = build("performer", {"impl": "native", "features": 96}, HeadShape(*heads, dtype))
    for count in (1, 127, 128, 300, 700):
        q, k, v = tokens(backend.shape, count)
        wanted = reference.answer(backend, q, k, v, causal=True)
        assert largest(extend_in(backend, q, k, v, [count]).double() - wanted) <= BOUNDS[dtype]
        first = count // 2
        chunks = [part for part in (first, *[1] * min(9, count - first), count - first - 9) if part > 0]
        assert largest(extend_in(backend, q, k, v, chunks).double() - wanted) <= BOUNDS[dtype]
        both = backend.attend(q, k, v, Segments((count,)), causal=False)
        assert largest(both.double() - reference.answer(backend, q, k, v, causal=False)) <= BOUNDS[dtype]


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.usefixtures("without_library")
def test_a_package_that_was_installed_without_a_compiler_says_so_and_answers_by_torch() -> None:
    shape = HeadShape(2, 2, 64)
    with pytest.raises(ValueError, match="was not built, for which installing needs a C compiler"):
        build("dense", {"impl": "native"}, shape)
    backend = build("dense", {}, shape)
    assert backend.impl == "torch"
    q, k, v = tokens(shape, 10)
    assert backend.attend(q, k, v, Segments((10,)), causal=True).isfinite().all()


@needs_native
@pytest.mark.parametrize("name", list(native._LAYOUTS))
def test_a_kernel_whose_structs_are_not_those_of_its_caller_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tables, structs = native._LAYOUTS[name]
    assert len(structs) == 2

    class Longer(structs[0]):
        _fields_ = (("one_more", ctypes.c_int64),)

    for wrong in (((*tables[:-1], tables[-1] + 1), structs), (tables, structs[:1]), (tables, (Longer, structs[1]))):
        monkeypatch.setitem(native._LAYOUTS, name, wrong)
        native.library.cache_clear()
        with pytest.raises(RuntimeError, match="was built from other sources than these: install the package again"):
            native.library()
    monkeypatch.undo()
    native.library.cache_clear()
    assert native.library() is not None


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_performer_with_keys_of_enormous_weight_is_the_same_in_c_and_in_torch(dtype: torch.dtype) -> None:
    shape = HeadShape(4, 2, 32, dtype)
    ours, slow = (build("performer", {"features": 64, "impl": impl}, shape) for impl in ("native", "torch"))
    q, k, v = tokens(shape, 400)
    longest = projection(64, 32, 0)
    longest = longest[longest.norm(dim=1).argmax()] * 32**0.25
    for at, factor in ((50, 1.3), (200, 1.6), (201, 1.5), (300, 2.0)):  # each far above all before it, two of them in one chunk
        k[at] = (longest * factor).to(dtype)
    for causal in (True, False):
        answers = [backend.attend(q, k, v, Segments((400,)), causal=causal) for backend in (ours, slow)]
        bound = BOUNDS[dtype] if dtype == torch.float32 else 0.2  # bfloat16 exponents of 60 are off by 2^-3
        assert largest(answers[0].double() - answers[1].double()) <= bound
    before = ours.attend(q[:200], k[:200], v[:200], Segments((200,)), causal=True)
    assert torch.equal(ours.attend(q, k, v, Segments((400,)), causal=True)[:200], before)
