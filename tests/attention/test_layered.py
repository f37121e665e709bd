"""A backend per layer: each layer answers as its own backend does, and states and costs add up layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import attention
from attention import (
    LAYERED,
    NATIVE,
    AttentionBackend,
    Cost,
    HeadShape,
    PoolExhausted,
    Segments,
    StatePool,
    build,
    layers_of,
    reference,
    shares,
)
from attention.layered import Native
from attention.truth import BOUNDS, check
from tests.attention.laws import extend_in, largest, need_native, tokens
from tests.attention.test_cost import extending, near

WINDOWS = (7, None, 30, 7)
SHAPE = HeadShape(4, 2, 16)


def layered(windows: Sequence[int | None] = WINDOWS) -> Native:
    built = build(NATIVE, {"windows": windows, "impl": "torch"}, SHAPE)
    assert isinstance(built, Native)
    return built


def extended(
    backend: AttentionBackend, pool: StatePool, slots: list[int], lengths: Sequence[Sequence[int]]
) -> list[list[Tensor]]:
    """Each layer's answers to sequences that grow by `lengths`, all in one batch, in packing order."""
    answers = []
    for layer in range(len(pool.backends)):
        q, k, v = tokens(SHAPE, sum(map(sum, lengths)), seed=layer)
        past, rows = [0] * len(slots), []
        for step in lengths:
            start = sum(past)
            part = slice(start, start + sum(step))
            segments = Segments(tuple(step), tuple(past))
            rows.append(backend.extend(q[part], k[part], v[part], segments, pool, layer, slots))
            past = [done + more for done, more in zip(past, step, strict=True)]
        answers.append(rows)
    return answers


def test_each_layer_answers_as_its_own_backend_by_its_definition() -> None:
    backend = layered()
    pool = backend.new_pool(4, 2**30)
    slot = pool.allocate(90)
    for layer, window in enumerate(WINDOWS):
        q, k, v = tokens(SHAPE, 90, seed=layer)
        rows = []
        for a, b in ((0, 50), (50, 51), (51, 90)):
            rows.append(backend.extend(q[a:b], k[a:b], v[a:b], Segments((b - a,), (a,)), pool, layer, [slot]))
        i, j = torch.arange(90)[:, None], torch.arange(90)[None]
        seen = (j <= i) & ((i - j <= window) if window is not None else True)
        assert torch.equal(reference.visible(backend.layers[layer], torch.arange(90), 90, True), seen)
        assert largest(torch.cat(rows) - reference.answer(backend.layers[layer], q, k, v, causal=True)) <= 2e-5


def test_a_sequence_in_company_has_the_answers_it_has_alone() -> None:
    backend = layered()
    pool = backend.new_pool(4, 2**30)
    pool.release(pool.allocate(5))  # so that numbers of slots and of their parts differ
    together = extended(backend, pool, [pool.allocate(60), pool.allocate(60)], [(40, 13), (1, 1)])
    for layer in range(4):
        q, k, v = tokens(SHAPE, 55, seed=layer)
        slot = pool.allocate(60)
        alone = backend.extend(q[:40], k[:40], v[:40], Segments((40,)), pool, layer, [slot])
        assert largest(together[layer][0][:40] - alone) <= 2e-6
        pool.release(slot)


def test_a_slot_takes_the_bytes_of_its_layers_and_gives_all_of_them_back() -> None:
    backend = layered()
    pool = backend.new_pool(4, 2**30)
    for length in (1, 8, 31, 1000):
        slot = pool.allocate(length)
        copy = pool.copy(slot)
        held = sum(tensor.nbytes for tensor in pool.tensors(slot).values())
        assert pool.slot_bytes(length) == held == sum(layer.state_bytes(length) for layer in backend.layers)
        assert (pool.bytes_in_use, len(pool)) == (2 * held, 2)
        pool.release(slot)
        pool.release(copy)
        assert (pool.bytes_in_use, len(pool)) == (0, 0)


def test_a_copy_goes_on_from_where_the_slot_stands() -> None:
    backend = layered()
    pool = backend.new_pool(4, 2**30)
    slot = pool.allocate(60)
    extended(backend, pool, [slot], [(40,)])
    copy = pool.copy(slot)
    for layer in range(4):
        q, k, v = tokens(SHAPE, 1, seed=9)
        one, other = (backend.extend(q, k, v, Segments((1,), (40,)), pool, layer, [each]) for each in (slot, copy))
        assert torch.equal(one, other)


