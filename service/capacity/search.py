"""The highest rate of calls at which a fleet on paper keeps a service level, and what is short above it.

Rates are doubled until one breaks the level, then bisected. Each is tried with the same calls in the same order, only closer
together, so that two rates, and two fleets, differ by nothing that was drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from service.capacity.fleet import Fleet, Layout, Level, Outcome
from service.capacity.mix import Mix
from service.capacity.site import Site
from service.engine.choice import predicted_seconds
from service.engine.request import QueueFull, Request, Sampling

PRECISION = 0.02  # between the highest rate that kept and the lowest that broke
FEW_PRECISION = 0.05  # of the few whose rate is a guess for many
LEAST = 1 / 64  # of the first rate: a level that is not kept there is not kept at any
STEP, SMALL_STEP = 2.0, 1.08  # to the next rate while nothing has kept, or broken; from a good guess
LOOKED_AT = 16  # replicas, whose rate is a good guess for more
SHORT = 0.1  # of the time, from which that somebody waits for bytes or a slot is what binds
BUSY_FRONT = 0.95
FULL = 0.9  # of the time computing, below which a queue that grows for a while is chance
GROWTH = 0.05  # of a second in a second, by which first tokens may come later without its being a queue that grows
CALLS, CALLS_EACH = 1000, 10  # of a run at least, and for each replica

Bound = Literal["time", "bytes", "sequences", "queue", "length", "front"]
TOLD: dict[Bound, str] = {
    "time": "replicas compute no faster",
    "bytes": "calls wait for bytes of the memory budget",
    "sequences": "calls wait for one of engine.max_sequences",
    "queue": "the queue is full: engine.max_waiting_requests or max_waiting_tokens",
    "length": "some calls can never run, or not within the level even alone",
    "front": "HTTP, proxies included, takes calls and tokens no faster",
}


@dataclass(frozen=True)
class Question:
    """What is asked of a fleet. `calls` of a run; None: by replicas."""

    mix: Mix
    level: Level
    backend: str | None = None
    seed: int = 0
    calls: int | None = None


@dataclass(frozen=True)
class Capacity:
    """What a layout holds."""

    layout: Layout
    kept: Outcome | None  # at the highest rate that keeps the level; None: none does
    broke: Outcome | None  # at the lowest that does not
    bound: Bound
    tried: int  # rates


def capacity(site: Site, layout: Layout, question: Question, precision: float = PRECISION) -> Capacity:
    """What a fleet of so many replicas holds."""
    guess, step = layout.replicas / mean_seconds(site, question), STEP
    if layout.replicas > LOOKED_AT:
        machines, proxies = (max(1, LOOKED_AT * each // layout.replicas) for each in (layout.machines, layout.proxies))
        few = replace(layout, replicas=LOOKED_AT, machines=machines, proxies=proxies)
        found = capacity(site, few, question, FEW_PRECISION)
        if found.kept is None:  # what few do not keep at any rate, calls that are alone among them, more do not either
            return replace(found, layout=layout)
        guess, step = found.kept.rate * layout.replicas / LOOKED_AT, SMALL_STEP
    return _search(site, layout, question, guess, step, precision)


def trial(site: Site, layout: Layout, question: Question, rate: float) -> Outcome:
    """One run at one rate."""
    calls = question.calls or max(CALLS, CALLS_EACH * layout.replicas)
    return Fleet(site, layout, question.mix, rate, question.seed, question.backend).run(calls, question.level)


def _search(site: Site, layout: Layout, question: Question, rate: float, step: float, precision: float) -> Capacity:
    kept: Outcome | None = None
    broke: Outcome | None = None
    least, tried = rate * LEAST, 0
    while rate >= least:
        outcome = trial(site, layout, question, rate)
        tried += 1
        if keeps(outcome, question.level):
            kept = outcome
        else:
            broke = outcome
        if kept is not None and broke is not None and broke.rate / kept.rate <= 1 + precision:
            break
        if broke is None:
            rate *= step
        elif kept is None:
            rate /= step
        else:
            rate = (kept.rate * broke.rate) ** 0.5
    return Capacity(layout, kept, broke, "length" if kept is None or broke is None else _bound(broke), tried)


def keeps(outcome: Outcome, level: Level) -> bool:
    """Whether a run kept the level, and would have gone on to: a queue that grows breaks any level in the end."""
    is_full = outcome.utilisation > FULL or any(share > SHORT for share in outcome.waiting_for.values())
    is_growing = is_full and outcome.growth > GROWTH
    return not outcome.is_cut and not is_growing and outcome.good >= level.share * outcome.judged


def mean_seconds(site: Site, question: Question) -> float:
    """Predicted, of a call of the mix that is alone."""
    lane = site.lanes.get(question.backend or site.rules.default) or next(iter(site.lanes.values()))
    total = 0.0
    for lengths, weight in question.mix.weights:
        request = Request("paper", "completion", range(lengths.prompt), sampling=Sampling(max_tokens=lengths.answer))
        total += weight * predicted_seconds(request, lane)
    return total / sum(weight for _, weight in question.mix.weights)


def _bound(broke: Outcome) -> Bound:
    bad = broke.judged - broke.good
    full = broke.refusals.get(QueueFull.code, 0)
    if sum(broke.refusals.values()) - full > bad / 2:
        return "length"
    if full > bad / 2:
        return "queue"
    short = max(broke.waiting_for, key=lambda name: broke.waiting_for[name])
    if broke.waiting_for[short] > SHORT:
        return "bytes" if short == "bytes" else "sequences"
    return "front" if broke.front > BUSY_FRONT else "time"
