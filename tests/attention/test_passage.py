"""A decode step's attention at all layers from C: what `extend` answers layer by layer, bit for bit, or refused untouched."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence

import pytest
import torch

from attention import AttentionBackend, HeadShape, Passage, Segments, StatePool, backend_class, build
from attention.kernels.features import native as features
from attention.kernels.library import ANSWER, pack_view, view
from attention.kernels.softmax import native as softmax
from tests.attention.laws import need_native, tokens

LAYERS = 2
PAST = (700, 129, 1)
OPTIONS: dict[str, dict[str, object]] = {
    "dense": {},
    "sliding_window": {"window": 128, "sinks": 3},
    "chunked": {"chunk": 130},
    "bigbird": {"block": 16},
    "distinct": {"window": 64, "kept": 32, "block": 16},
    "performer": {"features": 64},
    "performer ": {"features": 64, "local_chunk": 64},
    "linear": {},
}
"""A backend's options, by its name; spaces behind it tell two of one apart."""
SHAPES = [HeadShape(4, 2, 64, torch.bfloat16), HeadShape(4, 2, 64), HeadShape(6, 2, 96, torch.bfloat16)]
SHAPES += [HeadShape(4, 2, 64, torch.bfloat16, kv=torch.int8), HeadShape(6, 2, 96, kv=torch.int8)]
Question = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
CALL = ctypes.CFUNCTYPE(ctypes.c_char_p, *ANSWER)


def asked(at: tuple[int, int, int], question: Question, out: torch.Tensor, threads: int = 2) -> str:
    """Ask one layer as the model's C does: why not, or nothing."""
    function, told, index = at
    answer = CALL(function)(told, index, *(pack_view(*view(x)) for x in question), out.data_ptr(), out.nbytes, threads)
    return (answer or b"").decode()


def prepared(backend: AttentionBackend, past: Sequence[int] = PAST) -> tuple[StatePool, list[int]]:
    """A pool with texts of so many tokens, at all layers."""
    pool = backend.new_pool(LAYERS, 1 << 40)
    slots = [pool.allocate(count + 9) for count in past]
    for layer in range(LAYERS):
        for slot, count in zip(slots, past, strict=True):
            backend.extend(*tokens(backend.shape, count, seed=layer + slot), Segments((count,)), pool, layer, [slot])
    return pool, slots


def next_tokens(past: Sequence[int]) -> Segments:
    return Segments((1,) * len(past), tuple(past))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_passage_answers_and_keeps_what_extend_does_layer_by_layer(name: str, shape: HeadShape) -> None:
    need_native(shape)
    if shape.kv is not None and not backend_class(name.strip()).takes_int8:
        pytest.skip(f"{name} keeps nothing in 8 bits")
    backend = build(name.strip(), {"impl": "native", **OPTIONS[name]}, shape)
    past = [count for count in PAST if name != "performer " or count > 128]  # of which all have far keys, or none
    (pool, slots), (other, theirs) = prepared(backend, past), prepared(backend, past)
    passed = 0
    for step in range(6):
        segments = next_tokens([count + step for count in past])
        passage = Passage.of(pool, slots, segments) if step < 5 else None  # the last one looks at what the others have put
        if passage is not None:
            passage.begin()
        for layer in range(LAYERS):
            question = tokens(shape, len(past), seed=100 * step + layer)
            wanted, found = backend.extend(*question, segments, other, layer, theirs), torch.empty_like(question[0])
            if passage is None:
                found = backend.extend(*question, segments, pool, layer, slots)
            else:
                assert asked(passage.at[layer], question, found) == ""
                passed += 1
            assert torch.equal(found, wanted), (step, layer)
        if passage is not None:
            passage.end()
    assert passed >= 3 * LAYERS  # `distinct` goes layer by layer where a block leaves its window