def test_what_does_not_fit_takes_nothing() -> None:
    backend = layered()
    pool = backend.new_pool(4, backend.new_pool(4, 0).slot_bytes(100))
    with pytest.raises(PoolExhausted):
        pool.allocate(10_000)
    assert (pool.bytes_in_use, len(pool)) == (0, 0)
    slot = pool.allocate(100)
    with pytest.raises(PoolExhausted):
        pool.copy(slot)
    with pytest.raises(ValueError, match="not in use"):
        extended(backend, pool, [slot + 1], [(3,)])


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 500), (64, 64), (64, 500), (333, 333)])
def test_its_cost_times_its_layers_is_that_of_the_layers(queries: int, keys: int) -> None:
    backend = layered()
    costs = [layer.cost(queries, keys, causal=True) for layer in backend.layers]
    told = backend.cost(queries, keys, causal=True)
    assert abs(4 * told.flops - sum(cost.flops for cost in costs)) < 4
    assert 0 <= 4 * told.state_bytes - sum(cost.state_bytes for cost in costs) < 4
    assert told.workspace_bytes == max(cost.workspace_bytes for cost in costs)


def test_layers_of_one_window_share_a_backend() -> None:
    backend = layered()
    assert backend.layers[0] is backend.layers[3]
    assert list(shares(backend).values()) == [0.5, 0.25, 0.25] and sum(shares(backend).values()) == 1
    dense = build("dense", None, SHAPE)
    assert shares(dense) == {dense: 1.0}


def test_one_layer_alike_everywhere_costs_what_its_backend_does() -> None:
    one, all_alike = build("sliding_window", {"window": 7, "sinks": 0, "impl": "torch"}, SHAPE), layered((7,) * 3)
    assert all_alike.cost(20, 90, causal=True) == one.cost(20, 90, causal=True)
    assert all_alike.new_pool(3, 0).slot_bytes(90) == one.new_pool(3, 0).slot_bytes(90)
    assert isinstance(one.cost(1, 1, causal=True), Cost)


def test_what_it_is_cannot_be_asked_wrongly() -> None:
    assert NATIVE not in attention.names()
    with pytest.raises(ValueError, match="windows of its own"):
        build(NATIVE, None, SHAPE)
    with pytest.raises(ValueError, match="window"):
        layered((0, None))
    backend = layered()
    with pytest.raises(ValueError, match="4 layers"):
        backend.new_pool(3, 2**20)
    q, k, v = tokens(SHAPE, 3)
    with pytest.raises(ValueError, match="layers"):
        backend.attend(q, k, v, Segments((3,)), causal=True)
    pool = backend.new_pool(4, 2**20)
    with pytest.raises(ValueError, match="layers 0 to 3"):
        backend.extend(q, k, v, Segments((3,)), pool, 4, [pool.allocate(3)])


CAP = 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("impl", "width"), [("torch", 16), ("torch", 64), ("native", 64), ("native", 96), ("native", 256)])
@pytest.mark.parametrize("cap", [0.1, CAP, 50.0])
def test_capped_layers_answer_by_their_definition_in_any_chunking(
    dtype: torch.dtype, impl: str, width: int, cap: float
) -> None:
    shape = HeadShape(4, 2, width, dtype)
    if impl == "native":
        need_native(shape)
    for kind in shares(build(NATIVE, {"windows": (7, None, 100), "score_cap": cap, "impl": impl}, shape)):
        assert kind.impl == impl and kind.score_cap == cap
        assert check(kind).passed
        q, k, v = tokens(shape, 300, scale=3.0 * (16 / width) ** 0.25)  # scores far beyond the lower caps
        wanted = reference.answer(kind, q, k, v, causal=True)
        if cap <= CAP:
            assert largest(wanted - reference.answer(build("dense", None, shape), q, k, v, causal=True)) > 0.1
        assert largest(extend_in(kind, q, k, v, (1, 130, 1, 1, 167)) - wanted) <= BOUNDS[dtype]


