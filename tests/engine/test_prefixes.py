"""Prefix states: an answer that goes on from one is the answer without it, to the bit, and their bytes are in nobody's way."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.engine.engine import Engine
from service.engine.pins import Pin
from service.engine.prefixes import Prefixes
from service.engine.request import InvalidRequest, NeverFits, PrefixNotKept, Request
from tests.engine import world
from tests.engine.world import complete, completion, embed, embedding, is_empty, prompt, running, until

CHUNK = 32
BACKENDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "sliding_window": {"window": 70, "sinks": 4},
    "performer": {"features": 16, "local_chunk": 64},
    "chunked": {"chunk": 48},
    "linear": {},
    "bigbird": {"block": 16},
    "topk": {"block": 8, "blocks": 3, "window": 40},
    "distinct": {"window": 40, "kept": 60, "block": 16},
    "layered": {"layers": {"0": {"sliding_window": {"window": 70}}, "1": {"topk": {"block": 8, "blocks": 3, "window": 40}}}},
}
WHOLE = [prompt(400, seed) for seed in range(2)]


def asked(tokens: list[int], backend: str = "dense", owner: str = "", **sampling: Any) -> Request:
    request = completion(tokens, backend, **({"max_tokens": 4, "logprobs": 2} | sampling))
    request.owner = owner
    return request


async def answer(engine: Engine, request: Request) -> list[tuple[Any, ...]]:
    """Tokens and log-probabilities of a completion, by sample."""
    deltas = await complete(engine, request)
    told = [(delta.index, *each) for delta in deltas for each in zip(delta.tokens, delta.logprobs or (), strict=True)]
    return sorted(told, key=lambda each: each[0])


async def cached(engine: Engine, request: Request) -> int:
    """How many tokens of its prompt a completion did not process."""
    await complete(engine, request)
    return request.timings.cached_tokens


@dataclass
class Pair:
    """An engine that keeps few prefixes, and one that keeps none."""

    loop: asyncio.AbstractEventLoop
    keeping: Engine
    plain: Engine

    def run(self, call: Any) -> Any:
        return self.loop.run_until_complete(call)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    loop, stack, model = asyncio.new_event_loop(), AsyncExitStack(), world.make_model()

    async def start(share: float) -> Engine:
        backends = world.make_backends(model, **BACKENDS)
        config: dict[str, Any] = {"chunk_tokens": CHUNK, "prefix_share": share, "memory_budget_bytes": 16 * 2**20}
        return await stack.enter_async_context(running(model, backends, **config))

    yield Pair(loop, loop.run_until_complete(start(0.02)), loop.run_until_complete(start(0)))
    loop.run_until_complete(stack.aclose())
    loop.close()


REQUESTS = st.tuples(
    st.sampled_from(sorted(BACKENDS)),
    st.integers(0, 1),  # of which text
    st.integers(1, 400),  # of its tokens
    st.integers(0, 40),  # and so many of another
    st.sampled_from(["alone", "beside", "cancelled", "sampled"]),
    st.sampled_from(["", "ann"]),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(REQUESTS, min_size=2, max_size=8))
def test_a_kept_prefix_never_changes_an_answer(pair: Pair, calls: list[tuple[str, int, int, int, str, str]]) -> None:
    pair.keeping.forget_prefixes()
    for backend, text, count, more, way, owner in calls:
        tokens = WHOLE[text][:count] + prompt(more, seed=7 + count)
        sampling = {"temperature": 1.0, "seed": 5} if way == "sampled" else {}
        request = asked(tokens, backend, owner, **sampling)
        if way == "cancelled":
            pair.run(abandon(pair.keeping, request))
            continue
        wanted = pair.run(answer(pair.plain, asked(tokens, backend, **sampling)))
        if way == "beside":
            twins = asyncio.wait_for(together(pair.keeping, request, asked(tokens, backend, owner)), 60)
            assert all(found == wanted for found in pair.run(twins))
        else:
            assert pair.run(answer(pair.keeping, request)) == wanted
        assert request.timings.cached_tokens % CHUNK == 0 and request.timings.cached_tokens < len(tokens)
    prefixes = pair.keeping._prefixes
    assert sum(pair.keeping.snapshot().prefix_bytes.values()) == prefixes.num_bytes <= prefixes.limit
    pair.run(until_forgotten(pair.keeping))


async def together(engine: Engine, *requests: Request) -> list[Any]:
    return await asyncio.gather(*(answer(engine, each) for each in requests))


async def abandon(engine: Engine, request: Request) -> None:
    """Hang up once its processing has begun."""
    async with aclosing(engine.submit(request)):
        await until(lambda: request.timings.admitted_at is not None)
    await until(lambda: is_empty(engine))


async def until_forgotten(engine: Engine) -> None:
    engine.forget_prefixes()
    await until(lambda: not any(engine.snapshot().prefix_bytes.values()))
    assert not len(engine._prefixes) and not engine._prefixes._serving and not engine._prefixes.num_bytes


@pytest.mark.parametrize("backend", sorted(BACKENDS))
async def test_the_next_question_about_a_text_pays_for_the_question_alone(backend: str) -> None:
    model = world.make_model()
    async with running(model, world.make_backends(model, **BACKENDS), chunk_tokens=CHUNK) as engine:
        text = WHOLE[0][:300]
        assert await cached(engine, asked(text + prompt(20, 1), backend)) == 0
        again = asked(text + prompt(20, 2), backend)
        assert engine.plan(again).cached_tokens == 288
        before = engine.plan(asked(prompt(320, 9), backend)).predicted_seconds["prefill"]
        assert engine.plan(again).predicted_seconds["prefill"] < before
        assert await cached(engine, again) == 288
        assert sum(chunk.tokens for chunk in again.timings.chunks) == 320 - 288
        levels = engine.snapshot()
        assert (levels.prefix_hits, levels.prefix_misses) == (1, 1) and levels.prefix_bytes[backend] > 0
        assert is_empty(engine)


@pytest.mark.parametrize("backend", ["sliding_window", "linear"])
async def test_a_beginning_that_two_prompts_share_is_kept_for_the_third(backend: str) -> None:
    model = world.make_model()
    async with running(model, world.make_backends(model, **BACKENDS), chunk_tokens=CHUNK) as engine:
        found = [await cached(engine, asked(WHOLE[0][:100] + prompt(200, seed), backend)) for seed in (1, 2, 3)]
    assert found == [0, 0, 96]


async def test_dense_keeps_one_state_for_all_beginnings_of_a_text() -> None:
    async with running(chunk_tokens=CHUNK) as engine:
        for count in (100, 200, 400):
            await complete(engine, asked(WHOLE[0][:count]))
        assert len(engine._prefixes) == 1
        assert [await cached(engine, asked([*WHOLE[0][:count], 1])) for count in (70, 150, 390)] == [64, 128, 384]


async def test_one_keys_prefix_is_no_others_unless_the_config_says_so() -> None:
    for is_shared, wanted in ((False, [0, 0, 288]), (True, [0, 288, 288])):
        async with running(chunk_tokens=CHUNK, prefix_shared=is_shared) as engine:
            found = [await cached(engine, asked(WHOLE[0][:300], owner=owner)) for owner in ("ann", "bob", "ann")]
            assert found == wanted
            assert engine.plan(asked(WHOLE[0][:300], owner="eve")).cached_tokens == (288 if is_shared else 0)


async def test_who_must_see_the_whole_prompt_goes_on_from_nothing_and_leaves_nothing() -> None:
    async with running(chunk_tokens=CHUNK) as engine:
        await complete(engine, asked(WHOLE[0][:300], echo=True))
        await embed(engine, embedding(WHOLE[0][:300], "dense"))
        assert len(engine._prefixes) == 0
        await complete(engine, asked(WHOLE[0][:300]))
        scored, other = asked(WHOLE[0][:300], echo=True), embedding(WHOLE[0][:300], "dense")
        deltas = await complete(engine, scored)
        await embed(engine, other)
        assert sum(len(delta.logprobs or ()) for delta in deltas) == 304
        assert scored.timings.cached_tokens == other.timings.cached_tokens == 0


async def test_kept_prefixes_make_room_before_anybody_waits() -> None:
    async with running(chunk_tokens=CHUNK, prefix_share=1) as engine:
        budget = 3 * engine.plan(completion(WHOLE[0], max_tokens=1500)).needed_bytes
    async with running(chunk_tokens=CHUNK, prefix_share=1, memory_budget_bytes=budget) as engine:
        for seed in range(40):
            await complete(engine, asked(prompt(400, seed)))
        levels = engine.snapshot()
        held = sum(levels.prefix_bytes.values())
        assert levels.prefix_evictions > 0 and 0.5 * budget < held <= budget
        three = [completion(prompt(400, 50 + seed), max_tokens=1500) for seed in range(3)]
        assert all(engine.plan(each).verdict == "runs" for each in three)
        answers = [engine.submit(each) for each in three]
        await until(lambda: engine.snapshot().running == 3)
        levels = engine.snapshot()
        assert levels.bytes_in_use + sum(levels.prefix_bytes.values()) <= budget < levels.bytes_in_use + held
        for each in answers:
            await each.aclose()
        await until(lambda: is_empty(engine))


async def test_a_prefix_for_which_there_is_no_room_beside_its_reader_is_computed_again() -> None:
    async with running(chunk_tokens=CHUNK) as engine:
        needed = engine.plan(asked(WHOLE[0], max_tokens=4)).needed_bytes
    async with running(chunk_tokens=CHUNK, prefix_share=1, memory_budget_bytes=needed) as engine:
        await complete(engine, asked(WHOLE[0][:200]))
        assert len(engine._prefixes) == 1
        assert await cached(engine, asked(WHOLE[0])) == 0
        assert engine.snapshot().prefix_evictions == 1


async def test_what_saves_least_per_byte_goes_first() -> None:
    async with running(chunk_tokens=CHUNK, prefix_share=1) as engine:
        await complete(engine, asked(WHOLE[0][:64]))
        await complete(engine, asked(WHOLE[1]))
        await complete(engine, asked(WHOLE[0], "sliding_window"))
        prefixes: Prefixes = engine._prefixes
        kept_before = list(prefixes._kept)
        worths = sorted(prefixes._kept, key=lambda kept: kept.worth)
        prefixes.make_room(prefixes.num_bytes - 1)
        assert prefixes._kept == [kept for kept in kept_before if kept is not worths[0]]


async def test_a_switch_lets_go_of_what_was_kept_under_other_options() -> None:
    model = world.make_model()
    async with running(model, world.make_backends(model), chunk_tokens=CHUNK) as engine:
        await complete(engine, asked(WHOLE[0]))
        await engine.swap(world.make_backends(model, dense={"impl": "torch"}))
        await until(lambda: len(engine._prefixes) == 0)
        assert await cached(engine, asked(WHOLE[0])) == 0


async def test_a_state_that_cannot_be_kept_costs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(chunk_tokens=CHUNK) as engine:
        lane = engine._admission.lanes["dense"]

        def refuse(*args: Any) -> int:
            raise MemoryError

        monkeypatch.setattr(type(lane), "keep", refuse)
        assert len(await answer(engine, asked(WHOLE[0]))) > 0
        assert len(engine._prefixes) == 0 and engine._prefixes.num_bytes == 0 and is_empty(engine)


async def test_nothing_is_kept_where_the_config_says_so() -> None:
    async with running(chunk_tokens=CHUNK, prefix_share=0) as engine:
        assert [await cached(engine, asked(WHOLE[0])) for _ in range(2)] == [0, 0]
        assert engine.snapshot().prefix_misses == 0


async def pinned(engine: Engine, tokens: list[int], backend: str = "dense", owner: str = "", seconds: float = 600) -> Pin:
    pin, request = engine.pin(asked(tokens, backend, owner), seconds)
    await complete(engine, request)
    return pin


@pytest.mark.parametrize("backend", sorted(BACKENDS))
async def test_a_pinned_beginning_outlives_what_else_is_kept(backend: str) -> None:
    model = world.make_model()
    made = world.make_backends(model, **BACKENDS)
    async with running(model, made, chunk_tokens=CHUNK) as engine:
        budget = 8 * engine.plan(asked(WHOLE[0], backend)).needed_bytes
        share = min(1.0, 4.5 * engine._admission.lanes[backend].state_bytes(400) / budget)
    async with running(model, made, chunk_tokens=CHUNK, prefix_share=share, memory_budget_bytes=budget) as engine:
        pin = await pinned(engine, WHOLE[0][:330], backend)
        assert (pin.tokens, pin.lane.name) == (320, backend) and pin.num_bytes == pin.lane.state_bytes(320)
        for seed in range(6):
            await complete(engine, asked(prompt(400, 100 + seed), backend))
        assert engine.snapshot().prefix_evictions > 0
        assert engine.pins("") == {pin: True}
        assert await cached(engine, asked(WHOLE[0][:320] + prompt(20, 7), backend)) == 320


@pytest.mark.parametrize("backend", sorted(BACKENDS))
async def test_a_pin_is_met_exactly_where_a_longer_state_serves_already(backend: str) -> None:
    model = world.make_model()
    async with running(model, world.make_backends(model, **BACKENDS), chunk_tokens=CHUNK, prefix_share=1) as engine:
        await complete(engine, asked(WHOLE[0], backend))
        pin = await pinned(engine, WHOLE[0][:200], backend)
        assert engine.pins("") == {pin: True} and pin.tokens == 192
        await complete(engine, asked(WHOLE[0], backend))
        assert engine.pins("") == {pin: True}


async def test_a_pinned_beginning_makes_room_for_a_request_and_comes_back_with_the_next() -> None:
    async with running(chunk_tokens=CHUNK, prefix_share=1) as engine:
        budget = engine.plan(asked(WHOLE[0], max_tokens=1000)).needed_bytes
    async with running(chunk_tokens=CHUNK, prefix_share=1, memory_budget_bytes=budget) as engine:
        pin = await pinned(engine, WHOLE[0])
        await complete(engine, asked(WHOLE[1], max_tokens=1000, stop_token_ids=tuple(range(257))))
        assert engine.pins("") == {pin: False}
        await complete(engine, asked(WHOLE[0]))
        assert engine.pins("") == {pin: True}


async def test_an_ended_pin_leaves_nothing() -> None:
    async with running(chunk_tokens=CHUNK) as engine:
        first, second = [await pinned(engine, WHOLE[0]) for _ in range(2)]
        engine.unpin(first)
        await asyncio.sleep(0.05)
        assert engine.pins("") == {second: True}  # which holds the same state
        engine.unpin(second)
        await until(lambda: not any(engine.snapshot().prefix_bytes.values()))
        assert engine.pins("") == {} and is_empty(engine)


async def test_a_pin_whose_time_is_over_is_kept_as_others_are() -> None:
    async with running(chunk_tokens=CHUNK) as engine:
        await pinned(engine, WHOLE[0], seconds=1e-3)
        await asyncio.sleep(2e-3)
        assert engine.pins("") == {} and engine.snapshot().prefix_bytes["dense"] > 0
        assert await cached(engine, asked(WHOLE[0])) == 384


async def test_what_cannot_be_pinned_is_refused_and_pins_nothing() -> None:
    async with running(chunk_tokens=CHUNK, prefix_share=0) as engine:
        with pytest.raises(InvalidRequest, match="prefix_share is 0"):
            engine.pin(asked(WHOLE[0]), 60)
    async with running(chunk_tokens=CHUNK, prefix_share=1) as engine:
        with pytest.raises(InvalidRequest, match="whole chunks of 32 tokens"):
            engine.pin(asked(WHOLE[0][:31]), 60)
        budget = engine.plan(asked(WHOLE[0])).needed_bytes
    async with running(chunk_tokens=CHUNK, prefix_share=0.3, memory_budget_bytes=budget) as engine:
        with pytest.raises(NeverFits, match="prefix_share"):
            engine.pin(asked(WHOLE[0]), 60)
        states = engine._prefixes.limit / engine._admission.lanes["dense"].state_bytes(CHUNK)
        for seed in range(int(states)):
            engine.pin(asked(prompt(CHUNK, seed)), 60)
        with pytest.raises(PrefixNotKept, match="are pinned"):
            engine.pin(asked(prompt(CHUNK, 99)), 60)
        assert len(engine.pins("")) == int(states)


async def test_a_key_sees_its_own_pins_alone() -> None:
    async with running(chunk_tokens=CHUNK) as engine:
        pin = await pinned(engine, WHOLE[0], owner="ann")
        assert engine.pins("ann") == {pin: True} and engine.pins("bob") == {}
    async with running(chunk_tokens=CHUNK, prefix_shared=True) as engine:
        pin = await pinned(engine, WHOLE[0], owner="ann")
        assert engine.pins("bob") == {pin: True}
