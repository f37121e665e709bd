"""The allow-list, and how far a lane alone decides what answers a layer and what is kept of a sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

import attention
from attention import AttentionBackend, Segments, StatePool
from service.engine.allowlist import Backends, Lane
from service.engine.forecast import Course
from service.model.transformer import Transformer
from tests.engine import world
from tests.engine.world import complete, completion, embed, embedding, is_empty, prompt, running


class Whole(Lane):
    """A lane whose every token sees all of its sequence, which passes through the model at once; nothing is kept."""

    def answering(
        self,
        layer: int,
        question: tuple[Tensor, Tensor, Tensor],
        segments: Segments,
        slots: Sequence[int],
        out: Tensor,
        by_steps: bool = False,
    ) -> Iterator[None]:
        assert not any(segments.past), "a piece of a sequence"
        out.copy_(self.backend.attend(*question, segments, causal=False))
        return iter(())


def hidden(model: Transformer, by_layer: Sequence[AttentionBackend], tokens: list[int], causal: bool) -> Tensor:
    """Last hidden states by one whole forward, without state."""
    ids, segments = torch.tensor(tokens), Segments((len(tokens),))
    attend = [partial(backend.attend, segments=segments, causal=causal) for backend in by_layer]
    return model.hidden(ids, torch.arange(len(ids)), lambda layer, q, k, v: attend[layer](q, k, v))


async def test_a_lane_may_have_a_backend_and_a_state_for_each_layer() -> None:
    model = world.make_model(torch.float64)
    backends = world.make_backends(model, dense={}, sliding_window={"window": 9, "sinks": 2})
    by_layer = list(backends.by_name.values())

    expected = prompt(70)
    for _ in range(12):
        expected.append(int(model.logits(hidden(model, by_layer, expected, causal=True)[-1:]).argmax()))
    async with running(model, backends, chunk_tokens=16) as engine:
        own = engine._admission.lanes["dense"]
        engine._admission.lanes = {"dense": Lane("dense", own.backend, own.course, StatePool(by_layer, 2**24))}
        deltas = await complete(engine, completion(prompt(70), n=2, max_tokens=12))
        for index in (0, 1):
            assert [t for delta in deltas if delta.index == index for t in delta.tokens] == expected[70:]
        assert is_empty(engine)


async def test_a_lane_may_attend_both_ways_over_whole_sequences() -> None:
    model = world.make_model(torch.float64)
    backends = world.make_backends(model, dense={})

    async with running(model, backends, chunk_tokens=16) as engine:
        own = engine._admission.lanes["dense"]
        at_once = Course(model, own.course.pace, world.MAX_LENGTH, world.MAX_LENGTH)
        engine._admission.lanes = {"dense": Whole("dense", own.backend, at_once, own.pool)}
        answer = torch.tensor(await embed(engine, embedding(prompt(200))), dtype=torch.float64)
    mean = hidden(model, [own.backend] * 2, prompt(200), causal=False).mean(0)
    expected = torch.nn.functional.normalize(mean, dim=0)
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=0)  # sums are kept in float32


def test_an_allow_list_names_a_default_it_has_and_only_causal_backends() -> None:
    model = world.make_model()
    with pytest.raises(ValueError, match="dense"):
        world.make_backends(model, "performer", dense={})
    with pytest.raises(ValueError, match="at least one"):
        Backends({}, "auto")
    encoder = attention.build("longformer", None, model.head_shape())
    with pytest.raises(ValueError, match="bidirectional only: longformer"):
        Backends({"longformer": encoder}, "longformer")
