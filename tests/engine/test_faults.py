"""What goes wrong stays with the request it belongs to, and every byte comes back."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.engine.delivery import is_out_of_memory
from service.engine.request import DeadlineExceeded, Draining, ModelFailed, OutOfMemory, Request, RequestError
from service.engine.scheduler import Scheduler
from tests.engine import world
from tests.engine.world import complete, completion, disturb, embed, embedding, is_empty, prompt, running, tokens_of, until

FATAL = 333  # the position at which a disturbed model fails


def failing(error: Exception, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A model that cannot process position FATAL, nor anything beside it."""

    def trouble(tokens: Tensor, positions: Tensor) -> None:
        if FATAL in positions.tolist():
            raise error

    return disturb(world.make_model(dtype), trouble)


FAULTS = [
    (RuntimeError("boom"), ModelFailed),
    (MemoryError(), OutOfMemory),
    (
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 1 bytes"),
        OutOfMemory,
    ),
]


@pytest.mark.parametrize(("fault", "error"), FAULTS)
@pytest.mark.parametrize("name", world.BACKENDS)
async def test_a_fault_while_decoding_fails_its_own_request_and_no_answer_beside_it_changes(name, fault, error) -> None:
    mates = [lambda i=i: completion(prompt(10 + i, seed=i), name, max_tokens=60) for i in range(3)]
    async with running(failing(fault, torch.float64)) as engine:
        alone = [await tokens_of(engine, mate()) for mate in mates]
        guilty = engine.submit(completion(prompt(FATAL - 9), name, max_tokens=20))
        together = asyncio.gather(*(tokens_of(engine, mate()) for mate in mates))
        with pytest.raises(error):
            async for _ in guilty:
                pass
        assert await together == alone
        assert is_empty(engine)


async def test_a_fault_in_a_packed_prefill_fails_its_own_request() -> None:
    watcher = world.Watcher()
    async with running(failing(RuntimeError("boom")), watcher=watcher) as engine:
        requests = [embedding(prompt(40, seed=i)) for i in range(4)] + [embedding(prompt(FATAL + 1))]
        answers = await asyncio.gather(*(embed(engine, request) for request in requests), return_exceptions=True)
        assert [type(answer) for answer in answers] == [list, list, list, list, ModelFailed]
        assert sorted(outcome for _, outcome in watcher.ended) == ["embedded"] * 4 + ["model_failed"]
        assert is_empty(engine)


async def test_a_fault_under_one_sample_ends_the_request_and_frees_all_samples() -> None:
    async with running(failing(RuntimeError("boom"))) as engine:
        with pytest.raises(ModelFailed):
            await complete(engine, completion(prompt(FATAL - 9), n=3, temperature=1.0, max_tokens=20))
        assert is_empty(engine)
        assert len(await tokens_of(engine, completion())) == 8


async def test_a_deadline_passes_in_the_queue_between_chunks_and_between_decode_steps() -> None:
    def slow(tokens: Tensor, positions: Tensor) -> None:
        time.sleep(0.03)

    async with running(disturb(world.make_model(), slow), max_sequences=1, chunk_tokens=16) as engine:
        decoding = completion(prompt(4), max_tokens=500, deadline=time.monotonic() + 0.5)
        queued = completion(prompt(4), deadline=time.monotonic() + 0.2)
        answers = await asyncio.gather(*(complete(engine, r) for r in (decoding, queued)), return_exceptions=True)
        assert [type(answer) for answer in answers] == [DeadlineExceeded] * 2
        assert decoding.timings.output_tokens > 1
        assert queued.timings.admitted_at is None
        prefilling = completion(prompt(1600), deadline=time.monotonic() + 0.2)
        with pytest.raises(DeadlineExceeded):
            await complete(engine, prefilling)
        assert prefilling.timings.prefill_chunks > 0 and prefilling.timings.prefilled_at is None
        with pytest.raises(DeadlineExceeded):
            engine.submit(completion(deadline=time.monotonic() - 1))
        assert is_empty(engine)


@pytest.mark.parametrize(("slice_seconds", "paused"), [(0.02, {"prefill"}), (0.001, {"prefill", "decode"})])
async def test_a_prompt_gives_way_behind_a_slice_and_a_decode_step_behind_ten(
    monkeypatch: pytest.MonkeyPatch, slice_seconds: float, paused: set[str]
) -> None:
    seen: set[str] = set()
    pause = Scheduler.pause
    monkeypatch.setattr(Scheduler, "pause", lambda self, work: (seen.add(work.kind), pause(self, work))[1])
    model = disturb(world.make_model(), lambda tokens, positions: time.sleep(0.03))
    async with running(model, chunk_tokens=16, slice_seconds=slice_seconds) as engine:
        await asyncio.gather(
            complete(engine, completion(max_tokens=6)), complete(engine, completion(prompt(100), max_tokens=1))
        )
    assert seen == paused


