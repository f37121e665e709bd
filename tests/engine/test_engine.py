"""The engine from outside: what a caller may rely on, on a tiny real model."""

from __future__ import annotations

import asyncio

import pytest
import torch

from attention import Segments
from tests.engine import world
from tests.engine.world import complete, completion, embed, embedding, prompt, running, tokens_of


def greedy_oracle(model, backend, tokens: list[int], count: int) -> list[int]:
    """Greedy tokens by whole forwards without any state, one per token: slow and plain."""
    out: list[int] = []
    for _ in range(count):
        ids = torch.tensor(tokens + out)
        segments = Segments((len(ids),))
        hidden = model.hidden(ids, torch.arange(len(ids)), lambda i, q, k, v: backend.attend(q, k, v, segments, causal=True))
        out.append(int(model.logits(hidden[-1:]).argmax()))
    return out


@pytest.mark.parametrize("name", world.BACKENDS)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 65, 300])
async def test_greedy_decode_through_chunks_and_states_equals_whole_forwards(name, length):
    model = world.make_model(torch.float64)
    backends = world.make_backends(model)
    expected = greedy_oracle(model, backends.by_name[name], prompt(length), 12)
    async with running(model, backends, max_chunk_tokens=16) as engine:
        assert await tokens_of(engine, completion(prompt(length), name, max_tokens=12)) == expected


async def test_an_embedding_is_the_unit_mean_of_the_last_hidden_states():
    model = world.make_model(torch.float64)
    backends = world.make_backends(model)
    ids, segments = torch.tensor(prompt(200)), Segments((200,))
    dense = backends.by_name["dense"]
    hidden = model.hidden(ids, torch.arange(200), lambda i, q, k, v: dense.attend(q, k, v, segments, causal=True))
    expected = torch.nn.functional.normalize(hidden.mean(0), dim=0)
    async with running(model, backends, max_chunk_tokens=64) as engine:
        answer = torch.tensor(await embed(engine, embedding(prompt(200))), dtype=torch.float64)
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=0)  # sums are kept in float32
