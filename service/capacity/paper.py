"""A replica that is only thought of: the engine's own scheduler and admission, driven by a simulated clock.

What is simulated is the model: a step takes what the law of its lane predicts. What is let in, what runs next, what is
reserved and when a step gives way is decided by `service/engine`; only the bookkeeping between two steps, which in an engine
goes with runner and delivery, is done here. Where nothing can change the batch of a decode step, many of them are one event.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import simpy

from service.capacity.mix import Lengths
from service.capacity.site import Site
from service.engine.admission import Admission, Ledger
from service.engine.allowlist import Lane
from service.engine.answer import Answer
from service.engine.job import Job
from service.engine.loop import STREAM_SLICES
from service.engine.prefixes import Prefixes
from service.engine.request import Request, RequestError, Sampling
from service.engine.scheduler import Scheduler
from service.engine.work import Member, Work
from service.routing import Told, tell

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


@dataclass(frozen=True)
class Turns:
    """A slice of a prompt and the steps that streams are owed for it, so many times in a row."""

    streams: Sequence[Work]  # the first of their steps; none where a prompt runs beside prompts only
    steps: int  # in a round
    count: int  # of rounds
    seconds: float  # of one, on average


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
        self._news: simpy.Event | None = None  # what it rests for
        self._is_open = False  # a step may be cut short by news
        self._process = env.process(self._serve())

    def take(self, call: Visit, ticket: str, ended: Callable[[], None]) -> None:
        """Let a call in, or refuse it; `ended` is called at its end, whatever that is."""
        sampling = Sampling(max_tokens=call.lengths.answer, ignore_eos=True, seed=0)
        prompt = array("i", bytes(4 * call.lengths.prompt))
        request = Request("paper", "completion", prompt, self._backend, sampling, arrival=self._env.now, ticket=ticket)
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
        return tell(self._scheduler.ahead(), self._admission.token_seconds(), keeps_prefixes=False)

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
        if (turns := self._turns(work, slow)) is not None:
            yield from self._take_turns(work, turns, slow)
            return 0
        seconds, steps = self._seconds(work), self._alike(work)
        if steps > 1:
            last = self._seconds(_later(work, steps - 1))
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

    def _take_turns(self, work: Work, turns: Turns, slow: float) -> Events:
        """Let a prompt's slices pass, and between them the streams' steps."""
        began = self._env.now
        count = yield from self._through(began, turns.seconds, turns.count)
        work.seconds += count * self._site.config.slice_seconds / slow
        for streams in turns.streams:
            self._settle(streams, count * turns.steps)
        self._note(self._env.now - began)

    def _through(self, began: float, seconds: float, steps: int) -> Events:
        """Let steps pass, of so many seconds each; with news only to the end of the one that runs. Returns how many have."""
        while self._env.now < (until := began + steps * seconds):
            if (yield from self._wait(until)):
                break
            steps = min(steps, int((self._env.now - began) / seconds) + 1)
        return steps

    def _slice(self, work: Work, until: float) -> Events:
        """Run to the end, or to the pause at which it gives way, as `Engine._run` has it. Returns 1 at the end, else 0."""
        slices = STREAM_SLICES if self._scheduler.is_patient(work) else 1
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
        return min(self._leap, _least_left(work))

    def _turns(self, work: Work, slow: float) -> Turns | None:
        """How a prompt and streams of one lane take turns unless somebody comes; None: they do not, or not alike."""
        config, others = self._site.config, [job for job in self._scheduler.running if job not in work.jobs]
        streams = _streams(job for job in others if job.sequences[0].is_decoding)
        prompts = [job for job in others if not job.sequences[0].is_decoding] + self._scheduler.waiting
        if self._leap == 1 or work.kind == "decode" or len(streams) > 1 or not (streams or prompts):
            return None
        if any(paused.kind == "decode" for paused in self._scheduler.paused):
            return None
        slices = math.ceil((self._seconds(work) - work.seconds) * slow / config.slice_seconds)
        count, steps, seconds = slices - 1, 0, config.slice_seconds  # the last slice ends with its chunk
        for each in streams:
            owed, first = config.slice_seconds * config.decode_share / (1 - config.decode_share), self._seconds(each) * slow
            steps = math.ceil(owed / first)
            count = min(count, self._leap // steps, _least_left(each) // steps)
            last = self._seconds(_later(each, max(0, count * steps - 1))) * slow
            if math.ceil(owed / last) != steps or last > STREAM_SLICES * config.slice_seconds:
                return None
            seconds += steps * (first + last) / 2
        if (lasts := self._most_urgent_for(work, prompts)) < count * seconds:
            count = int(lasts / seconds) + 1
        return Turns(streams, steps, count, seconds) if count > 0 else None

    def _most_urgent_for(self, work: Work, prompts: Iterable[Job]) -> float:
        """Seconds until one of the prompts is more urgent than a step that is now, or may be."""
        now, lasts = self._env.now, math.inf
        first = max((member.job for member in work.members), key=lambda job: job.urgency(now))
        for job in prompts:
            ahead = first.urgency(now) - job.urgency(now)
            gains = ahead - first.urgency(now + 1) + job.urgency(now + 1)  # in a second: urgencies are straight lines
            if ahead < 0 and job.urgency(now) > self._site.config.patience:
                return 0.0  # it has no room, and keeps those out that come behind it, whoever that is then
            if ahead >= 0 and gains > 0:
                lasts = min(lasts, ahead / gains)
        return lasts

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


def _streams(jobs: Iterable[Job]) -> list[Work]:
    """The next step of jobs that draw tokens, by lane."""
    lanes: dict[Lane, list[Member]] = {}
    for job in jobs:
        past = job.sequences[0].past
        lanes.setdefault(job.lane, []).append(Member(job.sequences[0], past, past + 1))
    return [Work("decode", lane, tuple(members)) for lane, members in lanes.items()]


def _later(work: Work, steps: int) -> Work:
    """A decode step of the same streams so many steps later."""
    return Work(
        work.kind, work.lane, tuple(Member(each.sequence, each.start + steps, each.end + steps) for each in work.members)
    )


def _least_left(work: Work) -> int:
    """Tokens that the first of its streams to end has still to draw."""
    return min(member.job.request.sampling.max_tokens - len(member.sequence.output) for member in work.members)
