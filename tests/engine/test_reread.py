"""The served truth on real tokens: what was served last is read again, and each layer held to its definition."""

from __future__ import annotations

import pytest
import torch

import attention
from tests.engine import world
from tests.engine.world import complete, completion, embed, embedding, is_empty, prompt, running


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_every_backend_is_right_on_what_was_served(dtype: torch.dtype) -> None:
    model = world.make_model(dtype)
    async with running(model) as engine:
        dense = engine.backends.by_name["dense"]
        assert await engine.check_served(dense) is None  # nothing was served yet
        await complete(engine, completion(prompt(300), max_tokens=20))
        for backend in engine.backends.by_name.values():
            found = await engine.check_served(backend)
            assert found is not None and found.passed and found.error > 0, backend.name
        assert is_empty(engine)


async def test_what_is_read_again_is_the_tail_of_the_last_answer() -> None:
    async with running() as engine:
        tokens = prompt(300)
        (*_, last) = await complete(engine, completion(tokens, max_tokens=5))
        assert last.finish_reason == "length"
        assert engine._delivery.tail[:-5].tolist() == tokens[-251:]
        await embed(engine, embedding(prompt(40, seed=1)))
        assert engine._delivery.tail.tolist() == prompt(40, seed=1)


async def test_a_backend_that_answers_otherwise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    sliding = attention.backend_class("sliding_window")
    async with running() as engine:
        await complete(engine, completion(prompt(200), max_tokens=5))
        backend = engine.backends.by_name["sliding_window"]
        monkeypatch.setattr(sliding, "visible", lambda self, i, j, length: (i - j).abs() <= 1)
        found = await engine.check_served(backend)
        assert found is not None and not found.passed


async def test_an_answer_that_is_no_number_is_found() -> None:
    model = world.make_model()
    async with running(model) as engine:
        await complete(engine, completion(prompt(50), max_tokens=2))
        with torch.no_grad():
            model.stack[1].qkv.weight.fill_(float("nan"))
        found = await engine.check_served(engine.backends.by_name["dense"])
        assert found is not None and not found.passed
