"""Admission by bytes: what is refused, what waits, and that the laws of cost bound what is really taken."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine import choice
from service.engine.admission import Ledger
from service.engine.request import NeverFits, QueueFull
from tests.engine import world
from tests.engine.world import complete, completion, embed, embedding, is_empty, prompt, running, tokens_of


async def test_what_can_never_fit_is_refused_with_all_that_helps() -> None:
    async with running(memory_budget_bytes=500_000, chunk_tokens=64) as engine:
        with pytest.raises(NeverFits) as refusal:
            engine.submit(completion(prompt(1800), "dense"))
        details = refusal.value.details
        assert details["needed_bytes"] > details["budget_bytes"] == 500_000
        assert sum(details["terms"].values()) == details["needed_bytes"]
        assert details["backends_that_fit"] == ["sliding_window", "performer"]
        longest = details["longest_tokens"]
        assert len(await tokens_of(engine, completion(prompt(longest - 8), "dense"))) == 8
        with pytest.raises(NeverFits):
            engine.submit(completion(prompt(longest - 7), "dense"))
        for name in details["backends_that_fit"]:
            assert len(await tokens_of(engine, completion(prompt(1800), name))) == 8


async def test_what_does_not_fit_now_waits_and_is_answered() -> None:
    async with running() as engine:
        needed = engine.plan(completion(prompt(500), "dense")).needed_bytes
    async with running(memory_budget_bytes=needed + needed // 2) as engine:
        requests = [completion(prompt(500, seed=i), "dense") for i in range(4)]
        answers = await asyncio.gather(*(tokens_of(engine, request) for request in requests))
        assert [len(answer) for answer in answers] == [8] * 4
        spans = sorted((r.timings.admitted_at, r.timings.finished_at) for r in requests)
        assert all(later >= end for (_, end), (later, _) in itertools.pairwise(spans))
        assert is_empty(engine)


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    watcher = world.Watcher()
    async with running(watcher=watcher, max_sequences=1, max_waiting_requests=2) as engine:
        first = engine.submit(completion(max_tokens=400))
        await anext(first)
        waiting = [engine.submit(completion(prompt(100))) for _ in range(2)]
        with pytest.raises(QueueFull) as refusal:
            engine.submit(completion())
        assert refusal.value.retry_after_seconds > 0
        assert watcher.refusals == ["queue_full"]
        assert engine.plan(completion()).reason == "queue_full"
        for answer in (first, *waiting):
            await answer.aclose()


async def test_the_queue_is_bounded_in_tokens_but_an_empty_one_takes_any_prompt() -> None:
    async with running(max_sequences=1, max_waiting_tokens=500) as engine:
        first = engine.submit(completion(max_tokens=400))
        await anext(first)
        second = engine.submit(completion(prompt(600)))
        with pytest.raises(QueueFull):
            engine.submit(completion())
        await first.aclose()
        await second.aclose()


async def test_more_work_in_front_means_a_later_return() -> None:
    async with running(max_sequences=1) as engine:
        waits = []
        answers = []
        for _ in range(4):
            waits.append(engine.plan(completion()).predicted_seconds["queue"])
            answers.append(engine.submit(embedding(prompt(2000))))
        assert waits[0] == 0 and waits == sorted(waits) and len(set(waits)) == 4
        for answer in answers:
            await answer.aclose()


async def test_a_plan_tells_what_submit_then_does() -> None:
    async with running(memory_budget_bytes=500_000) as engine:
        fits, never = completion(prompt(50)), completion(prompt(1800))
        assert engine.plan(fits).verdict == "runs"
        assert engine.plan(never).verdict == "refused" and engine.plan(never).reason == NeverFits.code
        await complete(engine, fits)
        assert fits.timings.reserved_bytes == engine.plan(completion(prompt(50))).needed_bytes
        assert is_empty(engine)


@pytest.mark.parametrize(("default", "times"), [("dense", 1), ("auto", 3)])
async def test_what_a_request_needs_is_worked_out_once_for_each_backend_that_is_considered(
    monkeypatch: pytest.MonkeyPatch, default: str, times: int
) -> None:
    model, honest, asked = world.make_model(), choice.need, []
    async with running(model, world.make_backends(model, default)) as engine:
        monkeypatch.setattr(choice, "need", lambda *args: (asked.append(1), honest(*args))[1])
        await tokens_of(engine, completion())
    assert len(asked) == times


async def test_the_request_of_a_caller_is_left_as_it_came() -> None:
    tokens = prompt(50)
    async with running() as engine:
        request = completion(tokens)
        await tokens_of(engine, request)
    assert request.tokens is tokens and tokens == prompt(50)


@pytest.mark.parametrize("name", world.BACKENDS)
async def test_the_state_held_is_what_the_plan_says(name: str) -> None:
    async with running() as engine:
        request = completion(prompt(300), name, n=2, max_tokens=40)
        plan = engine.plan(request)
        answer = engine.submit(request)
        await anext(answer)
        levels = engine.snapshot()
        assert levels.pool_bytes[name] == plan.terms["state"]
        assert levels.bytes_in_use == plan.needed_bytes
        assert levels.running == 2
        await answer.aclose()


@pytest.mark.parametrize("name", world.BACKENDS)
async def test_no_step_takes_more_than_was_predicted(name: str) -> None:
    watcher, model = world.Watcher(), world.make_model(scale=4)
    async with running(model, watcher=watcher, memory_sample_share=1) as engine:
        requests = [completion(prompt(n), name, max_tokens=5, temperature=1.0, top_p=0.9, seed=1) for n in (1, 70, 400, 2000)]
        for request in requests:
            await complete(engine, request)
        await embed(engine, embedding(prompt(1500), name))
        reserved = max(request.timings.reserved_bytes for request in requests)
    assert all(step.measured_bytes is not None for step in watcher.steps)
    for step in watcher.steps:
        law = max(1.1 * step.predicted_bytes, step.predicted_bytes + 2**20)  # what the backends' laws are held to
        assert step.measured_bytes <= law + 16 * step.tokens, step  # ids and positions
        assert step.measured_bytes <= max(1.1 * reserved, reserved + 2**20)


async def test_the_engine_holds_what_is_configured_or_a_share_of_what_is_left() -> None:
    async with running(memory_budget_bytes=None, memory_share=0.25) as engine:
        quarter = engine.snapshot().budget_bytes
    async with running(memory_budget_bytes=None, memory_share=0.5) as engine:
        assert engine.snapshot().budget_bytes == pytest.approx(2 * quarter, rel=0.2)  # other processes come and go
    with pytest.raises(ValueError, match="memory_budget_bytes must be at most"):
        async with running(memory_budget_bytes=2**60):
            pass


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 100)), max_size=40))
def test_the_ledger_holds_exactly_what_is_held(moves: list[tuple[int, int]]) -> None:
    ledger, held = Ledger(300), dict[int, int]()
    for owner, amount in moves:
        if amount == 0:
            ledger.release(owner)
            held.pop(owner, None)
        elif owner not in held and ledger.fits(amount):
            ledger.hold(owner, amount)
            held[owner] = amount
        assert ledger.in_use == sum(held.values()) <= ledger.budget
        assert ledger.free == ledger.budget - ledger.in_use


def test_the_ledger_never_passes_its_budget() -> None:
    ledger = Ledger(10)
    with pytest.raises(AssertionError, match="passes"):
        ledger.hold("owner", 11)
