"""Inputs at the ends of what a float holds: norms from 0 to 10,000, weights that all underflow, tokens that are no number."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attention import AttentionBackend, HeadShape, Segments, build
from attention.projection import projection
from attention.truth import BOUNDS
from tests.attention import oracle
from tests.attention.laws import extend_in, largest, need_native, tokens

OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "dense": ({},),
    "sliding_window": ({"window": 20, "sinks": 3},),
    "longformer": ({"window": 20, "global_tokens": 3},),
    "bigbird": ({"block": 8},),
    "chunked": ({"chunk": 50},),
    "performer": ({"features": 64}, {"features": 32, "hyperbolic": True}, {"features": 64, "local_chunk": 64}),
    "linear": ({},),
    "topk": ({"block": 8, "blocks": 3, "window": 20, "sinks": 3},),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
NORMS = (0.0, 1e-30, 24.0, 40.0, 1e3, 1e4)
CASES = [
    pytest.param(name, {**options, "impl": impl}, dtype, id=f"{name}-{impl}-{str(dtype)[6:]}-{n}")
    for name, several in OPTIONS.items()
    for n, options in enumerate(several)
    for impl, dtypes in (("torch", DTYPES), ("native", DTYPES[:2]))
    for dtype in dtypes
]
COUNT = 140


def built(name: str, options: dict[str, Any], dtype: torch.dtype) -> AttentionBackend:
    shape = HeadShape(2, 1, 32, dtype)
    if options["impl"] == "native":
        need_native(shape)
    return build(name, options, shape)


def scaled(x: Tensor, norm: float) -> Tensor:
    """Every row of x at a norm."""
    return (x.double() / x.double().norm(dim=-1, keepdim=True) * norm).to(x.dtype)


def alike(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q, k


def opposite(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q = -k: the features that a query asks most are those that its key has least."""
    return (-k).repeat_interleave(q.shape[1], 1), k


