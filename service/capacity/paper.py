"""A replica that is only thought of: the engine's own scheduler and admission, driven by a simulated clock.

What is simulated is the model: a step takes what the law of its lane predicts. What is let in, what runs next, what is
reserved and when a step gives way is decided by `service/engine`; only the bookkeeping between two steps, which in an engine
goes with runner and delivery, is done here. Where nothing can change the batch of a decode step, many of them are one event.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import simpy

from service.capacity.mix import Lengths
from service.capacity.site import Site
from service.engine.admission import Admission, Ledger
from service.engine.answer import Answer
from service.engine.job import Job
from service.engine.loop import STREAM_SLICES
from service.engine.prefixes import Prefixes
from service.engine.request import Request, RequestError, Sampling
from service.engine.scheduler import Scheduler
from service.engine.work import Member, Work
from service.routing import Tellings, Told

LEAP = 32  # decode steps that are one event, at most: their laws are no quite straight lines
Events = Generator[simpy.Event, Any, Any]


@dataclass(eq=False)
class Visit:
    """One call: what it asks for, when each thing happened to it, in simulated seconds."""

    lengths: Lengths
    due: float  # when its caller sent it
    first: float | None = None  # token
    ended: float | None = None
    refused: str | None = None  # the refusal's code

    @property
    def first_token_seconds(self) -> float:
        return math.inf if self.first is None else self.first - self.due

    @property
    def token_seconds(self) -> float:
        """Between two tokens, on average."""
        if self.first is None or self.ended is None:
            return math.inf
        return (self.ended - self.first) / max(1, self.lengths.answer - 1)


class Node:
    """A machine: how much its replicas, and the proxies' work, slow each other down."""

    def __init__(self, site: Site, cpus: int, replicas: int, front_cpus: float) -> None:
        """`front_cpus`: CPUs that HTTP takes on average."""
        self.computing = 0
        self._threads, self._cpus, self._replicas = site.threads, cpus, replicas
        self._front = front_cpus
        self._crowding = site.around.crowding

    def slowdown(self) -> float:
        """Times as long that a step takes just now as alone."""
        others = (self.computing - 1) / max(1, self._replicas - 1)
        wanted = self.computing * self._threads + self._front
        return (1 + (self._crowding - 1) * others) * max(1.0, wanted / self._cpus)


