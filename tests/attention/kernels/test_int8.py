"""Keys and values in 8 bits: the numbers, the laws of backends that keep them, and who refuses them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention import NATIVE, HeadShape, Segments, build, names, reference, shares
from attention.kernels import int8
from attention.truth import BOUNDS, check
from tests.attention.backends.test_native import NativeLaws
from tests.attention.laws import Laws, extend_in, largest, need_native, tokens


class TestDense(Laws):
    name = "dense"
    variants = ({},)
    kv = torch.int8


class TestSlidingWindow(Laws):
    name = "sliding_window"
    variants = ({"window": 150, "sinks": 4}, {"window": 3, "sinks": 9})
    kv = torch.int8


class TestChunked(Laws):
    name = "chunked"
    variants = ({"chunk": 130},)
    kv = torch.int8


class TestBigBird(Laws):
    name = "bigbird"
    variants = ({"block": 16},)
    kv = torch.int8


class TestTopK(Laws):
    name = "topk"
    variants = ({"block": 5, "blocks": 3, "window": 20, "sinks": 2},)
    kv = torch.int8


class TestNativeTopK(NativeLaws):
    name = "topk"
    variants = TestTopK.variants
    kv = torch.int8


class TestNativeDense(NativeLaws):
    name = "dense"
    variants = TestDense.variants
    kv = torch.int8


class TestNativeSlidingWindow(NativeLaws):
    name = "sliding_window"
    variants = TestSlidingWindow.variants
    kv = torch.int8


class TestNativeChunked(NativeLaws):
    name = "chunked"
    variants = TestChunked.variants
    kv = torch.int8


class TestNativeBigBird(NativeLaws):
    name = "bigbird"
    variants = TestBigBird.variants
    kv = torch.int8


def drawn(dtype: torch.dtype, rows: int, heads: int, width: int, seed: int, spread: float) -> tuple[Tensor, Tensor]:
    """Keys and values (T, G, D) of magnitudes from row to row `spread` powers of ten apart, some of them zeros."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(rows, heads, width, generator=generator) for _ in range(2))
    for x in (k, v):
        x *= 10 ** (spread * torch.randn(rows, heads, 1, generator=generator)).clamp(-45, 37)
        x[torch.rand(rows, heads, generator=generator) < 0.1] = 0.0
    return k.to(dtype), v.to(dtype)


