"""What a step really took: the counter against storages that are known and against the profiler, and what counting costs."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from typing import Any

import pytest
import torch

import attention
from attention.memory import peak_bytes
from service.config import EngineConfig
from service.engine import runner as runner_module
from service.engine.engine import Backends, Engine
from service.engine.meter import Metering, StorageCounter, counting_seconds
from service.engine.observer import Step
from service.engine.sampling import bytes_per_logit
from service.model import checkpoint
from tests.engine import world
from tests.engine.world import complete, completion, embed, embedding, prompt, running

CPU = torch.device("cpu")


class Owner:
    """What steps are measured for."""


OWNER = Owner()
MIB = 2**20
LENGTH = 8 * 1024  # the longest that is audited; its chunks pass through all the shorter ones
CAUSAL = [name for name in attention.names() if name != "longformer"]


def test_the_counter_sees_new_storages_and_no_views_nor_inputs() -> None:
    x, counter = torch.ones(1000), StorageCounter()
    with torch.inference_mode(), counter:
        y = x * 2  # 4,000 bytes
        z = y[:10].view(2, 5)
        w = torch.empty(500).copy_(x[:500])  # 2,000
        del y, z
        v = x + 1  # 4,000, when the first 4,000 are gone
        x.add_(1)
        x.reshape(10, 100).contiguous().to(torch.float32)  # nothing: they answer what they are given
    assert (counter.current_bytes, counter.peak_bytes) == (6000, 6000)
    del w, v
    assert counter.current_bytes == 0


def test_a_counter_is_gone_after_its_step_though_what_it_saw_stays() -> None:
    weight, seen = torch.ones(10), []
    gc.disable()
    try:
        for _ in range(3):
            counter = StorageCounter()
            with torch.inference_mode(), counter:
                answer = weight * 2
            seen.append(weakref.ref(counter))
            del counter
        assert not any(each() for each in seen)
    finally:
        gc.enable()
    del answer


@pytest.mark.parametrize("cost", [0.0, 0.001, 0.5])
def test_measuring_takes_its_share_of_the_time_and_no_more(cost: float) -> None:
    step, metering = 0.002, Metering(CPU, 0.01, operator_seconds=cost)
    for _ in range(10_000):
        meter = metering.meter("decode", OWNER, "size", lambda: True)
        if meter is not None:
            assert isinstance(meter, StorageCounter)
            meter.operators = 1
        metering.account("decode", step, meter)
    assert metering.seconds <= 0.01 * 10_000 * step + cost  # one that is spent ahead
    assert metering.seconds >= 0.9 * min(0.01 * 10_000 * step, 10_000 * cost)


def test_the_first_step_of_a_size_is_measured_and_one_that_tells_nothing_is_not() -> None:
    metering = Metering(CPU, 0.01, operator_seconds=1.0)
    first = metering.meter("prefill", OWNER, "small", lambda: False)
    assert first is not None
    metering.account("prefill", 1000.0, first)
    assert metering.meter("prefill", OWNER, "small", lambda: False) is None
    assert metering.meter("prefill", OWNER, "large", lambda: False) is not None
    assert metering.meter("prefill", OWNER, "small", lambda: True) is not None


def test_the_cost_of_counting_is_what_a_counted_call_takes_longer() -> None:
    def call() -> None:
        for _ in range(20):
            torch.ones(8).add(1)

    def waiting() -> None:
        time.sleep(0.001)

    per_operator = counting_seconds(call)
    assert 0 < per_operator < 1e-3
    assert counting_seconds(waiting) < 1e-3  # no operator: nothing to divide by


async def test_a_requests_measured_bytes_are_its_state_and_its_widest_step() -> None:
    watcher, model = world.Watcher(), world.make_model(scale=4)
    async with running(model, watcher=watcher, memory_sample_share=1, chunk_tokens=64) as engine:
        request = completion(prompt(300), "dense", max_tokens=5)
        await complete(engine, request)
        state = engine.plan(request).terms["state"]
    timings, peaks = request.timings, [step.measured_bytes or 0 for step in watcher.steps]
    assert timings.state_bytes == state
    assert timings.step_bytes == max(peaks)
    assert timings.measured_bytes == state + max(peaks)


async def test_a_decode_step_is_predicted_with_the_logits_it_draws_from() -> None:
    watcher = world.Watcher()
    async with running(watcher=watcher, memory_sample_share=1) as engine:
        request = completion("abc", temperature=1.0, top_p=0.9)
        await complete(engine, request)
    logits = world.VOCABULARY * bytes_per_logit(request.sampling)
    steps = [step for step in watcher.steps if step.kind == "decode"]
    assert steps and all((step.predicted_bytes or 0) >= logits for step in steps)


async def test_mates_share_a_measured_step_by_their_tokens() -> None:
    watcher, model = world.Watcher(), world.make_model(scale=4)
    async with running(model, watcher=watcher, memory_sample_share=1) as engine:
        engine._scheduler._can_pack = True
        requests = [embedding(prompt(count), "dense") for count in (30, 90)]
        answers = [engine.submit(request) for request in requests]
        for answer in answers:
            assert [item async for item in answer]
    (step,) = watcher.steps
    assert step.sequences == 2 and step.measured_bytes is not None
    assert [request.timings.step_bytes for request in requests] == [step.measured_bytes // 4, step.measured_bytes * 3 // 4]


async def test_a_request_whose_widest_step_was_not_measured_says_so() -> None:
    async with running(memory_sample_share=0) as engine:
        first, second = completion("abc"), completion("abc")
        await complete(engine, first)
        await complete(engine, second)
    assert first.timings.measured_bytes is not None  # the first of its size
    assert second.timings.measured_bytes is None
    assert second.timings.reserved_bytes > 0


@pytest.mark.parametrize("backend", [*world.BACKENDS])
async def test_a_prompt_is_covered_by_what_its_last_token_sees(backend: str) -> None:
    async with running() as engine:
        request = completion(prompt(500), backend)
        await complete(engine, request)
    assert request.timings.seen_tokens == {"sliding_window": 64 + 1 + 4}.get(backend, 500)


@pytest.mark.slow
@pytest.mark.parametrize("backend", CAUSAL)
async def test_law_counter_and_profiler_agree_on_every_step_of_a_long_prompt(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = await _steps(backend)
    audited: list[int] = []
    run, loop = runner_module.Runner.run, asyncio.get_running_loop()

    def profiled(self: Any, work: Any, gives_way: Any) -> bool:
        work.allocate()  # states are no part of a step's peak
        for _ in range(5):  # what the step before leaves is freed now, by the loop's thread too, not while this one is watched
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()
        gc.collect()
        gc.disable()
        ended: list[bool] = []
        try:
            audited.append(peak_bytes(lambda: ended.append(run(self, work, gives_way))))
        finally:
            gc.enable()
        return ended[0]

    monkeypatch.setattr(runner_module.Runner, "run", profiled)
    monkeypatch.setattr(runner_module.Runner, "_meter", lambda self, work: None)  # both at once would count twice
    real = await _steps(backend)
    assert [(step.kind, step.tokens) for step in counted] == [(step.kind, step.tokens) for step in real]
    for step, truth in zip(counted, audited, strict=True):
        assert step.measured_bytes is not None
        assert abs(step.measured_bytes - truth) <= max(0.05 * truth, MIB), (step, truth)
        assert abs(step.predicted_bytes - step.measured_bytes) <= max(0.1 * step.measured_bytes, MIB), (step, truth)


async def _steps(backend: str) -> list[Step]:
    """All steps of the embedded model over a long prompt and some tokens of an answer, and over an embedding."""
    loaded = checkpoint.load(str(checkpoint.EMBEDDED), "auto", "cpu")
    backends = Backends({backend: attention.build(backend, {}, loaded.model.head_shape())}, backend)
    watcher = world.Watcher()
    config = EngineConfig(memory_budget_bytes=512 * MIB, memory_sample_share=1, prefix_share=0)  # a copy is no step's own
    engine = Engine(loaded.model, loaded.tokenizer, backends, config, watcher)
    await engine.start()
    try:
        ids = [token % 4096 for token in prompt(LENGTH)]
        await complete(engine, completion(ids, backend, max_tokens=4))
        await embed(engine, embedding(ids[:1500], backend))
    finally:
        await engine.stop()
    return watcher.steps
