"""Hundreds of requests, many of which leave: nothing stays behind."""

from __future__ import annotations

import asyncio
import gc
import random
from contextlib import aclosing

import pytest

from service.machine import resident_bytes, trim
from tests.engine import world
from tests.engine.world import completion, embedding, is_empty, prompt, running, until


@pytest.mark.slow
async def test_after_500_requests_of_which_200_left_all_memory_is_back() -> None:
    watcher = world.Watcher()
    async with running(watcher=watcher, max_waiting_requests=600, max_waiting_tokens=10**6) as engine:

        async def play(seed: int, leaves_after: int | None) -> None:
            source = random.Random(seed)
            tokens, backend = prompt(source.randint(1, 400), seed), source.choice(list(world.BACKENDS))
            request = (
                embedding(tokens, backend) if seed % 5 == 0 else completion(tokens, backend, max_tokens=source.randint(1, 30))
            )
            async with aclosing(engine.submit(request)) as answer:
                if leaves_after is not None:
                    await asyncio.sleep(source.random() * leaves_after / 20)
                    return
                async for _ in answer:
                    pass

        async def storm(seed: int) -> None:
            await asyncio.gather(*(play(seed * 1000 + i, leaves_after=i % 5 if i % 5 < 2 else None) for i in range(250)))
            await until(lambda: is_empty(engine), 60)
            watcher.steps.clear()
            gc.collect()
            trim()

        await storm(0)  # torch, the allocator and the caches reach their working size
        before = resident_bytes()
        await storm(1)
        assert resident_bytes() <= 1.02 * before
    assert len(watcher.ended) == 500


@pytest.mark.slow
async def test_after_50_swaps_beside_answers_all_memory_is_back() -> None:
    model = world.make_model()
    async with running(model, memory_sample_share=1) as engine:

        async def swaps(count: int) -> int:
            for turn in range(count):
                stream = engine.submit(completion(prompt(40), max_tokens=6))
                await anext(stream)
                window, features = 64 + turn % 7, 32 + 32 * (turn % 2)
                options = {"dense": {}, "sliding_window": {"window": window}, "performer": {"features": features}}
                await engine.swap(world.make_backends(model, **options))
                async for _ in stream:
                    pass
            await until(lambda: is_empty(engine))
            gc.collect()
            trim()
            return resident_bytes()

        await swaps(10)  # torch, the allocator and the caches reach their working size
        before = await swaps(25)
        assert await swaps(25) <= 1.02 * before
