"""Pools: layers with backends of their own, held to what each answers alone."""

from __future__ import annotations

import pytest
import torch

from attention import HeadShape, PoolExhausted, Segments, StatePool, build
from tests.attention.laws import tokens

SHAPE = HeadShape(4, 2, 16)
NAMES = ("dense", "sliding_window", "dense", "linear")


def mixed(max_bytes: int = 1 << 30) -> StatePool:
    """One backend per layer, the first and the third of them the same."""
    backends = {name: build(name, {"window": 5} if name == "sliding_window" else {}, SHAPE) for name in set(NAMES)}
    return StatePool([backends[name] for name in NAMES], max_bytes)


def test_each_layer_is_answered_by_its_own_backend_as_if_that_had_a_pool_to_itself() -> None:
    pool = mixed()
    slot = pool.allocate(40)
    q, k, v = tokens(SHAPE, 40)
    for layer, backend in enumerate(pool.backends):
        for past, end in ((0, 30), (30, 31), (31, 40)):
            part, step = slice(past, end), Segments((end - past,), (past,))
            answer = backend.extend(q[part], k[part], v[part], step, pool, layer, [slot])
        whole = backend.attend(q, k, v, Segments((40,)), causal=True)
        assert float((answer - whole[31:]).abs().amax()) <= 2e-5


def test_a_layer_is_refused_to_the_backend_of_another() -> None:
    pool = mixed()
    slot, (q, k, v) = pool.allocate(8), tokens(SHAPE, 8)
    dense, window = pool.backends[:2]
    with pytest.raises(ValueError, match=r"the pool must be of this backend .* 'sliding_window'"):
        dense.extend(q, k, v, Segments((8,)), pool, 1, [slot])
    with pytest.raises(ValueError, match="the pool has layers 0 to 3, received 4"):
        window.extend(q, k, v, Segments((8,)), pool, 4, [slot])


def test_bytes_are_the_sum_over_the_layers_and_a_copy_goes_on_by_itself() -> None:
    pool = mixed(2 * mixed().slot_bytes(300))
    slot = pool.allocate(300)
    real = sum(tensor.untyped_storage().nbytes() for tensor in pool.tensors(slot).values())
    assert real == pool.bytes_in_use == sum(backend.state_bytes(300) for backend in pool.backends)
    copy = pool.copy(slot)
    with pytest.raises(PoolExhausted):
        pool.copy(slot)
    q, k, v = tokens(SHAPE, 8)
    for layer, backend in enumerate(pool.backends):
        first = backend.extend(q, k, v, Segments((8,)), pool, layer, [slot])
        assert torch.equal(backend.extend(q, k, v, Segments((8,)), pool, layer, [copy]), first)
    pool.release(slot)
    pool.release(copy)
    assert pool.bytes_in_use == 0 and len(pool) == 0


def test_a_pool_of_no_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 layer"):
        StatePool([], 1)
