"""Backends as encoders are served by them: whole texts both ways, no state, the cost law's bytes; and biases by distance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attention import NATIVE, HeadShape, Segments, build, names, reference, relative, truth, whole
from attention.interface import AttentionBackend
from attention.layered import PerLayer
from attention.memory import peak_bytes
from tests.attention.laws import need_native

SHAPE = HeadShape(4, 2, 16)
BUCKETS = tuple(tuple(row) for row in torch.randn(4, 32, generator=torch.Generator().manual_seed(3)).tolist())
BOTH_WAYS = [name for name in names() if False in build(name, None, SHAPE).directions]


def some(tokens: int, shape: HeadShape = SHAPE) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    heads = (shape.query_heads, shape.key_value_heads, shape.key_value_heads)
    q, k, v = (torch.randn(tokens, count, shape.head_width, generator=generator).to(shape.dtype) for count in heads)
    return q, k, v


def served(backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, segments: Segments, layer: int = 0) -> Tensor:
    pool = backend.new_pool(len(backend.layers) if isinstance(backend, PerLayer) else 1, 0)
    return backend.extend(q, k, v, segments, pool, layer, [pool.allocate(length) for length in segments.lengths])


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_a_whole_text_is_answered_as_attend_answers_it_and_nothing_is_kept(name: str) -> None:
    backend, segments = build(name, None, SHAPE), Segments((1, 300, 40))
    encoder, given = whole(backend), some(341)
    assert torch.equal(served(encoder, *given, segments), backend.attend(*given, segments, causal=False))
    assert encoder.state_bytes(10_000) == 0 and (encoder.name, encoder.exact) == (name, backend.exact)
    cost, inner = encoder.cost(300, 300, causal=True), backend.cost(300, 300, causal=False)
    assert (cost.flops, cost.workspace_bytes, cost.state_bytes) == (inner.flops, inner.workspace_bytes, 0)


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_texts_that_share_calls_of_the_kernel_are_answered_as_each_alone(dtype: torch.dtype, width: int) -> None:
    shape = HeadShape(4, 2, width, dtype)
    need_native(shape)
    encoder, segments = whole(build("dense", {"impl": "native"}, shape)), Segments((1, 300, 40, 700, 2, 513))
    q, k, v = some(segments.total, shape)
    together = served(encoder, q, k, v, segments)
    for start, end, _ in segments.spans():
        alone = served(encoder, q[start:end], k[start:end], v[start:end], Segments((end - start,)))
        assert torch.equal(together[start:end], alone)


def test_each_layer_of_native_is_read_whole_under_its_own_window() -> None:
    backend, segments, given = build(NATIVE, {"windows": (5, None), "sinks": 1}, SHAPE), Segments((40,)), some(40)
    assert isinstance(backend, PerLayer)
    encoder = whole(backend)
    for layer, inner in enumerate(backend.layers):
        expected = inner.attend(*given, segments, causal=False)
        assert torch.equal(served(encoder, *given, segments, layer), expected)
    narrow, wide = (inner.visible(torch.tensor(20), torch.arange(40), 40).sum() for inner in backend.layers)
    assert (narrow, wide) == (12, 40), "five on either side, itself and the sink"


def test_a_piece_behind_another_is_refused() -> None:
    encoder = whole(build("dense", None, SHAPE))
    pool = encoder.new_pool(1, 0)
    slot = pool.allocate(20)
    encoder.extend(*some(10), Segments((10,)), pool, 0, [slot])
    with pytest.raises(ValueError, match="reads a text at once"):
        encoder.extend(*some(10), Segments((10,), (10,)), pool, 0, [slot])


def test_a_backend_that_is_causal_only_serves_no_encoder() -> None:
    with pytest.raises(ValueError, match="topk is causal only"):
        whole(build("topk", {}, SHAPE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_with_a_bias_by_distance_are_softmax_over_their_sum(dtype: torch.dtype) -> None:
    """Against one full matrix in float64, on both sides of the farthest distance that has a bias of its own."""
    shape, tokens = HeadShape(4, 2, 16, dtype), 2 * relative.REACH + 45
    (kind,) = build(NATIVE, {"windows": (None,), "score_bias": BUCKETS}, shape).counts  # type: ignore[attr-defined]
    q, k, v = some(tokens, shape)
    ours = kind.attend(q, k, v, Segments((tokens,)), causal=False)
    distances = torch.arange(tokens)[None] - torch.arange(tokens)[:, None]
    found = relative.table(BUCKETS)[:, distances.clamp(-relative.REACH, relative.REACH) + relative.REACH].double()
    scores = torch.einsum("ihd,jhd->hij", q.double(), k.double().repeat_interleave(2, 1)) / 4 + found
    expected = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v.double().repeat_interleave(2, 1))
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=truth.BOUNDS[dtype])
    torch.testing.assert_close(reference.answer(kind, q, k, v, causal=False), expected, rtol=0, atol=1e-9)


def test_near_distances_have_a_bias_each_and_far_ones_share_theirs() -> None:
    table = relative.table([list(range(32))])[0]
    middle = relative.REACH
    assert table[middle - 7 : middle + 8].tolist() == [7, 6, 5, 4, 3, 2, 1, 0, *range(17, 24)]
    assert table[0] == table[5] == 15 and table[-1] == 31


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biased_scores_take_no_more_than_their_law_states_and_not_much_less(dtype: torch.dtype) -> None:
    shape, tokens = HeadShape(8, 8, 64, dtype), 1000
    heads = tuple(BUCKETS[i % 4] for i in range(8))
    (kind,) = build(NATIVE, {"windows": (None,), "score_bias": heads}, shape).counts  # type: ignore[attr-defined]
    given, segments = some(tokens, shape), Segments((tokens,))
    with torch.inference_mode():
        kind.attend(*given, segments, causal=False)
        measured = peak_bytes(lambda: kind.attend(*given, segments, causal=False))
    law = kind.cost(tokens, tokens, causal=False).workspace_bytes
    assert measured <= 1.05 * law + (1 << 18), (measured, law)
    assert law <= 1.5 * measured + (1 << 18), (measured, law)


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ({"windows": (7,)}, "score_bias is for layers that see everything"),
        ({"windows": (None,), "score_cap": 2.0}, "score_bias is for layers that see everything"),
        ({"windows": (None,), "impl": "native"}, "biased scores are computed by torch"),
    ],
)
def test_biases_go_with_nothing_that_they_are_not_computed_with(others: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build(NATIVE, {"score_bias": BUCKETS, **others}, SHAPE)
