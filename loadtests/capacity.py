"""The highest rate that keeps a service level: doubled until it breaks, then bisected.

A probe is a number of Poisson arrivals at one rate; it keeps the level when the wanted share of requests is good. Where
Wilson's interval of that share holds the wanted one, the probe is repeated once with other arrivals and both are judged
together; if that does not decide either, the share itself does, and the report says so.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from loadtests.result import Probe
from loadtests.statistics import wilson

Attempt = Callable[[float, int], Awaitable[tuple[int, int]]]
"""Send at a rate, attempt number so many: how many requests were good, of how many."""

LEAST_RATE = 1 / 64  # of the first rate: a level that is not kept there is not kept at any


async def search(
    attempt: Attempt, first_rate: float, attainment: float, precision: float, most: int
) -> tuple[list[Probe], float | None]:
    """Every probe in order, and the highest rate that kept the level; None when none did.

    Args:
        attainment: the share of good requests that keeps the level.
        precision: ends when the lowest rate that broke is within this share of the highest that kept.
        most: number of probes.
    """
    probes: list[Probe] = []
    kept: float | None = None
    broke: float | None = None
    rate = first_rate
    while len(probes) < most and rate >= first_rate * LEAST_RATE:
        probe = await _probe(attempt, rate, attainment, len(probes))
        probes.append(probe)
        if probe.kept:
            kept = rate
        else:
            broke = rate
        if kept is not None and broke is not None and broke / kept <= 1 + precision:
            break
        rate = next_rate(kept, broke)
    return probes, kept


def next_rate(kept: float | None, broke: float | None) -> float:
    """Twice the kept one, half the broken one, or the geometric middle between them."""
    if broke is None:
        assert kept is not None, "a probe has kept the level or not"
        return kept * 2
    return broke / 2 if kept is None else (kept * broke) ** 0.5


async def _probe(attempt: Attempt, rate: float, attainment: float, index: int) -> Probe:
    good = count = 0
    decided = False
    for turn in range(2):
        more_good, more = await attempt(rate, 2 * index + turn)
        good, count = good + more_good, count + more
        share = wilson(good, count)
        decided = not share.low <= attainment <= share.high
        if decided:
            break
    return Probe(rate=rate, good=good, count=count, kept=good >= attainment * count, decided=decided)
