"""Replicas on machines behind proxies, and the calls that come to them: one run at one rate, in simulated time.

A proxy takes calls one after the other and sends each to a replica by the router's own rule (`service/routing.py`), of which
it is told once a second. The same seed has the same calls come, at any rate in the same order.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, sqrt
from statistics import fmean

import numpy as np
import simpy

from service.capacity.mix import Lengths, Mix, gaps
from service.capacity.paper import LEAP, Events, Node, Paper, Visit
from service.capacity.site import Site
from service.routing import TOLD_SECONDS, Sent, Told

ON_ITS_WAY_SECONDS = 0.5 * TOLD_SECONDS  # what a replica tells, to the proxies: by Serve's controller, from none to twice that
WARM_UP = 0.1  # of the calls, which find emptier replicas than later ones and are not judged
BEGIN = 1.0  # a clock that shows 0 is taken for one that was not read


@dataclass(frozen=True)
class Layout:
    """How many of each. Replicas are dealt to machines in turn, callers to proxies at random."""

    replicas: int
    machines: int = 1
    proxies: int = 1
    cpus: int | None = None  # of a machine; None: of the one that the replica was measured on


@dataclass(frozen=True)
class Level:
    """A service level: of `share` of the calls, both are kept; a call that is refused keeps none."""

    first_token_seconds: float
    token_seconds: float
    share: float

    def keeps(self, call: Visit) -> bool:
        return call.first_token_seconds <= self.first_token_seconds and call.token_seconds <= self.token_seconds


@dataclass(frozen=True)
class Outcome:
    """What became of the calls of one run. Those that came before the replicas had filled are left out."""

    rate: float  # calls a second
    sent: int
    judged: int
    good: int
    answered: int
    refusals: dict[str, int]  # by code
    first_token_seconds: tuple[float, float] | None  # p50 and p95, of answered calls
    token_seconds: tuple[float, float] | None
    utilisation: float  # of the replicas' time, computing
    front: float  # of the proxies' time
    growth: float = 0.0  # at least so many seconds later first tokens come for each second that passes, in the second half
    waiting_for: dict[str, float] = field(default_factory=dict)  # bytes, sequences: shares of the replicas' time
    is_cut: bool = False  # ended when it could keep the level no more


class Proxies:
    """What each proxy knows of each replica, and how it chooses.

    The ranks of the rule stand in tables: a telling changes a column at once, but for the proxies that have sent the replica
    something. A thousand proxies of a thousand replicas would else weigh a million of them every second.
    """

    def __init__(self, count: int, told: Sequence[Told], seed: str, clock: Callable[[], float]) -> None:
        """`told`: by replica, changed as they tell."""
        self._told, self._clock = told, clock
        self._sent: list[dict[int, Sent]] = [{} for _ in told]  # by replica and proxy
        self._seconds, self._calls = np.zeros((count, len(told))), np.zeros((count, len(told)), np.int32)  # the two of a rank
        self._random = random.Random(seed)

    def choose(self, proxy: int) -> int:
        """The first of the replicas in the rule's order; one of those that share its place, at random."""
        seconds, calls = self._seconds[proxy], self._calls[proxy]
        soonest = np.flatnonzero(seconds == seconds.min())
        fewest = calls[soonest]
        return int(self._random.choice(soonest[fewest == fewest.min()]))

    def send(self, proxy: int, index: int, call: str, tokens: int) -> None:
        sent = self._sent[index].setdefault(proxy, Sent(clock=self._clock))
        sent.add(call, tokens)
        self._rank(proxy, index, sent)

    def end(self, proxy: int, index: int, call: str) -> None:
        sent = self._sent[index][proxy]
        sent.remove(call)
        self._rank(proxy, index, sent)

    def hear(self, index: int) -> None:
        """A replica has told something."""
        self._seconds[:, index], self._calls[:, index] = Sent().rank(self._told[index])
        for proxy, sent in self._sent[index].items():
            self._rank(proxy, index, sent)
        self._sent[index] = {proxy: sent for proxy, sent in self._sent[index].items() if sent.knows_any}

    def _rank(self, proxy: int, index: int, sent: Sent) -> None:
        self._seconds[proxy, index], self._calls[proxy, index] = sent.rank(self._told[index])