def test_layers_of_several_backends_are_asked_each_for_its_own() -> None:
    shape = SHAPES[0]
    need_native(shape)
    kinds = {"0": {"sliding_window": {"window": 20}}, "1": {"dense": {}}}
    backend = build("layered", {"layers": kinds}, shape)
    (pool, slots), (other, theirs) = prepared_layers(backend), prepared_layers(backend)
    segments = next_tokens(PAST)
    passage = Passage.of(pool, slots, segments)
    assert passage is not None
    passage.begin()
    for layer, own in enumerate(pool.backends):
        question = tokens(shape, len(PAST), seed=layer)
        found = torch.empty_like(question[0])
        assert asked(passage.at[layer], question, found) == ""
        assert torch.equal(found, own.extend(*question, segments, other, layer, theirs))


def prepared_layers(backend: AttentionBackend) -> tuple[StatePool, list[int]]:
    """`prepared` of a backend per layer."""
    pool = backend.new_pool(LAYERS, 1 << 40)
    slots = [pool.allocate(count + 9) for count in PAST]
    for layer, own in enumerate(pool.backends):
        for slot, count in zip(slots, PAST, strict=True):
            own.extend(*tokens(backend.shape, count, seed=layer + slot), Segments((count,)), pool, layer, [slot])
    return pool, slots


def test_slots_are_taken_from_the_beginning_to_the_end() -> None:
    shape = SHAPES[1]
    need_native(shape)
    backend = build("dense", {"impl": "native"}, shape)
    pool, slots = prepared(backend)
    with pytest.raises(ValueError, match="slot 99 is not in use"):
        Passage.of(pool, [*slots, 99], next_tokens((*PAST, 1)))
    for wrong, message in (
        ((701, 129, 1), "past of slot 0 must be the 700 tokens"),
        ((700, 129, 10), "holds at most 10 tokens"),
    ):
        passage = Passage.of(pool, slots, next_tokens(wrong))
        assert passage is not None
        with pytest.raises(ValueError, match=message):
            passage.begin()
    passage = Passage.of(pool, slots, next_tokens(PAST))
    assert passage is not None and passage.nbytes == pool.bytes_in_use
    passage.begin()
    with pytest.raises(ValueError, match="is being extended at layer 0"):
        passage.begin()
    with pytest.raises(ValueError, match="is being extended at layer 1"):
        backend.extend(*tokens(shape, 3), next_tokens(PAST), pool, 1, slots)
    passage.end()
    pool.take(slots, 1, next_tokens([count + 1 for count in PAST]))


def test_there_is_none_where_a_step_is_not_all_in_c() -> None:
    shape = SHAPES[1]
    dense = build("dense", {"impl": "torch"}, shape)
    assert Passage.of(*prepared(dense), next_tokens(PAST)) is None
    need_native(shape)
    dense = build("dense", {"impl": "native"}, shape)
    pool, slots = prepared(dense)
    assert Passage.of(pool, slots, Segments((1, 1, 2), PAST)) is None  # guesses


TABLES = ("histories", "starts", "states", "parts")
STATE = ("k", "v", "k_bytes", "v_bytes", "k_layer", "v_layer", "k_row", "v_row", "kept", "place")
WRONG: list[tuple[str, int, Callable[[int], int]]] = [
    *((f"{name}_bytes", 0, change) for name in TABLES for change in (lambda x: x - 8, lambda x: -x)),
    *((name, 0, change) for name in ("count", "layers", "sequences") for change in (lambda x: -x, lambda x: x + (1 << 62))),
    *((name, 0, lambda x: x + 1) for name in ("count", "sequences", "heads", "groups", "width")),
    ("wide", 0, lambda x: 2),
    *((name, 1, lambda x: -1) for name in STATE[2:]),
    *((name, 1, lambda x: x + (1 << 62)) for name in STATE[4:]),
    *((name, 1, lambda x: x - 64) for name in ("k_bytes", "v_bytes")),
    *((name, 1, lambda x: 0) for name in ("k", "v", "kept")),
    *((name, 2, lambda x: x + 1) for name in ("sequence", "kept", "columns")),
    *((name, 2, lambda x: -1) for name in ("sequence", "first", "count")),
]
HISTORY = ("sequence", "k", "v", "k_row", "v_row", "kept", "columns", "first", "count")


