"""The engine alone, measured in turn with the bare model: prefill, decodes together, and what others wait for meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from statistics import median
from typing import Any

from service.benchmark.bare import BACKENDS, bare, build, report
from service.config import EngineConfig
from service.engine.engine import Backends, Engine
from service.engine.loop import REST_SECONDS
from service.engine.observer import Observer
from service.engine.request import Delta, Request, Sampling
from service.machine import Place, dealt_cpus
from service.model.checkpoint import Checkpoint, load
from service.model.transformer import Transformer
from service.threads import in_passing_thread

SHORT = (200, 16)  # tokens in and out of a short request
REST = 3 * REST_SECONDS  # without a request
RESTED = (64, 2048)  # tokens of a prompt that comes behind it


def make_engine(checkpoint: Checkpoint, observer: Observer | None = None, **config: Any) -> Engine:
    backends = in_passing_thread(lambda: {name: build(checkpoint.model, name) for name in BACKENDS})
    settings = EngineConfig(**config)
    return Engine(checkpoint.model, checkpoint.tokenizer, Backends(backends, "dense"), settings, observer, dealt_cpus(Place()))


def make_request(tokens: int, answer: int, backend: str) -> Request:
    sampling = Sampling(max_tokens=answer, temperature=0.0, ignore_eos=True, lookup_tokens=0)
    return Request("benchmark", "completion", random.choices(range(1, 4000), k=tokens), backend, sampling)


async def answered(engine: Engine, request: Request) -> Request:
    """The request, after its answer; a refusal or failure passes through."""
    async with aclosing(engine.submit(request)) as answer:
        async for _ in answer:
            pass
    return request


async def token_times(engine: Engine, request: Request) -> list[float]:
    """When each token of the answer came, in time.monotonic() seconds."""
    times = []
    async for delta in engine.submit(request):
        assert isinstance(delta, Delta)
        times += [time.monotonic()] * len(delta.tokens)
    return times


async def prefill_ratio(engine: Engine, model: Transformer, name: str, tokens: int, repeats: int) -> float:
    """Throughput of the engine's prefill in parts of the bare model's, measured in turn.

    The first pair is left out: the matrix library compiles a kernel for each new shape, and a prefill has many.
    """
    ours, theirs = [], []
    for _ in range(repeats + 1):
        theirs.append(await engine._on_model_thread(lambda: bare(model, build(model, name), tokens)[0]))
        ours.append(await _timed(answered(engine, make_request(tokens - 1, 1, name))))
    return median(theirs[1:]) / median(ours[1:])


async def _timed(work: Any) -> float:
    start = time.perf_counter()
    await work
    return time.perf_counter() - start


async def first_tokens(engine: Engine, model: Transformer, name: str, tokens: int, repeats: int) -> list[float]:
    """Median seconds to the first token right behind another, and after a rest; of the bare model likewise; in turn."""
    backend, times = build(model, name), list[list[float]]()

    async def ours() -> float:
        return await _timed(answered(engine, make_request(tokens, 1, name)))

    async def theirs() -> float:
        return await _timed(engine._on_model_thread(lambda: bare(model, backend, tokens)))

    for _ in range(repeats):
        times.append([])
        for each in (ours, theirs):
            await asyncio.sleep(REST)
            rested = await each()
            times[-1] += [await each(), rested]
    return [median(each) for each in zip(*times, strict=True)]


async def decode_speedup(engine: Engine, name: str, together: int = 32, answer: int = 300) -> float:
    """Tokens a second of many concurrent decodes over those of one, each measured behind a run that compiled its kernels.

    Counted while all of them run: from the end of the last prefill to the end of the first answer.
    """

    async def rate(count: int) -> float:
        requests = [make_request(SHORT[0], answer, name) for _ in range(count)]
        times = await asyncio.gather(*(token_times(engine, request) for request in requests))
        begin = max(request.timings.prefilled_at or 0.0 for request in requests)
        end = min(own[-1] for own in times)
        return sum(begin < at <= end for own in times for at in own) / (end - begin)

    found = [[await rate(count) for _ in range(2)][-1] for count in (together, 1)]
    return found[0] / found[1]


@contextmanager
def pressed(engine: Engine, name: str, tokens: int) -> Iterator[None]:
    """Prompts of so many tokens are prefilled, one behind the other, for as long as the block lasts."""

    async def press() -> None:
        while True:
            await answered(engine, make_request(tokens - 1, 1, name))

    task = asyncio.ensure_future(press())
    try:
        yield
    finally:
        task.cancel()


async def short_p95(engine: Engine, name: str, count: int) -> float:
    return _p95([await _timed(answered(engine, make_request(*SHORT, name))) for _ in range(count)])


async def gap_p95(engine: Engine, name: str, count: int) -> float:
    """p95 of the seconds between the tokens of one running stream."""
    times = await token_times(engine, make_request(SHORT[0], count, name))
    return _p95([b - a for a, b in itertools.pairwise(times)])


def _p95(values: Sequence[float]) -> float:
    return sorted(values)[int(0.95 * (len(values) - 1))]


async def under_pressure(measure: Callable[[], Any], engine: Engine, name: str, tokens: int) -> tuple[float, float]:
    """A measure taken on an idle engine, and while long prompts are prefilled."""
    idle = await measure()
    with pressed(engine, name, tokens):
        await asyncio.sleep(0.2)
        loaded = await measure()
    await quiet(engine)
    return idle, loaded


async def quiet(engine: Engine) -> None:
    """Wait until the requests that a cancelled task has left are gone."""
    while engine.snapshot().bytes_in_use:
        await asyncio.sleep(0.01)


async def measure_engine(lengths: Sequence[int], repeats: int) -> dict[str, Any]:
    checkpoint = in_passing_thread(load)
    engine = make_engine(checkpoint)
    await engine.start()
    ratios = ("prefill_ratio", "first_token_after_rest", "decode_speedup_32", "short_p95_ratio", "stream_itl_p95_ratio")
    found: dict[str, Any] = {ratio: {} for ratio in ratios}
    for name in BACKENDS:
        for tokens in lengths:
            ratio = await prefill_ratio(engine, checkpoint.model, name, tokens, repeats)
            found["prefill_ratio"].setdefault(str(tokens), {})[name] = round(ratio, 3)
            report(f"engine, prefill of {tokens} tokens over the bare model", name, f"{ratio:.2f}")
        speedup = await decode_speedup(engine, name)
        found["decode_speedup_32"][name] = round(speedup, 2)
        report("engine, 32 concurrent decodes over one, tokens/s", name, f"{speedup:.1f}")
        longest = max(lengths)
        for key, what, measure in (
            ("short_p95_ratio", "short requests, p95", lambda name=name: short_p95(engine, name, 40)),
            ("stream_itl_p95_ratio", "time between tokens, p95", lambda name=name: gap_p95(engine, name, 300)),
        ):
            idle, loaded = await under_pressure(measure, engine, name, longest)
            found[key][name] = round(loaded / idle, 2)
            told = f"{idle * 1e3:.1f} ms idle, {loaded * 1e3:.1f} ms beside {longest} tokens of prefill: {loaded / idle:.2f}x"
            report(f"engine, {what}", name, told)
    for tokens in RESTED:
        busy, rested, *alone = await first_tokens(engine, checkpoint.model, "dense", tokens, 5)
        found["first_token_after_rest"].setdefault(str(tokens), {})["dense"] = round(rested / busy, 3)
        told = f"{busy * 1e3:.1f} ms, after {REST:.0f} s of rest {rested * 1e3:.1f} ms: {rested / busy:.2f}x"
        report(f"engine, first token of {tokens} tokens", "dense", f"{told}; the bare model {alone[1] / alone[0]:.2f}x")
    await engine.stop()
    return found


async def one_token_seconds() -> float:
    """Median seconds of a one-token request on the engine alone."""
    engine = make_engine(in_passing_thread(load))
    await engine.start()
    times = [await _timed(answered(engine, make_request(1, 1, "dense"))) for _ in range(100)]
    await engine.stop()
    return median(times[10:])