class Fleet:
    """All of it, for one run."""

    def __init__(
        self, site: Site, layout: Layout, mix: Mix, rate: float, seed: int, backend: str | None = None, leap: int = LEAP
    ) -> None:
        self._env = simpy.Environment(BEGIN)
        self._site, self._layout, self._mix, self._rate, self._seed = site, layout, mix, rate, seed
        around, mean = site.around, mix.mean()
        per_proxy, per_machine = rate / layout.proxies, rate / layout.machines
        streaming = min(0.99, per_proxy * mean.answer * around.token_seconds)  # of a proxy's time
        self._call_seconds = around.call_seconds / (1 - streaming)
        self.front = per_proxy * (around.call_seconds + mean.answer * around.token_seconds)
        front_cpus = per_machine * (around.call_seconds + mean.answer * around.token_seconds)
        counts = [len(range(at, layout.replicas, layout.machines)) for at in range(layout.machines)]
        nodes = [Node(site, layout.cpus or site.cpus, count, front_cpus) for count in counts]
        self._replicas = [Paper(self._env, site, nodes[at % layout.machines], backend, leap) for at in range(layout.replicas)]
        self._told: list[Told] = [{} for _ in self._replicas]
        self._proxies = Proxies(layout.proxies, self._told, f"proxies {seed}", lambda: self._env.now)
        self._free_at = [0.0] * layout.proxies  # when a proxy can take its next call
        self._random = random.Random(f"fleet {seed}")
        self.calls: list[Visit] = []
        self._judged = 0  # calls that count, of those that have ended
        self._bad = 0

    def run(self, count: int, level: Level | None = None) -> Outcome:
        """Send so many calls and wait for their ends; with a level only until it cannot be kept any more."""
        done = self._env.event()
        self._done, self._level, self._count, self._left = done, level, count, count
        for index in range(len(self._replicas)):
            self._env.process(self._telling(index))
        self._env.process(self._arriving(self._mix.draw(count, self._seed), gaps(count, self._seed)))
        self._env.run(done)
        return self._outcome()

    def _arriving(self, lengths: Sequence[Lengths], between: Sequence[float]) -> Events:
        for number, (each, gap) in enumerate(zip(lengths, between, strict=True)):
            yield self._env.timeout(gap / self._rate)
            call = Visit(each, self._env.now)
            self.calls.append(call)
            self._env.process(self._passing(call, str(number), number >= WARM_UP * self._count))

    def _passing(self, call: Visit, name: str, counts: bool) -> Events:
        """A call's way through a proxy to its replica."""
        proxy = self._random.randrange(self._layout.proxies)
        self._free_at[proxy] = max(self._free_at[proxy], self._env.now) + self._call_seconds
        yield self._env.timeout(self._free_at[proxy] - self._env.now)
        index = self._proxies.choose(proxy)
        self._proxies.send(proxy, index, name, call.lengths.prompt)

        def ended() -> None:
            self._proxies.end(proxy, index, name)
            self._count_end(call, counts)

        self._replicas[index].take(call, name, ended)

    def _count_end(self, call: Visit, counts: bool) -> None:
        self._left -= 1
        if counts and self._level is not None:
            self._bad += not self._level.keeps(call)
        is_lost = self._level is not None and self._bad > (1 - self._level.share) * (self._count - int(WARM_UP * self._count))
        if (self._left == 0 or is_lost) and not self._done.triggered:
            self._done.succeed()

    def _telling(self, index: int) -> Events:
        yield self._env.timeout(self._random.random() * TOLD_SECONDS)
        while True:
            told = self._replicas[index].tell()
            yield self._env.timeout(ON_ITS_WAY_SECONDS)
            self._told[index] = told
            self._proxies.hear(index)
            yield self._env.timeout(TOLD_SECONDS - ON_ITS_WAY_SECONDS)

    def utilisation(self) -> float:
        """Of the replicas' time so far, computing."""
        return sum(each.busy_seconds for each in self._replicas) / self._spent()

    def _spent(self) -> float:
        return (self._env.now - BEGIN) * len(self._replicas)

    def _outcome(self) -> Outcome:
        first = int(WARM_UP * self._count)
        judged = [call for call in self.calls[first:] if call.ended is not None]
        answered = [call for call in judged if call.refused is None]
        spent = self._spent()
        good = 0 if self._level is None else sum(map(self._level.keeps, judged))
        waits = {
            "bytes": sum(each.bytes_seconds for each in self._replicas) / spent,
            "sequences": sum(each.slots_seconds for each in self._replicas) / spent,
        }
        return Outcome(
            rate=self._rate,
            sent=len(self.calls),
            judged=len(judged),
            good=good,
            answered=len(answered),
            refusals=dict(Counter(call.refused for call in judged if call.refused is not None)),
            first_token_seconds=quantiles([call.first_token_seconds for call in answered]),
            token_seconds=quantiles([call.token_seconds for call in answered if call.lengths.answer > 1]),
            utilisation=self.utilisation(),
            front=self.front,
            growth=slope([(call.due, call.first_token_seconds) for call in answered[len(answered) // 2 :]]),
            waiting_for=waits,
            is_cut=self._left > 0,
        )


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line through points, by least squares, less two standard errors; 0 of fewer than three."""
    if len(points) < 3:
        return 0.0
    x, y = (fmean(values) for values in zip(*points, strict=True))
    spread = sum((at - x) ** 2 for at, _ in points)
    found = sum((at - x) * (value - y) for at, value in points) / spread
    rest = sum((value - y - found * (at - x)) ** 2 for at, value in points)
    return float(found - 2 * sqrt(rest / (len(points) - 2) / spread))


def quantiles(values: Sequence[float]) -> tuple[float, float] | None:
    """The median and the 95th percentile; None of nothing."""
    ordered = sorted(values)
    return (ordered[ceil(0.5 * len(ordered)) - 1], ordered[ceil(0.95 * len(ordered)) - 1]) if ordered else None
