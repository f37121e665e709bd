"""Whether `auto` is right: its pick against the fastest as measured, a plan's seconds and bytes against what was taken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from statistics import median
from typing import Any

from service.benchmark.alone import answered, make_engine, make_request, quiet
from service.benchmark.bare import BACKENDS, report
from service.engine.engine import Engine
from service.engine.request import AUTO
from service.model.checkpoint import Checkpoint, load
from service.threads import in_passing_thread

ANSWER, REPEATS, STREAMS = 8, 3, 4  # tokens; of each measurement, in turn; that go on beside what is measured under load
BYTES_OFF, LEAST_BYTES_OFF = 0.10, 2**20
SECONDS_OFF, PICK_OFF = 0.25, 0.10


async def measure_auto(lengths: Sequence[int]) -> dict[str, Any]:
    """By load and length: seconds of the pick over the fastest's; a plan's seconds and bytes over the measured ones."""
    checkpoint = in_passing_thread(load)
    found: dict[str, Any] = {"pick_ratio": {}, "seconds_ratio": {}, "bytes_ratio": await _bytes(checkpoint, lengths)}
    engine = make_engine(checkpoint, prefix_share=0)
    await engine.start()
    for load_name, streams in (("idle", 0), ("loaded", STREAMS)):
        async with _beside(engine, streams):
            for tokens in lengths:
                pick, seconds = await _timed(engine, tokens, f"{load_name}, {tokens} tokens")
                found["pick_ratio"].setdefault(load_name, {})[str(tokens)] = round(pick, 3)
                if not streams:  # a plan's seconds are those of its own computing
                    found["seconds_ratio"][str(tokens)] = {name: round(ratio, 3) for name, ratio in seconds.items()}
        await quiet(engine)
    await engine.stop()
    wrong = sum(ratio > 1 + PICK_OFF for by in found["pick_ratio"].values() for ratio in by.values())
    off = sum(abs(ratio - 1) > SECONDS_OFF for by in found["seconds_ratio"].values() for ratio in by.values())
    report(f"auto, picks slower than the fastest by {PICK_OFF:.0%}; plans off by {SECONDS_OFF:.0%}", "all", f"{wrong}; {off}")
    return found


@asynccontextmanager
async def _beside(engine: Engine, streams: int) -> AsyncIterator[None]:
    """So many streams are answered, one behind the other, for as long as the block lasts."""

    async def stream(name: str) -> None:
        while True:
            await answered(engine, make_request(200, 400, name))

    tasks = [asyncio.ensure_future(stream(name)) for _, name in zip(range(streams), list(BACKENDS) * streams, strict=False)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


async def _timed(engine: Engine, tokens: int, what: str) -> tuple[float, dict[str, float]]:
    """Seconds under the pick over those under the fastest, and by backend a plan's over the measured ones."""
    taken: dict[str, list[float]] = {name: [] for name in BACKENDS}
    planned: dict[str, list[float]] = {name: [] for name in BACKENDS}
    picks = []
    for repeat in range(REPEATS + 1):
        picks.append(engine.plan(make_request(tokens - ANSWER, ANSWER, AUTO)).backend)
        for name in BACKENDS:
            plan = engine.plan(make_request(tokens - ANSWER, ANSWER, name))
            request = await answered(engine, make_request(tokens - ANSWER, ANSWER, name))
            if repeat:  # the first one compiles the kernels of these shapes
                taken[name].append(request.timings.total_seconds or 0.0)
                planned[name].append(plan.predicted_seconds["prefill"] + plan.predicted_seconds["decode"])
    seconds = {name: median(each) for name, each in taken.items()}
    fastest = min(seconds, key=lambda name: seconds[name])
    ratio = max(seconds[pick] / seconds[fastest] for pick in picks[1:])
    told = ", ".join(f"{name} {median(planned[name]) * 1e3:.0f}/{seconds[name] * 1e3:.0f}" for name in BACKENDS)
    report(f"auto, {what}", f"{picks[-1]}", f"{ratio:.2f} of {fastest}; ms planned/taken: {told}")
    return ratio, {name: median(planned[name]) / seconds[name] for name in BACKENDS}


async def _bytes(checkpoint: Checkpoint, lengths: Sequence[int]) -> dict[str, Any]:
    """A plan's state and step over what was measured of them, by length and backend."""
    engine = make_engine(checkpoint, prefix_share=0, memory_sample_share=1)
    await engine.start()
    found: dict[str, Any] = {}
    for tokens in lengths:
        for name in BACKENDS:
            request = make_request(tokens - ANSWER, ANSWER, name)
            terms = engine.plan(request).terms
            planned = terms["state"] + terms["step"]
            measured = (await answered(engine, request)).timings.measured_bytes or 0
            is_off = abs(planned - measured) > max(BYTES_OFF * measured, LEAST_BYTES_OFF)
            found.setdefault(str(tokens), {})[name] = round(planned / measured, 3)
            told = f"{planned / 2**20:.1f} MiB planned, {measured / 2**20:.1f} measured{', OFF' if is_off else ''}"
            report(f"auto, bytes of {tokens} tokens", name, told)
    await engine.stop()
    return found
