"""Distinct tokens: the laws, what is kept, and what a choice knows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attention import HeadShape, Segments, build, reference
from attention.backends import distinct
from attention.backends.distinct import Distinct
from attention.truth import BOUNDS
from tests.attention.laws import Laws, extend_in, largest, need_native, tokens

SMALL = {"window": 20, "kept": 30, "sinks": 3, "block": 8}
IMPLS = pytest.mark.parametrize("impl", ["torch", "native"])


def made(shape: HeadShape, **options: object) -> Distinct:
    if options.get("impl") == "native":
        need_native(shape)
    backend = build("distinct", {**SMALL, **options}, shape)
    assert isinstance(backend, Distinct)
    return backend


def kept(backend: Distinct, k: Tensor, v: Tensor, at: int) -> list[int]:
    """The positions behind its window that a token sees."""
    return list(backend.keeping(k.double(), v.double(), at))[-1][1].tolist()


class TestDistinct(Laws):
    name = "distinct"
    variants = (
        SMALL,
        {"window": 7, "kept": 1, "sinks": 0, "block": 1},
        {"window": 17, "kept": 100, "sinks": 40, "block": 17},
    )


@IMPLS
def test_what_is_said_once_is_kept_and_what_is_repeated_is_not(impl: str) -> None:
    backend = made(HeadShape(4, 2, 32), impl=impl)
    _, k, v = tokens(backend.shape, 800)
    once = [100, 101, 250, 400, 777 - 40]
    repeated = [at for at in range(800) if at not in once]
    for x in (k, v):
        x[repeated] = x[:10].repeat(80, 1, 1)[repeated] * torch.linspace(0.5, 2, len(repeated))[:, None, None]
    found = kept(backend, k, v, 799)
    assert {*once, 0, 1, 2} < {*found}
    assert len(found) == 33
    assert {*range(3, 10)} < {*found}  # each of the ten was new when it came first


@IMPLS
def test_a_kept_token_is_found_far_behind_the_window(impl: str) -> None:
    backend = made(HeadShape(2, 1, 32), impl=impl)
    window = build("sliding_window", {"window": 27, "sinks": 3, "impl": impl}, backend.shape)
    q, k, v = tokens(backend.shape, 700)
    for x in (k, v):
        x[3:] = x[3:13].repeat(70, 1, 1)[:697]
    k[120], v[120] = 8 * q[699].mean(0), 5.0
    answer, without = (each.attend(q, k, v, Segments((700,)), causal=True)[699] for each in (backend, window))
    assert largest(answer - 5.0) < 0.5 < largest(without - 5.0)


@IMPLS
def test_up_to_what_it_keeps_it_is_dense(impl: str) -> None:
    backend = made(HeadShape(4, 2, 32), impl=impl)
    dense = build("dense", {"impl": impl}, backend.shape)
    q, k, v = tokens(backend.shape, 63)  # 33 kept, 24 of the window in whole blocks, 7 of the block that has begun
    both = [each.attend(q, k, v, Segments((63,)), causal=True) for each in (backend, dense)]
    assert largest(both[0] - both[1]) <= BOUNDS[torch.float32]
    assert torch.equal(extend_in(backend, q, k, v, [1] * 63), extend_in(dense, q, k, v, [1] * 63))


def test_the_window_is_never_narrower_than_it_says() -> None:
    for options in ({}, {"window": 24}, {"window": 1, "block": 50}):
        backend = made(HeadShape(2, 1, 32), **options)
        at = torch.arange(300)
        _, k, v = tokens(backend.shape, 300)
        q = torch.zeros(2, 300, 32, dtype=torch.float64)
        weights = backend.kernel(q, *(x.double().transpose(0, 1).expand(2, -1, -1) for x in (k, v)), at[:, None], at[None])
        near = (at[:, None] - at[None]).clamp(min=-1)
        assert bool((weights[0][(near >= 0) & (near <= backend.options.window)] > 0).all())
        assert bool((weights[0][near < 0] == 0).all())
        assert int((weights[0] > 0).sum()) == backend._pairs(300)


@pytest.mark.parametrize("queries", [1, 5, 64, 200])
@pytest.mark.parametrize("options", [{}, {"block": 5, "window": 3, "sinks": 0}, {"kept": 300}])
def test_the_law_counts_what_is_seen_and_what_is_compared(options: dict[str, int], queries: int) -> None:
    backend = made(HeadShape(4, 2, 32), **options)
    block = backend.options.block
    for keys in (200, 201, 333, 1000):
        span = range(keys - queries, keys)
        pairs = sum(min(backend._start(p), backend.kept) + p - backend._start(p) + 1 for p in span)
        moves = [p for p in span if p % block == 0 and p > backend.window]
        looks = sum(block * min(backend.kept, p - backend.window - block) + block * (block - 1) // 2 for p in moves)
        assert backend.cost(queries, keys, causal=True).flops == 4 * 32 * (4 * pairs + 2 * looks)


def test_a_state_is_as_large_for_a_long_sequence_as_for_a_longer_one() -> None:
    backend = made(HeadShape(4, 2, 32))
    assert backend.state_bytes(1000) == backend.state_bytes(1_000_000) > backend.state_bytes(30)


@IMPLS
def test_a_choice_is_the_same_whole_in_chunks_and_in_steps(impl: str) -> None:
    backend = made(HeadShape(4, 2, 64, torch.bfloat16), impl=impl)
    q, k, v = tokens(backend.shape, 400)
    found = []
    for chunks in ([400], [123, 1, 200, 76], [1] * 400):
        pool = backend.new_pool(1, 1 << 24)
        slot, past = pool.allocate(400), 0
        for count in chunks:
            part = slice(past, past + count)
            backend.extend(q[part], k[part], v[part], Segments((count,), (past,)), pool, 0, [slot])
            past += count
        found.append({name: tensor[0] for name, tensor in pool.tensors(slot).items()})
    held = backend._held(399) + 1
    for other in found[1:]:
        assert torch.equal(found[0]["novelty"], other["novelty"])
        assert torch.equal(found[0]["k"][:held], other["k"][:held])


def test_a_choice_that_is_wrong_is_found_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = made(HeadShape(2, 1, 32), impl="torch")
    q, k, v = tokens(backend.shape, 300)
    right = reference.answer(backend, q, k, v, causal=True)
    assert largest(backend.attend(q, k, v, Segments((300,)), causal=True).double() - right) <= BOUNDS[torch.float32]
    best = distinct._best
    monkeypatch.setattr(
        distinct,
        "_best",
        lambda novelty, count: best(-novelty, count) if novelty.dtype == torch.float32 else best(novelty, count),
    )
    assert torch.equal(reference.answer(backend, q, k, v, causal=True), right)
    assert largest(backend.attend(q, k, v, Segments((300,)), causal=True).double() - right) > 0.1


@pytest.mark.parametrize("options", [{"block": 0}, {"kept": 0}, {"window": 0}, {"sinks": -1}])
def test_options_without_sense_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        made(HeadShape(2, 2, 32), **options)