@pytest.mark.parametrize("stage", ["before the first step", "in the queue", "between chunks", "while decoding", "at the end"])
async def test_a_caller_may_leave_at_any_stage(stage: str) -> None:
    watcher = world.Watcher()
    async with running(watcher=watcher, max_sequences=1, chunk_tokens=16, slice_seconds=1e-5) as engine:
        if stage == "in the queue":
            other = engine.submit(completion(max_tokens=300))
            await anext(other)
        request = completion(prompt(1000 if stage == "between chunks" else 5), max_tokens=300)
        answer = engine.submit(request)
        if stage == "in the queue":
            await asyncio.sleep(0.01)
            assert engine.snapshot().waiting == 1
        elif stage == "between chunks":
            await until(lambda: request.timings.prefill_chunks)
        elif stage == "while decoding":
            await until(lambda: request.timings.output_tokens > 1)
        elif stage == "at the end":
            _ = [item async for item in answer]
        await answer.aclose()
        if stage == "in the queue":
            await other.aclose()
        await until(lambda: is_empty(engine))
        outcomes = dict(watcher.ended)
        assert outcomes[request.id] == ("length" if stage == "at the end" else "cancelled")
        assert (stage == "between chunks") <= (request.timings.prefilled_at is None)


async def test_draining_finishes_what_runs_and_refuses_what_comes() -> None:
    async with running() as engine:
        answer = asyncio.create_task(tokens_of(engine, completion(max_tokens=50)))
        await asyncio.sleep(0)
        drain = asyncio.create_task(engine.drain(30))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            engine.submit(completion())
        assert len(await answer) == 50
        await drain
        assert is_empty(engine)


async def test_draining_tells_the_rest_when_the_cap_is_reached() -> None:
    watcher = world.Watcher()
    async with running(watcher=watcher, max_sequences=1) as engine:
        running_, waiting = engine.submit(completion(max_tokens=1500)), engine.submit(completion())
        await anext(running_)
        await engine.drain(0.05)
        for answer in (running_, waiting):
            with pytest.raises(Draining):
                async for _ in answer:
                    pass
        assert [outcome for _, outcome in watcher.ended] == ["draining"] * 2
        assert is_empty(engine)


async def test_a_stopped_engine_refuses() -> None:
    async with running() as engine:
        await engine.stop()
        with pytest.raises(Draining):
            engine.submit(completion())


async def test_progress_stops_being_told_while_a_step_hangs() -> None:
    def hang(tokens: Tensor, positions: Tensor) -> None:
        time.sleep(0.3 if FATAL in positions.tolist() else 0)

    async with running(disturb(world.make_model(), hang)) as engine:
        await asyncio.sleep(0.05)
        assert time.monotonic() - engine.snapshot().last_progress < 0.01  # idle is progress
        answer = asyncio.create_task(embed(engine, embedding(prompt(FATAL + 1))))
        await asyncio.sleep(0.2)
        assert time.monotonic() - engine.snapshot().last_progress > 0.1
        await answer


def test_refused_memory_is_told_from_other_faults() -> None:
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as refusal:
        torch.empty(2**60)
    assert is_out_of_memory(refusal.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


Script = st.lists(
    st.tuples(
        st.sampled_from(["completion", "embedding"]),
        st.integers(1, 500),  # prompt tokens; some contain the fatal position
        st.sampled_from(list(world.BACKENDS)),
        st.integers(0, 12),  # max_tokens
        st.integers(1, 3),  # n
        st.sampled_from(["stays", "stays", "leaves at once", "leaves in the middle", "has a deadline"]),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(Script)
def test_every_request_ends_once_and_every_byte_comes_back(script: list[tuple]) -> None:
    asyncio.run(_play(script))


async def _play(script: list[tuple]) -> None:
    """Throw a script of requests at a small engine whose model sometimes fails, and count."""
    watcher, told = world.Watcher(), Counter()
    limits = {"chunk_tokens": 64, "max_sequences": 6, "memory_budget_bytes": 2**20, "max_waiting_requests": 12}
    async with running(failing(RuntimeError("boom")), watcher=watcher, **limits) as engine:

        async def play(kind: str, length: int, backend: str, count: int, n: int, behaviour: str) -> None:
            deadline = time.monotonic() + 0.05 if behaviour == "has a deadline" else None
            if kind == "embedding":
                request = embedding(prompt(length), backend, deadline)
            else:
                request = completion(prompt(length), backend, n, deadline, max_tokens=count, temperature=1.0)
            await _read(request, behaviour)

        async def _read(request: Request, behaviour: str) -> None:
            try:
                answer = engine.submit(request)
            except RequestError as error:
                told[error.code] += 1
                return
            told["accepted"] += 1
            try:
                if behaviour == "leaves at once":
                    return
                async for _ in answer:
                    if behaviour == "leaves in the middle":
                        return
                told["complete"] += 1
            except RequestError:
                told["failed"] += 1
            finally:
                await answer.aclose()

        async with asyncio.timeout(60):
            await asyncio.gather(*(play(*line) for line in script))
            await until(lambda: is_empty(engine))
    ids = [name for name, _ in watcher.ended]
    assert len(ids) == len(set(ids)) == told["accepted"]
    assert len(watcher.refusals) == len(script) - told["accepted"]
    outcomes = Counter(outcome for _, outcome in watcher.ended)
    assert told["complete"] <= outcomes["stop"] + outcomes["length"] + outcomes["embedded"]