class Paper:
    """A replica on paper."""

    def __init__(self, env: simpy.Environment, site: Site, node: Node, backend: str | None, leap: int = LEAP) -> None:
        """`backend`: that calls ask for; None: none. `leap`: 1 has every step be an event of its own."""
        self.busy_seconds = 0.0
        self.bytes_seconds = 0.0  # in which somebody waited for bytes, and
        self.slots_seconds = 0.0  # for one of `max_sequences`
        self._env, self._site, self._node, self._backend, self._leap = env, site, node, backend, leap
        self._ledger = Ledger(site.budget)
        prefixes = Prefixes(self._ledger, site.config.chunk_tokens, site.config.prefix_share, site.config.prefix_shared)
        self._scheduler = Scheduler(site.config, self._ledger, site.packs, prefixes)
        known, most = np.ones(site.vocab_size, dtype=np.bool_), site.config.max_sequences
        self._admission = Admission(
            known, site.max_length, most, self._ledger, self._scheduler, lambda request, offer: 0, site.tasks
        )
        self._admission.lanes, self._admission.rules = site.lanes, site.rules
        self._calls: dict[Job, tuple[Visit, Callable[[], None]]] = {}
        self._laws: WeakKeyDictionary[Work, float] = WeakKeyDictionary()  # seconds of steps, some of which come in slices
        self._tellings = Tellings()
        self._news: simpy.Event | None = None  # what it rests for
        self._is_open = False  # a step may be cut short by news
        self._process = env.process(self._serve())

    def take(self, call: Visit, ended: Callable[[], None]) -> None:
        """Let a call in, or refuse it; `ended` is called at its end, whatever that is."""
        sampling = Sampling(max_tokens=call.lengths.answer, ignore_eos=True, seed=0)
        prompt = array("i", bytes(4 * call.lengths.prompt))
        request = Request("paper", "completion", prompt, self._backend, sampling, arrival=self._env.now)
        try:
            offer = self._admission.admit(request)
        except RequestError as error:
            call.refused, call.ended = error.code, self._env.now
            ended()
            return
        job = Job.create(request, offer, Answer(lambda: None), self._site.tokenizer)
        self._calls[job] = call, ended
        self._scheduler.take_in(job)
        if self._news is not None and not self._news.triggered:
            self._news.succeed()
        elif self._is_open:
            self._process.interrupt()

    def tell(self) -> Told:
        """What it tells the router."""
        seconds, token_seconds = self._scheduler.seconds_in_front(), self._admission.token_seconds()
        return self._tellings.number({"outstanding_seconds": seconds, "token_seconds": token_seconds})

    def _serve(self) -> Events:
        while True:
            work = self._scheduler.next(self._env.now)
            if work is None:
                self._news = self._env.event()
                yield self._news
                self._news = None
                continue
            self._node.computing += 1
            steps = yield from self._run(work)
            self._node.computing -= 1
            if steps:
                self._settle(work, steps)
            else:
                self._scheduler.pause(work)

    def _run(self, work: Work) -> Events:
        """Run a step, a slice of it, or several that nothing can come between. Returns how many have ended."""
        began, before, slow = self._env.now, work.seconds, self._node.slowdown()
        seconds, steps = self._seconds(work), self._alike(work)
        if steps > 1:
            last = self._seconds(Work(work.kind, work.lane, tuple(_later(each, steps - 1) for each in work.members)))
            seconds = (seconds + last) / 2
            steps = yield from self._through(began, seconds * slow, steps)
            work.seconds = seconds
        else:
            until = began + (seconds - before) * slow
            steps = yield from self._slice(work, until)
            work.seconds = seconds if steps else before + (self._env.now - began) / slow
        took = self._env.now - began
        self._scheduler.account(work, took)
        self._note(took)
        return steps

    def _through(self, began: float, seconds: float, steps: int) -> Events:
        """Let steps pass, of so many seconds each; with news only to the end of the one that runs. Returns how many have."""
        while self._env.now < (until := began + steps * seconds):
            if (yield from self._wait(until)):
                break
            steps = min(steps, int((self._env.now - began) / seconds) + 1)
        return steps

    def _slice(self, work: Work, until: float) -> Events:
        """Run to the end, or to the pause at which it gives way, as `Engine._run` has it. Returns 1 at the end, else 0."""
        slices = STREAM_SLICES if work.kind == "decode" else 1
        limit = self._env.now + slices * self._site.config.slice_seconds
        while True:
            gives_way = self._scheduler.has_other_work(work) and limit < until
            stop = max(limit, self._env.now) if gives_way else until
            if stop <= self._env.now or (yield from self._wait(stop)):
                return 0 if gives_way else 1

    def _wait(self, until: float) -> Events:
        """Whether the time came without news."""
        self._is_open = True
        try:
            yield self._env.timeout(until - self._env.now)
            return True
        except simpy.Interrupt:
            return False
        finally:
            self._is_open = False

    def _seconds(self, work: Work) -> float:
        """Of a step, alone on its machine."""
        if work not in self._laws:
            self._laws[work] = work.lane.drift(work.kind) * work.predicted_seconds
        return self._laws[work]

    def _alike(self, work: Work) -> int:
        """How many steps of the same streams follow each other unless somebody comes."""
        scheduler = self._scheduler
        if work.kind != "decode" or work.seconds or scheduler.waiting or scheduler.paused:
            return 1
        if (
            scheduler.num_sequences != len(work.members)
            or self._seconds(work) > STREAM_SLICES * self._site.config.slice_seconds
        ):
            return 1
        left = min(member.job.request.sampling.max_tokens - len(member.sequence.output) for member in work.members)
        return min(self._leap, left)

    def _settle(self, work: Work, steps: int) -> None:
        """Move its members on, and draw so many tokens of each that has no other left to process."""
        work.move_on()
        for member in work.members:
            sequence, (call, _) = member.sequence, self._calls[member.job]
            if sequence.past == sequence.length:
                sequence.past += steps - 1
                sequence.output.extend([0] * steps)
                call.first = call.first or self._env.now
                if len(sequence.output) == call.lengths.answer:
                    self._end(member.job)

    def _end(self, job: Job) -> None:
        call, ended = self._calls.pop(job)
        call.ended = self._env.now
        job.close()
        self._scheduler.remove(job)
        ended()

    def _note(self, took: float) -> None:
        """What has passed, and what somebody waited for in it."""
        self.busy_seconds += took
        if self._scheduler.waiting:
            if self._scheduler.num_sequences >= self._site.config.max_sequences:
                self.slots_seconds += took
            elif not self._ledger.fits(min(job.need.total for job in self._scheduler.waiting)):
                self.bytes_seconds += took


def _later(member: Member, steps: int) -> Member:
    return Member(member.sequence, member.start + steps, member.end + steps)
