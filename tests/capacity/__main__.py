"""What two real replicas hold, beside what they hold on paper: `python -m tests.capacity`, three minutes on a quiet machine.

Starts `longserve serve` with two replicas of one thread each, has `longserve capacity`'s own parts ask it for its laws and say
the highest rate that keeps a level, then sends the same calls in the same order at rates around that, open loop, as streams.
The rate that the real ones hold is read off between the last trial that kept the level and the first that did not, by the share
of good calls. Exit status 1 when the two rates are further apart than `BOUND`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp

from service.capacity import site as sites
from service.capacity.fleet import Fleet, Layout, Level, Outcome, quantiles
from service.capacity.mix import Lengths, Mix, gaps
from service.capacity.paper import Visit
from service.capacity.probe import Sender, probe, together
from service.capacity.search import Question, capacity
from service.config import ServiceConfig
from service.machine import available_cpus
from tests.serving import Service, serving

BOUND = 0.15
FACTORS = (0.95, 1.1, 1.25, 1.4)  # of the rate on paper
LAYOUT = Layout(replicas=2, machines=1)
BEGINNING = 0.1  # of the calls, which is not judged, as on paper


def settings(data: Any) -> None:
    application = data["applications"][0]
    application["args"] |= {"threads": 1, "http": {"workers": 1}}
    application["deployments"][0] |= {"num_replicas": 2}


def site_of(service: Service, mix: Mix, backend: str) -> sites.Site:
    """What two replicas on this machine are made of, HTTP and each other included."""
    around = probe(Sender(service.url, {}, backend, 4000), mix, LAYOUT.replicas, available_cpus())
    infos = {info["replica"]["name"]: info for info in (service.get("/info").json for _ in range(12))}
    return replace(sites.told(together(list(infos.values())), ServiceConfig()), around=around)


async def trial(url: str, mix: Mix, backend: str, rate: float, count: int, seed: int) -> list[Visit]:
    """What became of so many calls at one rate."""
    numbers = random.Random(seed)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:

        async def send(lengths: Lengths, due: float) -> Visit:
            prompt = numbers.choices(range(1, 4000), k=lengths.prompt)
            body = {"prompt": prompt, "max_tokens": lengths.answer, "ignore_eos": True, "stream": True, "attention": backend}
            await asyncio.sleep(due - time.monotonic())
            call = Visit(lengths, due)
            async with session.post(f"{url}/v1/completions", json=body) as answer:
                if answer.status != 200:
                    call.refused = str(answer.status)
                async for _ in answer.content:
                    call.first = call.first or time.monotonic()
            call.ended = time.monotonic()
            return call

        at, calls = time.monotonic() + 1, []
        for lengths, gap in zip(mix.draw(count, seed), gaps(count, seed), strict=True):
            at += gap / rate
            calls.append(asyncio.create_task(send(lengths, at)))
        return await asyncio.gather(*calls)


def outcome(calls: Sequence[Visit], rate: float, level: Level) -> Outcome:
    judged = calls[int(BEGINNING * len(calls)) :]
    answered = [call for call in judged if call.refused is None]
    return Outcome(
        rate=rate,
        sent=len(calls),
        judged=len(judged),
        good=sum(call.refused is None and level.keeps(call) for call in judged),
        answered=len(answered),
        refusals={},
        first_token_seconds=quantiles([call.first_token_seconds for call in answered]),
        token_seconds=quantiles([call.token_seconds for call in answered]),
        utilisation=0,
        front=0,
    )


def held(outcomes: Sequence[Outcome], share: float) -> float | None:
    """The rate at which the share of good calls passes `share`, straight between two trials; None where it does not."""
    shares = [each.good / each.judged for each in outcomes]
    for low, high, a, b in zip(outcomes, outcomes[1:], shares, shares[1:], strict=False):
        if a >= share > b:
            return low.rate + (high.rate - low.rate) * (a - share) / (a - b)
    return None


def show(name: str, each: Outcome) -> None:
    pairs = (each.first_token_seconds, each.token_seconds)
    times = "".join(f"{'-' if pair is None else f'{pair[0]:.4f} {pair[1]:.4f}':>18}" for pair in pairs)
    print(f"{each.rate:>8.2f}  {name:<6}{each.good / each.judged:>8.1%}{times}", flush=True)


def compared(service: Service, mix: Mix, level: Level, backend: str, seconds: float, seed: int) -> bool:
    site = site_of(service, mix, backend)
    print(f"{site.around}, drift {site.lanes[backend].drift('prefill'):.2f} {site.lanes[backend].drift('decode'):.2f}")
    found = capacity(site, LAYOUT, Question(mix, level, backend, seed)).kept
    assert found is not None, "no rate keeps this level on paper"
    print(f"{'calls/s':>8}  {'':<6}{'good':>8}{'first token':>18}{'per token':>18}   seconds, p50 and p95")
    real, paper = [], []
    for factor in FACTORS:
        rate = factor * found.rate
        count = int(seconds * rate)
        real.append(outcome(asyncio.run(trial(service.url, mix, backend, rate, count, seed)), rate, level))
        fleet = Fleet(site, LAYOUT, mix, rate, seed, backend)
        fleet.run(count)
        paper.append(outcome(fleet.calls, rate, level))
        show("real", real[-1])
        show("paper", paper[-1])
    holds, promised = held(real, level.share), held(paper, level.share)
    if holds is None or promised is None:
        print(f"real {holds}, on paper {promised}: one of them does not pass the level between these rates")
        return False
    apart = promised / holds - 1
    print(f"real {holds:.2f} calls/s, on paper {promised:.2f}: {apart:+.0%}; of 1000 calls on paper {found.rate:.2f}")
    return abs(apart) <= BOUND


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.capacity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", default="2048:16@0.9,8192:16@0.1")
    parser.add_argument("--backend", default="dense")
    parser.add_argument("--first-token", type=float, default=3.0)
    parser.add_argument("--per-token", type=float, default=0.1)
    parser.add_argument("--share", type=float, default=0.95)
    parser.add_argument("--seconds", type=float, default=15.0, help="of sending at each rate")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    level = Level(options.first_token, options.per_token, options.share)
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "two.yaml", settings) as service:
        mix = Mix.parse(options.lengths)
        return 0 if compared(service, mix, level, options.backend, options.seconds, options.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