@pytest.mark.parametrize("width", [16, 64])
def test_capped_layers_do_not_feel_what_they_cannot_see(width: int) -> None:
    shape = HeadShape(4, 2, width)
    for kind in shares(build(NATIVE, {"windows": (7, None), "score_cap": CAP}, shape)):
        q, k, v = tokens(shape, 200)
        clean = extend_in(kind, q, k, v, (200,))
        k[150], v[150] = float("nan"), float("nan")
        assert torch.equal(extend_in(kind, q, k, v, (200,))[:150], clean[:150])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("past", "count"), [(0, 512), (3000, 512), (3000, 1)])
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_capped_layers_take_the_workspace_that_their_cost_states(dtype: torch.dtype, past: int, count: int, impl: str) -> None:
    options = {"windows": (1000, None), "score_cap": CAP, "impl": impl}
    for kind in shares(build(NATIVE, options, HeadShape(8, 4, 64, dtype))):
        peak, _ = extending(kind, past, count)
        law = kind.cost(count, past + count, causal=True).workspace_bytes
        assert near(law, peak), f"{kind.name} {law} {peak}"


def test_who_cannot_cap_scores_is_refused_by_name() -> None:
    for impl, why in (("native", "multiple of 32"), ("xformers", "xformers caps no scores")):
        with pytest.raises(ValueError, match=why):
            build(NATIVE, {"windows": (7,), "score_cap": CAP, "impl": impl}, SHAPE)


PLAN = {
    "0-2": {"sliding_window": {"window": 7, "sinks": 1}},
    3: {"topk": {"block": 4, "blocks": 2, "window": 9}},
    "4": {"dense": None},
}


def test_a_plan_gives_each_layer_the_backend_that_it_names() -> None:
    backend = build(LAYERED, {"layers": PLAN}, SHAPE)
    layers = layers_of(backend, 5)
    assert [layer.name for layer in layers] == ["sliding_window"] * 3 + ["topk", "dense"]
    assert layers[0] is layers[2] and len(shares(backend)) == 3 and not backend.exact
    pool = backend.new_pool(5, 2**30)
    slot = pool.allocate(90)
    for layer, own in enumerate(layers):
        q, k, v = tokens(SHAPE, 90, seed=layer)
        rows = []
        for a, b in ((0, 50), (50, 51), (51, 90)):
            rows.append(backend.extend(q[a:b], k[a:b], v[a:b], Segments((b - a,), (a,)), pool, layer, [slot]))
        assert largest(torch.cat(rows) - reference.answer(own, q, k, v, causal=True)) <= 2e-5
    law = backend.cost(64, 500, causal=True)
    assert abs(5 * law.flops - sum(layer.cost(64, 500, causal=True).flops for layer in layers)) < 5
    assert backend.new_pool(5, 0).slot_bytes(500) == sum(layer.state_bytes(500) for layer in layers)


def test_a_dense_backend_is_that_of_all_its_layers() -> None:
    dense = build("dense", None, SHAPE)
    assert layers_of(dense, 3) == (dense, dense, dense)


@pytest.mark.parametrize(
    ("layers", "fault"),
    [
        ({}, "it says nothing"),
        ({"0-1": {"dense": {}}, 3: {"dense": {}}}, "layer 2 has no backend"),
        ({"0-1": {"dense": {}}, 1: {"dense": {}}}, "layer 1 has two"),
        ({1: {"dense": {}}}, "layer 0 has no backend"),
        ({"a": {"dense": {}}}, "as in 5 or 0-4, received 'a'"),
        ({"3-1": {"dense": {}}}, "received '3-1'"),
        ({"0-9999": {"dense": {}}}, "below 1024"),
        ({0: {"native": {}}}, "one backend of bigbird.* received native"),
        ({0: {"dense": {}, "linear": {}}}, "received dense, linear"),
        ({0: {"sliding_window": {"window": 0}}}, "window"),
        ({0: {"longformer": {}}}, "no causal form"),
    ],
)
def test_a_plan_that_is_none_is_refused_with_the_layer_or_the_name(layers: dict[object, object], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        build(LAYERED, {"layers": layers}, SHAPE)


def test_a_plan_for_another_number_of_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="layered was built for 5 layers, received 6"):
        build(LAYERED, {"layers": PLAN}, SHAPE).new_pool(6, 2**20)
