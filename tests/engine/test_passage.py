"""Decode steps of an engine that go through all layers in one call: the answers of layer by layer, within the law of bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from attention import Passage, Segments
from service.engine.allowlist import Lane
from service.model import native
from service.model.checkpoint import load
from tests.engine import world
from tests.engine.world import completion, running, tokens_of

BACKENDS = {
    "dense": {},
    "sliding_window": {"window": 100, "sinks": 4},
    "performer": {"features": 64, "local_chunk": 64},
    "linear": {},
    "distinct": {"window": 64, "kept": 32, "block": 16},
}
LENGTHS = (1, 60, 190, 300)


@pytest.mark.parametrize("multiple", [1, 4])
async def test_streams_answer_as_layer_by_layer_and_take_no_more_than_is_predicted(
    multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.engine.engine.row_multiple", lambda model: multiple)
    if reason := native.KERNEL.obstacle(torch.bfloat16, torch.device("cpu")):
        pytest.skip(reason)
    loaded = load(dtype="bfloat16")
    if not loaded.model.takes_passage:
        pytest.skip("oneDNN packs matrices otherwise here")
    made, passed, answers, watcher = Lane.passage, list[str](), list[list[list[int]]](), world.Watcher()
    rows, passing = list[int](), native.PackedStack.passing

    def noted(lane: Lane, slots: list[int], segments: Segments) -> Passage | None:
        passage = made(lane, slots, segments)
        passed.extend([lane.name] * (passage is not None))
        return passage

    def counted(stack: native.PackedStack, x: Tensor, turns: Sequence[Any], passage: Passage) -> Iterator[None]:
        rows.append(len(x))
        return passing(stack, x, turns, passage)

    monkeypatch.setattr(native.PackedStack, "passing", counted)
    for told in (noted, lambda *_: None):
        monkeypatch.setattr(Lane, "passage", told)
        backends = world.make_backends(loaded.model, **BACKENDS)
        async with running(loaded.model, backends, watcher, loaded.tokenizer, memory_sample_share=1) as engine:
            asked = [
                completion([7 + n % 90 for n in range(count)], name, max_tokens=40) for name in BACKENDS for count in LENGTHS
            ]
            answers.append(await asyncio.gather(*(tokens_of(engine, request) for request in asked)))
    assert answers[0] == answers[1]
    assert set(passed) == set(BACKENDS)
    assert len(rows) == len(passed), "each went all the way"
    assert 1 in rows, "no row stands beside it to fill up a multiple"
    for step in watcher.steps:
        assert step.measured_bytes is not None and step.predicted_bytes is not None
        assert step.measured_bytes <= max(1.1 * step.predicted_bytes, step.predicted_bytes + 2**20) + 16 * step.tokens, step