def equal(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q, k[:1].expand_as(k).clone()


def negative(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """No element is above zero: elu + 1 of all of them is tiny."""
    return -q.abs(), -k.abs()


def longest(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """A first key anywhere, then keys and queries along the longest of performer's rows."""
    rows = projection(64, k.shape[-1], 0)
    along = rows[rows.norm(dim=1).argmax()].to(k.dtype).expand_as(k).clone()
    along[:1] = k[:1]
    return along.repeat_interleave(q.shape[1], 1), along


def given(shape: HeadShape, case: Any, norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a case at a norm."""
    q, k, v = tokens(shape, COUNT)
    q, k = case(q, k)
    return scaled(q, norm), scaled(k, norm), v


@cache
def wanted(name: str, options: tuple[tuple[str, Any], ...], dtype: torch.dtype, case: Any, norm: float, causal: bool) -> Tensor:
    """What the definition answers, whoever computes."""
    backend = built(name, {**dict(options), "impl": "torch"}, dtype)
    return torch.from_numpy(oracle.answer(backend, *given(backend.shape, case, norm), causal=causal))


@pytest.mark.parametrize("case", [alike, opposite, equal, negative, longest])
@pytest.mark.parametrize(("name", "options", "dtype"), CASES)
def test_a_row_that_sees_keys_is_answered_whatever_the_norms(
    name: str, options: dict[str, Any], dtype: torch.dtype, case: Any
) -> None:
    backend = built(name, options, dtype)
    if (backend.exact or name == "topk") and case in (negative, longest):
        pytest.skip("a softmax of scores knows nothing of features")
    plain = tuple((key, value) for key, value in options.items() if key != "impl")
    for norm in NORMS:
        q, k, v = given(backend.shape, case, norm)
        for causal in backend.directions:
            answers = [backend.attend(q, k, v, Segments((COUNT,)), causal=causal)]
            if causal:
                answers.append(extend_in(backend, q, k, v, [70, *[1] * 20, COUNT - 90]))
            right = wanted(name, plain, dtype, case, norm, causal)
            for answer in answers:
                assert answer.isfinite().all(), (norm, causal)
                low, high = v.double().amin(0), v.double().amax(0)
                slack = 2 * BOUNDS[dtype]
                assert (answer.double() >= low - slack).all() and (answer.double() <= high + slack).all(), (norm, causal)
                assert largest(answer.double() - right) <= tolerance(backend, norm), (norm, causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", ["torch", "native"])
def test_keys_along_one_feature_are_answered_behind_a_first_key_that_is_far_from_it(impl: str, dtype: torch.dtype) -> None:
    shape = HeadShape(2, 1, 64, dtype)
    if impl == "native":
        need_native(shape)
    backend = build("performer", {"impl": impl}, shape)
    rows = projection(256, 64, 0)
    along = rows[rows.norm(dim=1).argmax()]
    for first, later in ((24, 11), (24, 30), (40, 9), (200, 8), (8, 200)):
        _, k, v = tokens(shape, COUNT)
        k[1:] = scaled(along, later).expand(COUNT - 1, 1, 64)
        k[0] = scaled(k[0], first)
        q = scaled(along, later).expand(COUNT, 2, 64).to(dtype).contiguous()
        answer = backend.attend(q, k, v, Segments((COUNT,)), causal=True)
        assert np.abs(answer.double().numpy() - oracle.answer(backend, q, k, v, causal=True)).max() <= tolerance(backend, 200)


def tolerance(backend: AttentionBackend, norm: float) -> float:
    """An exponent's rounding is what its weight is off by; where that is much, only the hull is asked for."""
    is_softmax = backend.exact or backend.name == "topk" or getattr(backend.options, "local_chunk", 0) > 0
    dtype = backend.shape.dtype
    rounded = dtype if is_softmax and backend.impl == "torch" else torch.promote_types(dtype, torch.float32)
    size = norm * 10 + norm * norm / 2  # of an exponent: a row of W is no longer than 10, |x'|^2 / 2 no more than this
    rounding = 8 * size * torch.finfo(rounded).eps
    return math.inf if rounding > 0.1 else BOUNDS[dtype] + rounding


@pytest.mark.parametrize("size", [1e4, "max"])
@pytest.mark.parametrize(("name", "options", "dtype"), CASES)
def test_the_largest_numbers_in_one_sequence_leave_its_neighbours_alone(
    name: str, options: dict[str, Any], dtype: torch.dtype, size: Any
) -> None:
    backend = built(name, options, dtype)
    huge = torch.finfo(dtype).max if size == "max" else size
    for poison in (huge, float("nan"), float("inf")):
        q, k, v = tokens(backend.shape, 100)
        for causal in backend.directions:
            alone = backend.attend(q[40:70], k[40:70], v[40:70], Segments((30,)), causal=causal)
            for x in (q, k, v):
                x[20:40], x[70:] = poison, -poison
            together = backend.attend(q, k, v, Segments((40, 30, 30)), causal=causal)
            assert torch.equal(together[40:70], alone)


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize(("name", "options", "dtype"), CASES)
def test_a_later_token_that_is_no_number_changes_no_earlier_row_by_a_bit(
    name: str, options: dict[str, Any], dtype: torch.dtype, where: str
) -> None:
    backend = built(name, options, dtype)
    if True not in backend.directions:
        pytest.skip(f"{name} has no causal form")
    q, k, v = tokens(backend.shape, COUNT)
    clean = backend.attend(q, k, v, Segments((COUNT,)), causal=True)
    stepped = extend_in(backend, q, k, v, [40, COUNT - 40])
    for at in (1, 64, 127, 130, COUNT - 1):
        for poison in (float("nan"), float("inf"), float("-inf")):
            poisoned = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
            poisoned[where][at, :, 3] = poison
            assert torch.equal(backend.attend(**poisoned, segments=Segments((COUNT,)), causal=True)[:at], clean[:at]), (
                at,
                poison,
            )
            assert torch.equal(extend_in(backend, **poisoned, chunks=[40, COUNT - 40])[:at], stepped[:at]), (at, poison)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("impl", ["torch", "native"])
@pytest.mark.parametrize("name", ["performer", "linear"])
def test_sums_of_twenty_thousand_steps_have_not_drifted(name: str, impl: str, dtype: torch.dtype) -> None:
    steps = 20_000 if impl == "native" else 4_000
    backend = built(name, {"impl": impl, **({"features": 32} if name == "performer" else {})}, dtype)
    q, k, v = tokens(backend.shape, 100)
    v += 1.0
    pool = backend.new_pool(1, 1 << 30)
    slot = pool.allocate(steps)
    for at in range(steps):
        one = slice(at % 100, at % 100 + 1)
        answer = backend.extend(q[one], k[one], v[one], Segments((1,), (at,)), pool, 0, [slot])
    wanted = oracle.answer(backend, q, k, v, causal=False)[-1]  # each token was taken equally often
    assert np.abs(answer[0].double().numpy() - wanted).max() <= 2 * BOUNDS[dtype]