@given(
    st.sampled_from((torch.float32, torch.bfloat16)),
    st.sampled_from((1, 2, 33, 513)),
    st.sampled_from((1, 3, 8)),
    st.sampled_from((32, 64, 96, 128, 256)),
    st.integers(0, 99),
    st.sampled_from((0.0, 3.0, 30.0)),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_an_element_is_off_by_half_a_scale_at_most_and_by_nothing_in_a_row_of_zeros(
    dtype: torch.dtype, rows: int, heads: int, width: int, seed: int, spread: float
) -> None:
    k, _ = given_ = drawn(dtype, rows, heads, width, seed, spread)
    kept, _ = int8.quantize(*given_, "torch")
    scale = kept[..., width:].view(torch.float32).double()
    off = (int8.dequantize(kept, torch.float64) - k.double()).abs()
    tiny = 127 * 2.0**-149  # a scale below float32's range is rounded to its grid
    assert (off <= scale * (0.5 + 2.0**-16) + tiny).all()  # the quotient is rounded, too, by 2^-24 of up to 127
    assert torch.equal(scale[..., 0] == 0, k.double().abs().amax(-1) < 64 * 2.0**-149)


@given(
    st.sampled_from((torch.float32, torch.bfloat16)),
    st.sampled_from((1, 2, 33, 513)),
    st.sampled_from((1, 3, 8)),
    st.sampled_from((32, 64, 96, 128, 256)),
    st.integers(0, 99),
    st.sampled_from((0.0, 3.0, 30.0)),
    st.sampled_from((None, math.nan, math.inf, -math.inf)),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_both_readings_keep_the_same_numbers_to_the_bit(
    dtype: torch.dtype, rows: int, heads: int, width: int, seed: int, spread: float, poison: float | None
) -> None:
    need_native(HeadShape(heads, heads, width, dtype))
    k, v = drawn(dtype, rows, heads, width, seed, spread)
    if poison is not None:
        v[seed % rows, seed % heads, seed % width] = poison
    apart = torch.stack((k, v), 2).flatten(1, 2)  # rows and heads that do not stand side by side
    for pair in ((k, v), (apart[:, ::2], apart[:, 1::2])):
        for ours, wanted in zip(int8.quantize(*pair, "native"), int8.quantize(k, v, "torch"), strict=True):
            assert torch.equal(ours, wanted)


@pytest.mark.parametrize("impl", ["torch", "native"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_head_with_an_element_that_is_no_number_is_none_in_all_of_them(impl: str, poison: float) -> None:
    need_native(HeadShape(2, 2, 32))
    k, v = drawn(torch.float32, 3, 2, 32, 0, 0.0)
    k[1, 0, 5] = poison
    told = int8.dequantize(int8.quantize(k, v, impl)[0], torch.float32)
    assert told[1, 0].isnan().all() and told[[0, 2]].isfinite().all() and told[1, 1].isfinite().all()


def test_a_state_takes_a_head_s_numbers_and_its_scale() -> None:
    options: dict[str, dict[str, Any]] = {"dense": {}, "sliding_window": {"window": 255, "sinks": 1}}
    for name, chosen in options.items():
        wide, eight = (build(name, chosen, HeadShape(16, 8, 128, torch.bfloat16, kv=kv)) for kv in (None, torch.int8))
        for count in (100, 256, 5000):
            assert eight.state_bytes(count) * 2 * 128 == wide.state_bytes(count) * (128 + 4)


@pytest.mark.parametrize("name", ["performer", "linear", "distinct", "longformer"])
def test_who_keeps_no_keys_and_values_as_they_come_refuses_them_in_8_bits_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot keep keys and values in 8 bits"):
        build(name, {}, HeadShape(4, 2, 64, kv=torch.int8))
    layers = {"0": {"dense": {}}, "1": {name: {}}}
    with pytest.raises(ValueError, match=f"{name} cannot keep keys and values in 8 bits"):
        build("layered", {"layers": layers}, HeadShape(4, 2, 64, kv=torch.int8))


def test_every_backend_says_whether_it_takes_them() -> None:
    taking = []
    for name in names():
        try:
            build(name, {}, HeadShape(4, 2, 64, kv=torch.int8))
            taking.append(name)
        except ValueError as error:
            assert "kv: int8" in str(error)
    assert taking == ["bigbird", "chunked", "dense", "sliding_window", "topk"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["torch", "native"])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_layers_of_a_checkpoint_s_own_keep_them(dtype: torch.dtype, impl: str, cap: float | None) -> None:
    shape = HeadShape(6, 2, 64, dtype, kv=torch.int8)
    need_native(shape)
    for kind in shares(build(NATIVE, {"windows": (7, None, 100), "score_cap": cap, "impl": impl}, shape)):
        assert check(kind).passed
        q, k, v = tokens(shape, 300)
        wanted = reference.answer(kind, q, k, v, causal=True)
        assert largest(extend_in(kind, q, k, v, (1, 130, 1, 1, 167)) - wanted) <= BOUNDS[dtype]


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (4, 2), (6, 2), (7, 1), (16, 8)])
@pytest.mark.parametrize("width", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_over_a_history_answers_by_its_definition(dtype: torch.dtype, width: int, heads: tuple[int, int]) -> None:
    shape = HeadShape(*heads, width, dtype, kv=torch.int8)
    need_native(shape)
    backend = build("dense", {"impl": "native"}, shape)
    for count in (1, 17, 64, 257, 600):
        q, k, v = tokens(shape, count, scale=2.0)
        found = extend_in(backend, q, k, v, [count - 1, 1] if count > 1 else [1])[-1:]
        wanted = reference.answer(backend, q, k, v, causal=True, rows=torch.tensor([count - 1]))
        assert largest(found - wanted) <= BOUNDS[dtype], count


def test_what_is_lost_is_that_of_the_numbers_kept() -> None:
    shape = HeadShape(4, 2, 64)
    q, k, v = tokens(shape, 400)
    exact, eight = (build("dense", {}, HeadShape(4, 2, 64, kv=kv)) for kv in (None, torch.int8))
    lost = eight.attend(q, k, v, Segments((400,)), causal=True) - exact.attend(q, k, v, Segments((400,)), causal=True)
    assert 1e-4 < largest(lost) < 0.05  # no rounding of float32, and far below the values' deviation of 1


def test_kv_of_another_kind_is_refused() -> None:
    for kv, width in ((torch.int16, 64), (torch.int8, 66)):
        with pytest.raises(ValueError, match="kv must be int8"):
            HeadShape(4, 2, width, kv=kv)
