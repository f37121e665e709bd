"""The cost laws against what really happens: the profiler's peak, and the count of pairs that `visible` names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attention import AttentionBackend, HeadShape, Segments, backend_class, build, names, reference
from attention.kernels.softmax import decode
from attention.memory import peak_bytes
from tests.attention.laws import need_native

MIB = 1 << 20
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "sliding_window": ({"window": 256, "sinks": 0}, {}, {"window": 1}, {"window": 3, "sinks": 200}),
    "longformer": ({"global_tokens": 64}, {"window": 5, "global_tokens": 0}, {"global_tokens": 600}),
    "bigbird": ({}, {"global_blocks": 1, "closing_blocks": 1}, {"block": 16, "random_blocks": 0}, {"block": 100}),
    "chunked": ({}, {"chunk": 100}),
    "topk": ({}, {"block": 32, "blocks": 4, "window": 100}),
    "distinct": ({}, {"kept": 100, "window": 200, "block": 16}, {"kept": 5000}),
    "performer": ({}, {"hyperbolic": True}, {"features": 32}, {"local_chunk": 1000}, {"local_chunk": 64, "features": 64}),
}
PLAIN = [(name, options) for name in names() for options in OPTIONS.get(name, ({},))]
CHOOSING = [case for case in PLAIN if "impl" in backend_class(case[0]).Options.model_fields]
CASES = [case for case in PLAIN if case not in CHOOSING]
CASES += [(name, {**options, "impl": impl}) for name, options in CHOOSING for impl in ("torch", "native")]


@pytest.fixture(autouse=True, scope="module")
def two_threads() -> Iterator[None]:
    """The laws of the readings in torch are those of two threads; on one they take less."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


SHAPES = (
    HeadShape(8, 8, 128, torch.bfloat16),
    HeadShape(8, 8, 64, torch.float32),
    HeadShape(4, 2, 64, torch.bfloat16),
    HeadShape(8, 8, 128, torch.bfloat16, kv=torch.int8),
)
SLACK = 64 << 10  # of a step: the libraries' own scratch, and the allocator's rounding of small things


def built(name: str, options: dict[str, Any], shape: HeadShape) -> AttentionBackend:
    if options.get("impl") == "native":
        need_native(shape)
    if shape.kv is not None and not backend_class(name).takes_int8:
        pytest.skip(f"{name} keeps nothing in 8 bits")
    return build(name, options, shape)


def near(law: int, measured: int, unsure: int = 0) -> bool:
    """Within 10 % or 1 MiB: the allocator's rounding and the libraries' own scratch are not ours to know."""
    return law - measured <= max(0.1 * measured, MIB) + unsure and measured - law <= max(0.1 * law, MIB)


def ones(shape: HeadShape, count: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = (shape.query_heads, shape.key_value_heads, shape.key_value_heads)
    return tuple(torch.ones(count, n, shape.head_width, dtype=shape.dtype) for n in heads)  # type: ignore[return-value]


def extending(backend: AttentionBackend, past: int, count: int) -> tuple[int, int]:
    """Peak bytes of `count` tokens behind a past, measured, and the state's bytes."""
    q, k, v = ones(backend.shape, past + count)
    pool = backend.new_pool(1, 1 << 32)
    slot = pool.allocate(past + count)
    if past:
        backend.extend(q[:past], k[:past], v[:past], Segments((past,)), pool, 0, [slot])
    decode._own.__dict__.clear()  # what a thread keeps from step to step counts when it is taken
    new, step = slice(past, None), Segments((count,), (past,))
    return peak_bytes(lambda: backend.extend(q[new], k[new], v[new], step, pool, 0, [slot])), pool.bytes_in_use


def test_the_profiler_sees_a_peak_that_is_known() -> None:
    assert peak_bytes(lambda: (torch.empty(MIB) + 1).sum()) == pytest.approx(8 * MIB, abs=64)
    assert peak_bytes(lambda: [torch.empty(MIB).sum() for _ in range(3)]) == pytest.approx(4 * MIB, abs=64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_whole_sequence_takes_what_the_law_states(name: str, options: dict[str, Any], shape: HeadShape) -> None:
    backend = built(name, options, shape)
    for count in (100, 1000, 4096):
        q, k, v = ones(shape, count)
        for causal in backend.directions:
            law = backend.cost(count, count, causal=causal).workspace_bytes
            measured = peak_bytes(lambda: backend.attend(q, k, v, Segments((len(q),)), causal=causal))  # noqa: B023
            assert near(law, measured), (count, causal, law, measured)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_chunk_takes_what_the_law_states(name: str, options: dict[str, Any], shape: HeadShape) -> None:
    backend = built(name, options, shape)
    if True not in backend.directions:
        pytest.skip(f"{name} has no causal form")
    for past, count in ((0, 4096), (3000, 512), (5000, 2048)):
        law = backend.cost(count, past + count, causal=True)
        measured, state = extending(backend, past, count)
        assert law.state_bytes == state
        # The law of a first chunk is that of a whole sequence, too, which makes its own sums.
        assert near(law.workspace_bytes, measured, 0 if past or backend.exact else state), (past, count, law, measured)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_decode_step_takes_what_the_law_states_within_a_factor_of_two(
    name: str, options: dict[str, Any], shape: HeadShape
) -> None:
    backend = built(name, options, shape)
    if True not in backend.directions:
        pytest.skip(f"{name} has no causal form")
    for past in (1, 300, 2048, 3000):
        law = backend.cost(1, past + 1, causal=True).workspace_bytes
        measured, _ = extending(backend, past, 1)
        assert law <= max(2 * measured, measured + SLACK) and measured <= max(2 * law, law + SLACK), (past, law, measured)


@pytest.mark.parametrize(("name", "options"), PLAIN)
def test_the_flops_of_an_exact_backend_are_those_of_the_pairs_it_sees(name: str, options: dict[str, Any]) -> None:
    backend = build(name, options, HeadShape(4, 2, 64))
    if not backend.exact:
        pytest.skip(f"{name} is counted by its products, not by pairs")
    count = 3000
    for causal in backend.directions:
        pairs = int(reference.visible(backend, torch.arange(count), count, causal).sum())
        law = backend.cost(count, count, causal=causal).flops
        assert law == pytest.approx(4 * 4 * 64 * pairs, rel=0.25)  # the law leaves the sequence's two ends out


def test_linear_work_grows_with_the_tokens_and_dense_work_with_their_square() -> None:
    for name in names():
        backend = build(name, {}, HeadShape(4, 2, 64))
        causal = backend.directions[0]
        ratio = backend.cost(65536, 65536, causal=causal).flops / backend.cost(16384, 16384, causal=causal).flops
        if name == "topk":  # whose look at the bounds of all blocks grows with the square, and is a small part
            assert 4 < ratio < 10
        else:
            assert ratio == pytest.approx(16 if name == "dense" else 4, rel=0.1)
