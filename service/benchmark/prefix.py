"""A long text is asked one question after the other: what the first token of each answer waits for."""

from __future__ import annotations

import random
from statistics import median
from typing import Any

import attention
from service.benchmark.alone import answered, make_request
from service.benchmark.bare import report
from service.config import EngineConfig
from service.engine.engine import Backends, Engine
from service.engine.request import Request
from service.machine import Place, dealt_cpus
from service.model.checkpoint import load
from service.threads import in_passing_thread

TEXT, QUESTION, QUESTIONS = 30_000, 50, 20  # tokens, tokens, and how many are asked
BACKENDS: dict[str, dict[str, Any]] = {  # as deploy/local.yaml has them
    "dense": {},
    "sliding_window": {"window": 1024, "sinks": 4},
    "performer": {"features": 256, "local_chunk": 512},
}


async def measure_prefix() -> dict[str, Any]:
    """By backend: seconds to the first token of the first answer, of the second, the median of the later ones; bytes kept."""
    checkpoint = in_passing_thread(load)
    shape = checkpoint.model.head_shape()
    built = in_passing_thread(lambda: {name: attention.build(name, options, shape) for name, options in BACKENDS.items()})
    config = EngineConfig()
    engine = Engine(checkpoint.model, checkpoint.tokenizer, Backends(built, "dense"), config, cpus=dealt_cpus(Place()))
    await engine.start()
    found: dict[str, Any] = {}
    for name in BACKENDS:
        await _asked(engine, [*_tokens(2000)], name)  # compiles the kernels of these shapes
        engine.forget_prefixes()
        text = _tokens(TEXT)
        requests = [await _asked(engine, [*text, *_tokens(QUESTION)], name) for _ in range(QUESTIONS)]
        first, second, *later = [request.timings.first_token_seconds or 0.0 for request in requests]
        states, held = len(engine._prefixes), engine.snapshot().prefix_bytes[name]
        found[name] = {"first": round(first, 4), "second": round(second, 4), "later": round(median(later), 4)}
        found[name] |= {"cached_tokens": requests[1].timings.cached_tokens, "kept_bytes": held, "kept_states": states}
        told = f"{first * 1e3:.0f} ms, then {second * 1e3:.0f} ms ({100 * second / first:.1f} %), {median(later) * 1e3:.0f} ms"
        report(f"prefix, {TEXT} tokens asked {QUESTIONS} questions", name, f"{told}; {held / 2**20:.1f} MiB in {states} states")
    await engine.stop()
    return found


def _tokens(count: int) -> list[int]:
    return random.choices(range(1, 4000), k=count)


async def _asked(engine: Engine, tokens: list[int], backend: str) -> Request:
    request = make_request(1, 4, backend)
    request.tokens = tokens
    return await answered(engine, request)
