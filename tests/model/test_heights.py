"""A packed model's products come in few heights, so that the kernels oneDNN keeps for each are few."""

from __future__ import annotations

import asyncio

import pytest
import torch

from service.model.projection import can_pack
from service.model.transformer import Transformer
from tests.engine.world import complete, completion, make_model, prompt, running, tokens_of

pytestmark = pytest.mark.skipif(not can_pack(torch.zeros(1, dtype=torch.bfloat16)), reason="oneDNN does not multiply here")


@pytest.fixture
def packed() -> Transformer:
    model = make_model(torch.bfloat16)
    model.pack()
    return model


def test_a_height_has_room_for_its_rows_and_wastes_few(packed: Transformer) -> None:
    for rows in range(1, 2000):
        assert rows <= packed.height(rows) <= rows + max(min(31, rows // 2), rows // 16)
        assert packed.height(packed.height(rows)) == packed.height(rows)
    assert len({packed.height(rows) for rows in range(1, 513)}) == 26
    assert len({packed.height(rows) for rows in range(513, 8193)}) == 64


def test_a_model_that_is_not_packed_is_not_padded() -> None:
    assert make_model().height(13) == 13


async def test_no_request_meets_a_height_that_was_not_warmed_up(packed: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    met: set[tuple[str, int]] = set()

    def watch(name: str) -> None:
        inner = getattr(Transformer, name)

        def outer(self: Transformer, first: torch.Tensor, *rest: object) -> object:
            met.add((name, len(first)))
            return inner(self, first, *rest)

        monkeypatch.setattr(Transformer, name, outer)

    watch("stages")
    watch("logits")
    async with running(packed, chunk_tokens=100, max_sequences=7) as engine:
        met.clear()
        for length in range(1, 250, 7):
            await complete(engine, completion([5] * length, max_tokens=2, logprobs=1, echo=True))
        assert {rows for name, rows in met if name == "stages"} <= {packed.height(n) for n in range(1, 101)}
        assert {rows for name, rows in met if name == "logits"} <= {packed.height(n) for n in range(1, 65)}
        assert len(met) > 10


async def test_an_answer_of_a_packed_model_is_the_same_alone_and_in_company(packed: Transformer) -> None:
    requests = [completion(prompt(3 + 29 * i), max_tokens=9) for i in range(7)]
    async with running(packed, chunk_tokens=64) as engine:
        alone = [await tokens_of(engine, completion(request.tokens, max_tokens=9)) for request in requests]
        assert await asyncio.gather(*(tokens_of(engine, request) for request in requests)) == alone
