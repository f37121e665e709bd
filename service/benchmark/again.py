"""Answers that are scored again: what a caller waits for meanwhile, and what is found by backend and length of the prompt."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

import attention
from service.benchmark.alone import answered, make_request
from service.benchmark.bare import report
from service.benchmark.prefix import BACKENDS
from service.config import EngineConfig, ShadowConfig
from service.engine.engine import Backends, Engine
from service.engine.observer import NullObserver, Shadowed
from service.engine.request import Request
from service.machine import Place, dealt_cpus
from service.model.checkpoint import Checkpoint, load
from service.threads import in_passing_thread
from service.training import corpus

ANSWER, ANSWERS = 64, 4  # tokens of an answer, and how many are scored by backend and length
CALLS, ROUNDS, PAUSE_SECONDS = 20, 8, 0.05  # short calls of a round, with and without a pass under way, and between them


class Notes(NullObserver):
    """What was told of answers that are scored again."""

    def __init__(self) -> None:
        self.found: list[Shadowed] = []

    def shadowed(self, shadowed: Shadowed) -> None:
        self.found.append(shadowed)


async def measure_again(lengths: Sequence[int]) -> dict[str, Any]:
    """Seconds to a short call's first token with and without; mean divergence and agreement by backend and length."""
    checkpoint, notes = in_passing_thread(load), Notes()
    shape = checkpoint.model.head_shape()
    built = in_passing_thread(lambda: {name: attention.build(name, options, shape) for name, options in BACKENDS.items()})
    config = EngineConfig(shadow=ShadowConfig(share=1, max_tokens=max(lengths) + ANSWER), prefix_share=0)
    cpus = dealt_cpus(Place())
    engine = Engine(checkpoint.model, checkpoint.tokenizer, Backends(built, "dense"), config, notes, cpus=cpus)
    await engine.start()
    texts = held_out(checkpoint)
    found: dict[str, Any] = {"first_token_ms": await _waits(engine, texts, max(lengths))}
    for length in lengths:
        for name in BACKENDS:
            if name != "dense":
                found[f"{name}, {length}"] = await _found(engine, notes, texts, name, length)
    await engine.stop()
    return found


def held_out(checkpoint: Checkpoint) -> list[int]:
    """The tokens of the corpus that the embedded model was not trained on."""
    return [token for module in corpus.modules() if module.held_out for token in checkpoint.tokenizer.encode(module.text)]


async def _ask(engine: Engine, texts: Sequence[int], name: str, length: int, answer: int) -> Request:
    request, at = make_request(1, answer, name), random.randrange(len(texts) - length)
    request.tokens = texts[at : at + length]
    return await answered(engine, request)


async def _waits(engine: Engine, texts: Sequence[int], length: int) -> dict[str, Any]:
    """First tokens of short dense calls, which are not scored, in turn with nothing else and with a pass under way."""
    waits: dict[str, list[float]] = {"alone": [], "beside a pass": []}
    for turn in range(2 * ROUNDS):
        await _scored(engine)
        way = list(waits)[turn % 2]
        for _ in range(CALLS):
            if way != "alone" and not engine.snapshot().shadow.lent_bytes:
                await _ask(engine, texts, "sliding_window", length, 2)
            await asyncio.sleep(PAUSE_SECONDS)
            waits[way].append((await _ask(engine, texts, "dense", 200, 4)).timings.first_token_seconds or 0.0)
    found = {way: [round(1e3 * value, 2) for value in _quantiles(times)] for way, times in waits.items()}
    for way, (p50, p95, p99) in found.items():
        report(f"first token of {ROUNDS * CALLS} short calls", way, f"p50 {p50} ms, p95 {p95} ms, p99 {p99} ms")
    return found


async def _found(engine: Engine, notes: Notes, texts: Sequence[int], name: str, length: int) -> dict[str, float]:
    """What is found of some greedy answers to prompts of a length."""
    await _scored(engine)
    notes.found.clear()
    before = engine.snapshot().shadow.seconds
    for _ in range(ANSWERS):
        await _ask(engine, texts, name, length, ANSWER)
    await _scored(engine)
    nats = [each for shadowed in notes.found for each in shadowed.nats]
    agreed = sum(shadowed.agreed for shadowed in notes.found) / len(nats)
    seconds = (engine.snapshot().shadow.seconds - before) / ANSWERS
    told = (
        f"mean {fmean(nats):.4f} nats, median {median(nats):.4f}, p99 {_quantiles(nats)[-1]:.3f}; agreed {100 * agreed:.0f} %"
    )
    report(f"{ANSWERS} answers to {length} tokens scored again", name, f"{told}; {seconds:.2f} s each")
    return {"nats": fmean(nats), "agreed": agreed, "seconds": seconds}


async def _scored(engine: Engine) -> None:
    """Return when nothing waits to be scored."""
    while (levels := engine.snapshot().shadow).waiting or levels.lent_bytes:
        await asyncio.sleep(0.05)


def _quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p50, p95 and p99."""
    p50, p95, p99 = (sorted(values)[int(share * (len(values) - 1))] for share in (0.5, 0.95, 0.99))
    return p50, p95, p99
