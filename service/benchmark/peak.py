"""What the process takes beside its budget, under requests of several times the budget at once."""

from __future__ import annotations

import asyncio
import threading

from service.benchmark.alone import answered, make_engine, make_request
from service.benchmark.bare import BACKENDS, CHUNK
from service.engine.request import ModelFailed, Request, RequestError
from service.machine import resident_bytes
from service.model.checkpoint import load
from service.threads import in_passing_thread

MEMORY_BUDGET = 32 * 2**20  # a quarter of what 32k tokens hold under dense


def memory_trial() -> int:
    """Peak bytes of this process over budget, weights and runtime, under requests of up to 4 times the budget at once."""
    return asyncio.run(_memory_trial())


async def _memory_trial() -> int:
    engine = make_engine(in_passing_thread(load), memory_budget_bytes=MEMORY_BUDGET)
    await engine.start()
    for name in BACKENDS:
        await answered(engine, make_request(2 * CHUNK, 2, name))
    before, peak, ended = resident_bytes(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.001):
            peak[0] = max(peak[0], resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    lengths = (100, 1000, 4000, 16_000, 32_000)
    calls = [answered(engine, make_request(n, 8, name)) for n in lengths for name in BACKENDS for _ in range(2)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    ended.set()
    watcher.join()
    failed = [a for a in answers if not isinstance(a, (Request, RequestError)) or isinstance(a, ModelFailed)]
    assert not failed, f"not answered cleanly: {failed}"
    assert engine.snapshot().bytes_in_use == 0
    await engine.stop()
    return peak[0] - before - MEMORY_BUDGET
