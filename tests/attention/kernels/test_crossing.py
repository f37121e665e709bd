"""Queries and keys of different sequences: the kernels take more or fewer keys than queries, as cross-attention has them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from attention import HeadShape
from attention.kernels import implementation
from attention.kernels.features import Sums
from attention.parts import finish
from attention.truth import BOUNDS
from tests.attention.laws import largest, need_native

COUNTS = [(1, 300), (300, 1), (20, 700), (700, 130)]


def drawn(shape: HeadShape, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries)
    q = torch.randn(queries, shape.query_heads, shape.head_width, generator=generator)
    k, v = (torch.randn(keys, shape.key_value_heads, shape.head_width, generator=generator) for _ in range(2))
    return q.to(shape.dtype), k.to(shape.dtype), v.to(shape.dtype)


def weighted(weights: Tensor, v: Tensor, group: int) -> Tensor:
    """(H, C, N) over v (N, G, D), each row's weights brought to a sum of one: (C, H, D)."""
    values = v.double().transpose(0, 1).repeat_interleave(group, 0)
    return ((weights / weights.sum(-1, keepdim=True)) @ values).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["torch", "native"])
@pytest.mark.parametrize(("queries", "keys"), COUNTS)
def test_softmax_answers_any_number_of_queries_over_any_number_of_keys(
    impl: str, dtype: torch.dtype, queries: int, keys: int
) -> None:
    shape = HeadShape(4, 2, 32, dtype)
    if impl == "native":
        need_native(shape)
    _, softmax = implementation.softmax(impl, shape)
    q, k, v = drawn(shape, queries, keys)
    out = torch.empty_like(q)
    finish(softmax.dense(q, k, v, 0, False, out))
    scores = q.double().transpose(0, 1) @ k.double().permute(1, 2, 0).repeat_interleave(2, 0) / math.sqrt(32)
    assert largest(out.double() - weighted(scores.softmax(-1), v, 2)) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["torch", "native"])
@pytest.mark.parametrize(("queries", "keys"), COUNTS)
def test_features_answer_any_number_of_queries_over_any_number_of_keys(
    impl: str, dtype: torch.dtype, queries: int, keys: int
) -> None:
    shape = HeadShape(4, 2, 32, dtype)
    if impl == "native":
        need_native(shape)
    _, features = implementation.features(impl, None, 0.0, shape)
    q, k, v = drawn(shape, queries, keys)
    out = torch.empty_like(q)
    finish(features.both_sides(q, k, v, Sums.fresh(shape, 32), out))
    asking, adding = (functional.elu(x.double()) + 1 for x in (q, k))
    weights = asking.transpose(0, 1) @ adding.permute(1, 2, 0).repeat_interleave(2, 0)
    assert largest(out.double() - weighted(weights, v, 2)) <= BOUNDS[dtype]
