"""The engine on a machine that is shared: `python -m service.benchmark --shared`, alone and beside processes always busy.

A stream's tokens a second, and the median time to the first token of prompts that come at a fixed rate, each over what it is
alone. With two CPUs, one busy process leaves three quarters of them, two leave half.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from statistics import median

from service.benchmark.alone import make_engine, make_request, token_times
from service.benchmark.bare import BACKENDS, report
from service.engine.engine import Engine
from service.model.checkpoint import load
from service.threads import in_passing_thread

BUSY = (0, 1, 2)  # processes beside
ANSWER, PROMPT, RATE, PROMPTS = 500, 2048, 2.0, 12  # tokens, tokens, prompts a second, prompts


@contextmanager
def beside(count: int) -> Iterator[None]:
    """So many processes keep a CPU busy each, at the same priority, for as long as the block lasts."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


async def tokens_per_second(engine: Engine, name: str) -> float:
    """Of one stream, from its first token to its last."""
    times = await token_times(engine, make_request(200, ANSWER, name))
    return (len(times) - 1) / (times[-1] - times[0])


async def first_token_seconds(engine: Engine, name: str) -> float:
    """Median over prompts that come whether or not the ones before are answered."""

    async def ask(at: float) -> float:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        async with aclosing(engine.submit(make_request(PROMPT, 1, name))) as answer:
            async for _ in answer:
                return time.monotonic() - at
        raise AssertionError("an answer has a token")

    start = time.monotonic()
    return median(await asyncio.gather(*(ask(start + n / RATE) for n in range(PROMPTS))))


async def measure_shared() -> dict[str, dict[str, dict[str, float]]]:
    """By backend and busy processes: tokens a second and seconds to the first token, each over what it is alone."""
    engine = make_engine(in_passing_thread(load), prefix_share=0)
    await engine.start()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in BACKENDS:
        alone = await tokens_per_second(engine, name), await first_token_seconds(engine, name)  # warms up
        for count in BUSY:
            with beside(count):
                await asyncio.sleep(0.5)
                rate, seconds = await tokens_per_second(engine, name), await first_token_seconds(engine, name)
            alone = (rate, seconds) if count == 0 else alone
            ratios = {"tokens_per_second": round(rate / alone[0], 2), "first_token": round(seconds / alone[1], 2)}
            found.setdefault(name, {})[str(count)] = ratios
            told = f"{rate:5.0f} tokens/s: {rate / alone[0]:.0%}; first token {seconds * 1e3:.0f} ms: {seconds / alone[1]:.1f}x"
            report(f"beside {count} busy processes", name, told)
    await engine.stop()
    return found
