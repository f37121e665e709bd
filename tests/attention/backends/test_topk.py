"""Top-k blocks: the laws, what a query chooses, and what its choice knows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attention import HeadShape, Segments, build, reference
from attention.backends.topk import TopK
from attention.truth import BOUNDS
from tests.attention.laws import Laws, extend_in, largest, need_native, tokens

SMALL = {"block": 8, "blocks": 3, "window": 20, "sinks": 3}


def made(shape: HeadShape, **options: object) -> TopK:
    if options.get("impl") == "native":
        need_native(shape)
    backend = build("topk", {**SMALL, **options}, shape)
    assert isinstance(backend, TopK)
    return backend


class TestTopK(Laws):
    name = "topk"
    variants = (
        SMALL,
        {"block": 1, "blocks": 5, "window": 7, "sinks": 0},
        {"block": 17, "blocks": 1, "window": 17, "sinks": 40},
    )


IMPLS = pytest.mark.parametrize("impl", ["torch", "native"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@IMPLS
@DTYPES
def test_a_query_chooses_the_blocks_whose_bounds_are_largest_of_those_behind_its_window(dtype: torch.dtype, impl: str) -> None:
    backend = made(HeadShape(6, 2, 32, dtype), impl=impl)
    q, k, _ = tokens(backend.shape, 400)
    found = backend.choices(q, k)
    for i in (0, 20, 21, 28, 29, 100, 399):
        for g in range(2):
            blocks = [b for b in range(50) if 8 * b < i - 20]
            asked = q[i, 3 * g : 3 * g + 3].double()[:, None]  # (R, 1, D)
            bounds = {
                b: float((asked * k[8 * b : 8 * b + 8, g].double()).amax(1).sum()) for b in blocks
            }  # of each element alone
            best = sorted(blocks, key=bounds.__getitem__, reverse=True)[:3]
            assert sorted(found[i, g].tolist(), reverse=True) == sorted(best, reverse=True) + [-1] * (3 - len(best))


@IMPLS
@DTYPES
def test_a_key_that_a_query_asks_for_is_seen_wherever_it_stands(dtype: torch.dtype, impl: str) -> None:
    backend = made(HeadShape(2, 1, 32, dtype), impl=impl)
    window = build("sliding_window", {"window": 20, "sinks": 3, "impl": impl}, backend.shape)
    q, k, v = tokens(backend.shape, 500)
    for at in (3, 7, 8, 250, 470):
        asked = k.clone()
        asked[at] = 8 * q[499].float().mean(0).to(dtype)
        answer, without = (each.attend(q, asked, v, Segments((500,)), causal=True)[499] for each in (backend, window))
        assert largest(answer.float() - v[at].float()) < 0.3 < largest(without.float() - v[at].float())


@IMPLS
def test_all_blocks_chosen_equal_dense(impl: str) -> None:
    backend = made(HeadShape(4, 2, 32), blocks=60, impl=impl)
    q, k, v = tokens(backend.shape, 480)
    dense = build("dense", {"impl": impl}, backend.shape).attend(q, k, v, Segments((480,)), causal=True)
    assert largest(backend.attend(q, k, v, Segments((480,)), causal=True) - dense) <= BOUNDS[torch.float32]
    assert largest(extend_in(backend, q, k, v, [300, 1, 1, 178]) - dense) <= BOUNDS[torch.float32]


@IMPLS
def test_up_to_its_window_it_is_the_sliding_window_to_the_bit(impl: str) -> None:
    backend = made(HeadShape(4, 2, 32), window=200, impl=impl)
    window = build("sliding_window", {"window": 200, "sinks": 3, "impl": impl}, backend.shape)
    q, k, v = tokens(backend.shape, 201)
    answers = [each.attend(q, k, v, Segments((201,)), causal=True) for each in (backend, window)]
    assert torch.equal(*answers)


@IMPLS
@DTYPES
def test_of_blocks_with_equal_bounds_the_later_ones_are_chosen(dtype: torch.dtype, impl: str) -> None:
    backend = made(HeadShape(2, 1, 32, dtype), impl=impl)
    q, k, _ = tokens(backend.shape, 300)
    k[:] = k[:8].repeat(38, 1, 1)[:300]
    for i in (60, 299):
        last = -(-(i - 20) // 8)
        assert sorted(backend.choices(q, k)[i, 0].tolist()) == [last - 3, last - 2, last - 1]


@IMPLS
def test_a_choice_is_the_same_whole_in_chunks_and_in_steps(impl: str) -> None:
    backend = made(HeadShape(4, 2, 64, torch.bfloat16), impl=impl)
    q, k, _ = tokens(backend.shape, 700)
    bounds = backend._bounds(k)
    whole = backend.choices(q, k).sort().values
    for first, last in ((0, 61), (61, 62), (62, 699), (699, 700)):
        part = backend.softmax.choose(q[first:last], [bounds], [(0, last - first, first, 0)], backend.blocks)
        assert torch.equal(part.sort().values, whole[first:last])


def test_a_choice_that_is_wrong_is_found_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = made(HeadShape(2, 1, 32), impl="torch")
    q, k, v = tokens(backend.shape, 300)
    right = reference.answer(backend, q, k, v, causal=True)
    choose = backend.softmax.choose

    def second_best(*given: object) -> Tensor:
        found = choose(*given)  # type: ignore[arg-type]
        return (found - 1).clamp(min=-1)

    monkeypatch.setattr(backend.softmax, "choose", second_best)
    assert torch.equal(reference.answer(backend, q, k, v, causal=True), right)
    assert largest(backend.attend(q, k, v, Segments((300,)), causal=True).double() - right) > 0.1


@pytest.mark.parametrize("queries", [1, 7, 512])
def test_the_law_counts_the_blocks_that_are_looked_at_and_those_that_are_chosen(queries: int) -> None:
    backend = made(HeadShape(4, 2, 32))
    for keys in (600, 2000):
        looks = [max(0, math.ceil((p - 20) / 8)) for p in range(keys - queries, keys)]
        pairs = queries * 24 + sum(8 * min(3, count) for count in looks)
        assert backend.cost(queries, keys, causal=True).flops == 4 * 32 * (4 * pairs + 2 * sum(looks))


@pytest.mark.parametrize("options", [{"block": 21}, {"block": 0}, {"blocks": 0}, {"blocks": 257}, {"sinks": -1}])
def test_options_without_sense_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        made(HeadShape(2, 2, 32), **options)
