"""The engine from outside: what a caller may rely on, on a tiny real model."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
import weakref
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch

from attention import AttentionBackend, Segments
from service.engine.allowlist import Backends
from service.engine.request import ContextTooLong, Delta, InvalidRequest, UnknownBackend
from service.model.transformer import Transformer
from tests.engine import world
from tests.engine.world import complete, completion, embed, embedding, prompt, running, tokens_of, until


def hidden(model: Transformer, backend: AttentionBackend, tokens: list[int]) -> torch.Tensor:
    """Last hidden states by one whole forward, without state."""
    ids, segments = torch.tensor(tokens), Segments((len(tokens),))
    return model.hidden(ids, torch.arange(len(ids)), lambda i, q, k, v: backend.attend(q, k, v, segments, causal=True))


def greedy_oracle(model: Transformer, backend: AttentionBackend, tokens: list[int], count: int) -> list[int]:
    """Greedy tokens by a whole forward for each: slow and plain."""
    out: list[int] = []
    for _ in range(count):
        out.append(int(model.logits(hidden(model, backend, tokens + out)[-1:]).argmax()))
    return out


@pytest.mark.parametrize("name", world.BACKENDS)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 65, 300])
async def test_greedy_decode_through_chunks_and_states_equals_whole_forwards(name: str, length: int) -> None:
    model = world.make_model(torch.float64)
    backends = world.make_backends(model)
    expected = greedy_oracle(model, backends.by_name[name], prompt(length), 12)
    async with running(model, backends, chunk_tokens=16) as engine:
        assert await tokens_of(engine, completion(prompt(length), name, max_tokens=12)) == expected


async def test_an_embedding_is_the_unit_mean_of_the_last_hidden_states() -> None:
    model = world.make_model(torch.float64)
    backends = world.make_backends(model)
    mean = hidden(model, backends.by_name["dense"], prompt(200)).mean(0)
    async with running(model, backends, chunk_tokens=64) as engine:
        answer = torch.tensor(await embed(engine, embedding(prompt(200))), dtype=torch.float64)
    expected = torch.nn.functional.normalize(mean, dim=0)
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=0)  # sums are kept in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", world.BACKENDS)
async def test_an_answer_is_the_same_alone_and_among_others(name: str, dtype: torch.dtype) -> None:
    requests = [
        lambda i=i: completion(prompt(20 + 37 * i, seed=i), name, max_tokens=24, temperature=float(i % 2), seed=i)
        for i in range(9)
    ]
    async with running(world.make_model(dtype)) as engine:
        if engine.snapshot().row_multiple is None:
            pytest.skip("this machine's products depend on their height, and the engine says so")
        alone = [await tokens_of(engine, request()) for request in requests]
        together = await asyncio.gather(*(tokens_of(engine, request()) for request in requests))
    assert list(together) == alone


async def test_samples_share_the_prefill_and_each_equals_its_own_request() -> None:
    model, watcher = world.make_model(), world.Watcher()
    async with running(model, watcher=watcher) as engine:
        request = completion(prompt(100), n=3, temperature=1.0, seed=4, max_tokens=10)
        deltas = await complete(engine, request)
        prefilled = sum(step.tokens for step in watcher.steps if step.kind == "prefill")
        first = await tokens_of(engine, completion(prompt(100), temperature=1.0, seed=4, max_tokens=10))
    samples = [[t for d in deltas if d.index == i for t in d.tokens] for i in range(3)]
    assert prefilled == 100
    assert [len(sample) for sample in samples] == [10, 10, 10]
    assert samples[0] == first
    assert len({tuple(sample) for sample in samples}) == 3
    assert request.timings.output_tokens == 30


@pytest.mark.parametrize("temperature", [0.0, 1.5])
async def test_an_id_that_is_no_token_is_never_drawn_nor_told(temperature: float) -> None:
    tokenizer = world.make_tokenizer(moved={100: 290})  # a hole at 100; between 256 and 290, and behind, there is nothing
    holes = [id for id in range(300) if id not in tokenizer.ids]
    model = world.make_model(torch.float64, vocabulary=300)
    model.head.weight[holes] *= 100  # without care nearly every token would be one of them
    async with running(model, tokenizer=tokenizer) as engine:
        request = completion(prompt(50), temperature=temperature, seed=1, max_tokens=40, logprobs=5, echo=True)
        request.tokens = [290 if token == 100 else token for token in request.tokens]
        deltas = await complete(engine, request)
        told = [each for delta in deltas for each in delta.logprobs or ()]
        assert len(told) == 90
        named = {each.token for each in told} | {token for each in told for token, _ in each.top}
        assert named <= set(tokenizer.ids)
        logs = model.logits(hidden(model, world.make_backends(model).by_name["dense"], list(request.tokens)))
        logs[:, holes] = -torch.inf
        assert told[50].logprob == pytest.approx(float(logs.log_softmax(-1)[-1, told[50].token]), abs=1e-5)
        for token in (100, 270, 299, 300):
            with pytest.raises(InvalidRequest):
                engine.submit(completion([5, token]))
        with pytest.raises(InvalidRequest, match="from 0 to 257"):
            engine.submit(completion(logprobs=258))


async def test_the_end_of_text_token_stops_and_is_not_shown() -> None:
    async with running() as engine:
        tokens = await tokens_of(engine, completion("abc", max_tokens=20))
    eos = tokens[-1]
    async with running(world.make_model(eos=eos)) as engine:
        deltas = await complete(engine, completion("abc", ignore_eos=False, max_tokens=20))
        ignored = await tokens_of(engine, completion("abc", max_tokens=20))
    assert deltas[-1].finish_reason == "stop"
    assert [token for delta in deltas for token in delta.tokens] == tokens[: tokens.index(eos)]
    assert ignored == tokens


async def test_a_stop_string_ends_the_answer_before_itself() -> None:
    async with running() as engine:
        whole = await complete(engine, completion("abc", max_tokens=60))
        text = "".join(delta.text for delta in whole)
        stop = text[5:8]
        deltas = await complete(engine, completion("abc", max_tokens=60, stop=(stop,)))
    assert "".join(delta.text for delta in deltas) == text[: text.find(stop)]
    assert deltas[-1].finish_reason == "stop"


async def test_the_answer_ends_with_max_tokens() -> None:
    async with running() as engine:
        deltas = await complete(engine, completion("abc", max_tokens=5))
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"]
    assert sum(len(delta.tokens) for delta in deltas) == 5


async def test_an_echo_for_no_tokens_scores_the_prompt() -> None:
    model = world.make_model(torch.float64)
    backends = world.make_backends(model)
    tokens = list(b"some words to be scored" * 9)
    logs = model.logits(hidden(model, backends.by_name["dense"], tokens)).log_softmax(-1)
    async with running(model, backends, chunk_tokens=64) as engine:
        (delta,) = await complete(engine, completion(tokens, echo=True, logprobs=2, max_tokens=0))
    assert (delta.text, list(delta.tokens), delta.finish_reason) == (bytes(tokens).decode(), tokens, "length")
    assert delta.logprobs is not None and delta.logprobs[0].logprob is None
    for place, told in enumerate(delta.logprobs[1:], 1):
        assert told.logprob == pytest.approx(float(logs[place - 1, tokens[place]]), abs=1e-5)  # logits are float32
        assert len(told.top) == 2


async def test_a_delta_tells_as_many_logprobs_as_tokens() -> None:
    async with running() as engine:
        deltas = await complete(engine, completion("abc", logprobs=1, max_tokens=30, echo=True))
    assert all(delta.logprobs is not None and len(delta.logprobs) == len(delta.tokens) for delta in deltas)
    assert sum(len(delta.tokens) for delta in deltas) == 33


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        (completion([]), InvalidRequest, "no tokens"),
        (completion([world.VOCABULARY]), InvalidRequest, "0 to 256"),
        (completion([-1]), InvalidRequest, "0 to 256"),
        (completion(n=0), InvalidRequest, "n must be"),
        (completion(n=65), InvalidRequest, "from 1 to 64"),
        (completion(max_tokens=-1), InvalidRequest, "max_tokens"),
        (completion(temperature=-0.1), InvalidRequest, "temperature"),
        (completion(temperature=float("nan")), InvalidRequest, "temperature"),
        (completion(top_p=0.0), InvalidRequest, "top_p"),
        (completion(top_p=1.01), InvalidRequest, "top_p"),
        (completion(top_k=-1), InvalidRequest, "top_k"),
        (completion(top_k=2**63), InvalidRequest, "top_k"),
        (completion(seed=2**63), InvalidRequest, "seed"),
        (completion([2**40]), InvalidRequest, "whole numbers"),
        (completion(logprobs=-1), InvalidRequest, "logprobs"),
        (completion(stop=("",)), InvalidRequest, "stop"),
        (completion(backend="sparse"), UnknownBackend, "dense, sliding_window, performer, auto"),
        (completion(prompt(2000), max_tokens=49), ContextTooLong, "2000 tokens and max_tokens 49, together 2049"),
        (embedding(prompt(2049)), ContextTooLong, "2049 tokens but the model's context is 2048"),
    ],
)
async def test_what_cannot_be_computed_is_refused_at_the_door(request_, error: type[Exception], says: str) -> None:
    watcher = world.Watcher()
    async with running(watcher=watcher) as engine:
        with pytest.raises(error, match=says):
            engine.submit(request_)
        assert watcher.refusals == [error.code]
        assert engine.snapshot().bytes_in_use == 0
        assert len(await tokens_of(engine, completion())) == 8


async def test_the_longest_allowed_request_is_answered() -> None:
    async with running() as engine:
        assert len(await tokens_of(engine, completion(prompt(2000), max_tokens=48))) == 48
        assert len(await embed(engine, embedding(prompt(2048)))) == 32


async def test_a_request_keeps_its_backend_over_a_swap() -> None:
    model = world.make_model()
    async with running(model, world.make_backends(model, dense={})) as engine:
        expected = await tokens_of(engine, completion(prompt(30), max_tokens=40))
        stream = engine.submit(completion(prompt(30), max_tokens=40))
        first = await anext(stream)
        await engine.swap(world.make_backends(model, "performer", performer={"features": 32}))
        later = completion(prompt(30))
        await complete(engine, later)
        rest = [item async for item in stream]
        assert set(engine.snapshot().pool_bytes) == {"performer"}
    assert [t for delta in (first, *rest) if isinstance(delta, Delta) for t in delta.tokens] == expected
    assert later.timings.backend == "performer"


async def test_a_new_backend_is_timed_in_slices_between_the_steps_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    model, events, parts = world.make_model(), [], 20
    backends = world.make_backends(model, linear={}, default="linear")
    new = backends.by_name["linear"]
    honest = new.extending

    def slow(*question: Any, **how: Any) -> Iterator[None]:
        for _ in range(parts):
            events.append("part")
            time.sleep(0.002)  # longer than a slice
            yield
        yield from honest(*question, **how)

    monkeypatch.setattr(new, "extending", slow)
    watcher = world.Watcher()
    monkeypatch.setattr(watcher, "stepped", lambda step: events.append("step"))
    async with running(model, watcher=watcher) as engine:

        async def stream() -> None:
            while True:
                await complete(engine, completion(max_tokens=2000))

        streaming = asyncio.create_task(stream())
        await until(lambda: "step" in events)
        await engine.swap(backends)
        streaming.cancel()
    waits = [sum(1 for _ in group) for event, group in itertools.groupby(events) if event == "part"]
    assert sum(waits) >= 2 * parts  # it was timed more than once
    assert max(waits) <= parts // 4  # and nowhere near as a whole: the loop may be late now and then


async def test_a_model_thread_without_cpu_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trouble = lambda tokens, positions: time.sleep(0.02)  # noqa: E731  a thread that sleeps has no CPU, either
    monkeypatch.setattr("service.machine.STARVATION_SECONDS", 0.1)
    async with running(world.disturb(world.make_model(), trouble)) as engine:
        assert engine.snapshot().cpu_starved_ratio == 0.0
        for _ in range(2):
            await complete(engine, completion(max_tokens=20))
        assert 0.2 < engine.snapshot().cpu_starved_ratio <= 1.0
    assert [record.getMessage().count("has no CPU") for record in caplog.records].count(1) == 1


async def test_an_old_backend_dies_with_its_last_request() -> None:
    model = world.make_model()
    gone = []

    def observed() -> Backends:
        backends = world.make_backends(model, dense={}, performer={"features": 32})
        gone.extend(weakref.ref(each) for each in backends.by_name.values())
        return backends

    async with running(model) as engine:
        await engine.swap(observed())
        gone.extend(weakref.ref(lane) for lane in engine._admission.lanes.values())
        gone.extend(weakref.ref(lane.pool) for lane in engine._admission.lanes.values())
        stream = engine.submit(completion(prompt(30), max_tokens=400))
        await anext(stream)
        await tokens_of(engine, completion(prompt(30), "performer"))
        await engine.swap(world.make_backends(model, "sliding_window", sliding_window={"window": 64}))
        gc.disable()  # what is left in a cycle stays for long
        try:
            assert any(each() for each in gone)
            _ = [item async for item in stream]
            await until(lambda: not any(each() for each in gone), 5)
        finally:
            gc.enable()


async def test_auto_takes_the_backend_it_predicts_to_be_fastest_and_says_so() -> None:
    model = world.make_model()
    async with running(model, world.make_backends(model, "auto")) as engine:
        request = completion(prompt(1500))
        plan = engine.plan(request)
        await complete(engine, request)
    assert request.timings.backend == plan.backend
    assert request.timings.why.startswith("auto: fastest, predicted")
    assert all(name in request.timings.why for name in world.BACKENDS)


async def test_the_stopwatch_runs_in_order() -> None:
    async with running(chunk_tokens=16) as engine:
        request = completion(prompt(40), max_tokens=6)
        await complete(engine, request)
    t = request.timings
    assert t.queued_at <= t.admitted_at <= t.prefilled_at <= t.first_token_at <= t.finished_at
    assert (t.prefill_chunks, t.prompt_tokens, t.output_tokens) == (3, 40, 6)
    assert (t.backend, t.why, t.batch_mates) == ("dense", "default", 0)


async def test_batch_mates_are_counted() -> None:
    async with running() as engine:
        requests = [completion(prompt(8, seed=i), max_tokens=30) for i in range(4)]
        await asyncio.gather(*(complete(engine, request) for request in requests))
    assert max(request.timings.batch_mates for request in requests) == 3


async def test_what_runs_beside_requests_leaves_them_the_thread_for_longer_than_it_took_it() -> None:
    parts: list[tuple[float, float]] = []

    def slow() -> Generator[None, None, int]:
        for _ in range(5):
            start = time.monotonic()
            time.sleep(0.02)
            parts.append((start, time.monotonic()))
            yield
        return 7

    async with running() as engine:
        answer = engine.submit(completion(max_tokens=2000))
        await anext(answer)
        assert await engine.beside(slow()) == 7
        await answer.aclose()
    for (start, end), (after, _) in itertools.pairwise(parts):
        assert after - end >= 2 * (end - start) * 0.99


@pytest.mark.parametrize("turns", range(5))
async def test_an_engine_at_rest_ends_even_as_it_is_woken(turns: int) -> None:
    async with running() as engine:
        await asyncio.sleep(0.05)
        engine._loop.wake.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        await asyncio.wait_for(engine.stop(), 10)