@pytest.mark.parametrize(("field", "where", "change"), WRONG, ids=[f"{n}-{w[0]}" for n, w in enumerate(WRONG)])
def test_what_does_not_fit_is_refused_and_nothing_is_touched(field: str, where: int, change: Callable[[int], int]) -> None:
    shape = SHAPES[0]
    need_native(shape)
    backend = build("dense", {"impl": "native"}, shape)
    pool, slots = prepared(backend)
    passage = Passage.of(pool, slots, next_tokens(PAST))
    assert passage is not None
    [(_, told)] = passage._told
    histories, _, table, *_ = told.kept
    call, last = softmax.Steps.from_buffer_copy(told.call), len(PAST) - 1
    if where == 0:
        setattr(call, field, change(getattr(call, field)))
    for at, names, rows in ((1, STATE, table), (2, HISTORY, histories)):
        if where == at:
            assert isinstance(rows, array)
            place = last * len(names) + names.index(field)
            rows[place] = change(rows[place])
    question, out = tokens(shape, len(PAST)), torch.full((len(PAST), 4, 64), 7.0, dtype=shape.dtype)
    states = [tensor.view(torch.int16) for slot in slots for tensor in pool.tensors(slot).values()]  # of what is no number, too
    before = [tensor.clone() for tensor in states]
    for threads in (0, 2):
        assert asked((told.answer, ctypes.addressof(call), LAYERS - 1), question, out, threads) != ""
    assert all(map(torch.equal, before, states))
    assert (out == 7).all()


FEATURES: list[tuple[str, Callable[[int], int]]] = [
    *((name, change) for name in ("states_bytes", "own_bytes") for change in (lambda x: x - 8, lambda x: -x)),
    *(("layers", change) for change in (lambda x: x + 1, lambda x: 0, lambda x: x + (1 << 62))),
    ("answer", lambda x: 0),
    ("step.near", lambda x: 0),
    *((f"step.{name}", lambda x: x - 4) for name in ("weights_bytes", "features_bytes", "near_bytes")),
    *(
        (f"step.{name}", change)
        for name in ("sequences", "heads", "groups", "width")
        for change in (lambda x: x + 1, lambda x: -x)
    ),
    *((f"step.{name}", lambda x: x + 32) for name in ("width", "count")),
]


@pytest.mark.parametrize(("field", "change"), FEATURES, ids=[f"{n}-{w[0]}" for n, w in enumerate(FEATURES)])
def test_of_sums_it_is_refused_likewise(field: str, change: Callable[[int], int]) -> None:
    shape, past = SHAPES[0], (700, 300)
    need_native(shape)
    pool, slots = prepared(build("performer", {"impl": "native", "features": 64, "local_chunk": 64}, shape), past)
    passage = Passage.of(pool, slots, next_tokens(past))
    assert passage is not None
    [(_, told)] = passage._told
    call = features.Steps.from_buffer_copy(told.call)
    owner, name = (call.step, field.removeprefix("step.")) if field.startswith("step.") else (call, field)
    setattr(owner, name, change(getattr(owner, name)))
    question, out = tokens(shape, len(past)), torch.full((len(past), 4, 64), 7.0, dtype=shape.dtype)
    states = [tensor.flatten().view(torch.uint8) for slot in slots for tensor in pool.tensors(slot).values()]
    before = [tensor.clone() for tensor in states]
    for threads in (0, 2):
        assert asked((told.answer, ctypes.addressof(call), LAYERS - 1), question, out, threads) != ""
    assert all(map(torch.equal, before, states))
    assert (out == 7).all()


def test_a_layer_or_a_question_that_does_not_fit_is_refused_too() -> None:
    shape = SHAPES[0]
    need_native(shape)
    pool, slots = prepared(build("dense", {"impl": "native"}, shape))
    passage = Passage.of(pool, slots, next_tokens(PAST))
    assert passage is not None
    (function, told, index), (q, k, v) = passage.at[1], tokens(shape, len(PAST))
    out = torch.empty_like(q)
    for at in (-1, LAYERS):
        assert "no such layer" in asked((function, told, at), (q, k, v), out)
    for wrong in ((q[1:], k, v), (q, k[1:], v), (q, k, v[1:]), (q, k[:, :1], v), (q, k, v[..., :32]), (q.float(), k, v)):
        assert asked((function, told, index), wrong, out) != ""
    assert "out must hold" in asked((function, told, index), (q, k, v), out[:2])
