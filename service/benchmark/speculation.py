"""What prompt lookup brings and costs: tokens a second with guesses and without, one behind the other on one engine.

On text that repeats itself (log lines, and this project's own code, greedily continued) it should bring much, on text that
never does (random tokens, drawn at temperature 1) cost next to nothing.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from service.benchmark.alone import make_engine
from service.benchmark.bare import BACKENDS, report
from service.engine.engine import Engine
from service.engine.request import Request, Sampling
from service.model.checkpoint import load
from service.model.tokenizer import Tokenizer
from service.threads import in_passing_thread

ANSWER = 256  # tokens
PROMPT = 1024
GUESSED = 4  # most for one step
REPEATS = 5
TOGETHER = (1, 8)  # streams


def log_lines(tokenizer: Tokenizer) -> list[int]:
    """Lines of a service's log, which differ in a few numbers."""
    lines = (
        f"2026-11-{day:02d} 08:{minute:02d}:17 INFO request ended id=r{day * 60 + minute} outcome=stop tokens={512 + minute}\n"
        for day in range(1, 28)
        for minute in range(60)
    )
    return tokenizer.encode("".join(lines))[:PROMPT]


def code(tokenizer: Tokenizer) -> list[int]:
    """Source of this project."""
    return tokenizer.encode((Path(__file__).parents[1] / "metrics.py").read_text())[:PROMPT]


def noise(tokenizer: Tokenizer) -> list[int]:
    """Tokens that hang together in no way."""
    return random.choices(sorted(set(tokenizer.ids) - set(tokenizer.controls)), k=PROMPT)


TEXTS: dict[str, tuple[Callable[[Tokenizer], list[int]], float]] = {  # a prompt, and the temperature of its answer
    "log lines": (log_lines, 0.0),
    "code": (code, 0.0),
    "noise": (noise, 1.0),
}


async def seconds(engine: Engine, prompts: Sequence[list[int]], backend: str, temperature: float, guessed: int | None) -> Any:
    """Seconds from the last prompt's end to the last answer's, and the guesses of one round of streams."""
    sampling = Sampling(max_tokens=ANSWER, temperature=temperature, seed=1, ignore_eos=True, lookup_tokens=guessed)
    requests = [Request("benchmark", "completion", tokens, backend, sampling) for tokens in prompts]

    async def read(request: Request) -> None:
        async for _ in engine.submit(request):
            pass

    await asyncio.gather(*map(read, requests))
    timings = [request.timings for request in requests]
    begun = max(each.prefilled_at or 0.0 for each in timings)
    return time.monotonic() - begun, sum(t.guessed_tokens for t in timings), sum(t.accepted_tokens for t in timings)


async def measure_speculation() -> dict[str, Any]:
    """Tokens a second with guesses in parts of those without, by text, backend and streams."""
    checkpoint = in_passing_thread(load)
    engine, found = make_engine(checkpoint, prompt_lookup={"tokens": GUESSED}), dict[str, Any]()
    await engine.start()
    for text, (made, temperature) in TEXTS.items():
        for name in BACKENDS:
            for count in TOGETHER:
                prompts = [made(checkpoint.tokenizer)] * count
                runs: dict[int | None, list[float]] = {0: [], None: []}
                guessed = right = 0
                for _ in range(REPEATS + 1):
                    for wish, own in runs.items():
                        taken, *told = await seconds(engine, prompts, name, temperature, wish)
                        own.append(count * ANSWER / taken)
                        guessed, right = told if wish is None else (guessed, right)
                plain, fast = (median(own[1:]) for own in runs.values())
                found.setdefault(text, {}).setdefault(name, {})[count] = round(fast / plain, 3)
                share = f"{right} of {guessed} guesses right" if guessed else "nothing guessed"
                told = f"{plain:7.0f} tokens/s, with guesses {fast:7.0f}: {fast / plain:.2f}x, {share}"
                report(f"prompt lookup, {text}, {count} at once", name, told)
    await engine.stop()
    return found
