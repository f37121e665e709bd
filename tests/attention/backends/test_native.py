"""Every backend over the kernels in C: the laws, and what holds to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attention import AttentionBackend, HeadShape, Segments, build, reference
from attention.memory import peak_bytes
from attention.projection import projection
from attention.truth import BOUNDS
from tests.attention.backends import (
    test_bigbird,
    test_chunked,
    test_dense,
    test_linear,
    test_longformer,
    test_sliding_window,
    test_topk,
)
from tests.attention.laws import Laws, extend_in, largest, need_native, tokens

DTYPES = [torch.float32, torch.bfloat16]


class NativeLaws(Laws):
    impl = "native"
    pauses = 2

    @pytest.fixture(autouse=True)
    def machine(self) -> None:
        """This one."""

    def backends(self, dtype: torch.dtype = torch.float32, heads: tuple[int, int] = (4, 2)) -> list[AttentionBackend]:
        need_native(HeadShape(*heads, self.width, dtype))
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


class TestTopK(NativeLaws):
    name = "topk"
    variants = test_topk.TestTopK.variants


class TestPerformer(NativeLaws):
    name = "performer"
    variants = ({"features": 64}, {"features": 16, "hyperbolic": True, "seed": 3}, {"features": 64, "local_chunk": 70})


class TestLinear(NativeLaws):
    name = "linear"
    variants = test_linear.TestLinear.variants


@pytest.mark.parametrize("dtype", DTYPES)
def test_answers_are_the_same_to_the_bit_however_the_keys_are_cut_and_on_any_number_of_threads(dtype: torch.dtype) -> None:
    need_native(HeadShape(4, 2, 64, dtype))
    backend = build("dense", {"impl": "native"}, HeadShape(4, 2, 64, dtype))
    q, k, v = tokens(backend.shape, 3000, scale=3.0)
    threads = torch.get_num_threads()
    whole = backend.attend(q, k, v, Segments((3000,)), causal=True)
    try:
        for other in (1, 2, 3):
            torch.set_num_threads(other)
            assert torch.equal(backend.attend(q, k, v, Segments((3000,)), causal=True), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(extend_in(backend, q, k, v, [1000, 2, 998, 7, 993]), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"block": 513}, {"block": 1024, "window_blocks": 1, "random_blocks": 1}])
def test_a_block_of_more_queries_than_share_a_call_is_answered_like_others(dtype: torch.dtype, options: dict[str, int]) -> None:
    need_native(HeadShape(4, 2, 64, dtype))
    backend = build("bigbird", {"impl": "native", **options}, HeadShape(4, 2, 64, dtype))
    q, k, v = tokens(backend.shape, 2500)
    for causal in (True, False):
        answer = backend.attend(q, k, v, Segments((2500,)), causal=causal)
        assert largest(answer.double() - reference.answer(backend, q, k, v, causal=causal)) <= BOUNDS[dtype]
    law = backend.cost(2500, 2500, causal=True).workspace_bytes
    assert abs(peak_bytes(lambda: backend.attend(q, k, v, Segments((2500,)), causal=True)) - law) <= 1 << 20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "row", "head"), [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 3, 5)])
@pytest.mark.parametrize("heads", [(4, 2), (1, 1)])
@pytest.mark.parametrize("name", ["dense", "sliding_window", "bigbird", "performer", "linear"])
def test_tensors_at_odd_places_with_odd_strides_are_answered_to_the_bit_like_tight_ones(
    name: str, dtype: torch.dtype, offset: int, row: int, head: int, heads: tuple[int, int]
) -> None:
    need_native(HeadShape(*heads, 64, dtype))
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4, 64), (7, 1, 32), (3, 3, 128), (2, 1, 256)])
def test_performer_answers_what_its_definition_does_at_every_width(dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    need_native(HeadShape(*heads, dtype))
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_performer_with_keys_of_enormous_weight_is_the_same_in_c_and_in_torch(dtype: torch.dtype) -> None:
    shape = HeadShape(4, 2, 32, dtype)
    need_native(shape)
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
