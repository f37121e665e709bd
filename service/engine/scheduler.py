"""What runs next. A step of work is one call of the model for sequences of one backend.

Streams and prompts share the time: behind each slice of prefill the running streams get their share. Among prompts the one
that has waited longest in multiples of its own length comes first, at every chunk. A prompt enters when its bytes are free;
smaller ones may pass it meanwhile, until it has waited for `patience` times its own length.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from service.config import EngineConfig
from service.engine.admission import Route
from service.engine.job import Job, Sequence
from service.engine.measure import Gauge
from service.engine.memory import Ledger
from service.engine.observer import StepKind
from service.engine.sampling import Drawn, bytes_per_logit


@dataclass(frozen=True)
class Member:
    """The tokens from `start` to `end` of one sequence."""

    sequence: Sequence
    start: int
    end: int


@dataclass(eq=False)
class Work:
    """One step: its members, and where its computation stands. May pause within the layers of the model."""

    kind: StepKind
    route: Route
    members: tuple[Member, ...]
    stages: Generator[None, None, None] | None = None
    gauge: Gauge | None = None  # measures this step's peak; None when it is not sampled
    begun_at: float | None = None  # time.monotonic() of its first slice
    seconds: float = 0.0
    drawn: list[tuple[Sequence, Drawn]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(member.end - member.start for member in self.members)

    @property
    def predicted_seconds(self) -> float:
        course, mates = self.route.course, len(self.members) - 1
        return self._summed(course.step_seconds) - mates * course.pace.model.fixed  # which is paid once

    @property
    def predicted_bytes(self) -> int:
        drawing = [m.sequence.job.request for m in self.members if m.end == m.sequence.length and self.kind != "embed"]
        logits = self.route.course.vocab_size * sum(bytes_per_logit(request.sampling) for request in drawing)
        return max(int(self._summed(self.route.course.step_bytes)), logits)

    def _summed(self, law: Callable[[int, int], float]) -> float:
        """A law of (start, end) over all members; for streams, many and of nearly straight laws, that of their mean."""
        if self.kind != "decode":
            return sum(law(member.start, member.end) for member in self.members)
        mean = sum(member.end for member in self.members) // len(self.members)
        return len(self.members) * law(mean - 1, mean)


class Scheduler:
    """The queue, the running jobs, and the choice among them."""

    def __init__(self, config: EngineConfig, ledger: Ledger, can_pack: bool) -> None:
        """`can_pack`: prompts may share a call of the model without changing each other's numbers."""
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.paused: list[Work] = []
        self.suspect: Job | None = None  # the job being looked at: to blame when `next` raises
        self._config = config
        self._ledger = ledger
        self._can_pack = can_pack
        self._owed = 0.0  # seconds that streams are owed for prefill that went before them
        self._served: WeakKeyDictionary[Route, int] = WeakKeyDictionary()  # decode steps are dealt in turn among backends
        self._turn = 0

    @property
    def num_sequences(self) -> int:
        """Sequences that hold state or are promised one."""
        return sum(len(job.sequences) + len(job.siblings) for job in self.running)

    def next(self, now: float) -> Work | None:
        """The next step, its members marked as held; None when there is nothing to do.

        Raises whatever a look at one of the jobs raises; that job is `suspect` then, and nothing is held.
        """
        streams = self._streams()
        is_decoding = bool(streams) or any(work.kind == "decode" for work in self.paused)
        if not is_decoding:
            self._owed = 0.0
        work = self._prefill(now) if self._owed <= 0 else None
        work = work or (self._decode(streams) if is_decoding else None)
        self.suspect = None
        return work

    def account(self, work: Work, seconds: float) -> None:
        """Book the seconds that a step, or a slice of it, took."""
        share = self._config.decode_share
        self._owed = max(0.0, self._owed - seconds) if work.kind == "decode" else seconds * share / (1 - share)

    def pause(self, work: Work) -> None:
        self.paused.append(work)

    def remove(self, job: Job) -> None:
        """Forget a job, and the step of its own that is paused."""
        self._ledger.release(job)
        self.paused = [work for work in self.paused if any(m.sequence.job is not job for m in work.members)]
        (self.running if job in self.running else self.waiting).remove(job)

    def has_other_work(self, work: Work) -> bool:
        """Whether anybody but this step's members could run."""
        held = {member.sequence.job for member in work.members}
        return bool(self.waiting) or any(job not in held for job in self.running)

    def _streams(self) -> dict[Route, list[Sequence]]:
        """Sequences that can decode, by backend; one that must run alone replaces its backend's batch."""
        streams: dict[Route, list[Sequence]] = {}
        for job in self.running:
            self.suspect = job
            for sequence in job.sequences:
                if sequence.is_decoding and not sequence.is_done and not sequence.is_held:
                    streams.setdefault(job.route, []).append(sequence)
        return streams

    def _decode(self, streams: dict[Route, list[Sequence]]) -> Work:
        """The streams of the backend whose turn it is; its step that is paused comes before another of it."""
        paused = {work.route: work for work in self.paused if work.kind == "decode"}
        route = min((*paused, *streams), key=lambda route: self._served.get(route, 0))
        self._turn += 1
        self._served[route] = self._turn
        if route in paused:
            self.paused.remove(paused[route])
            return paused[route]
        alone = [sequence for sequence in streams[route] if sequence.is_alone]
        return self._hold("decode", route, alone[:1] or streams[route])

    def _prefill(self, now: float) -> Work | None:
        """The most urgent prompt that can go on, with others of its backend when they fit beside it."""
        prompts = [work for work in self.paused if work.kind != "decode"]
        paused = max(prompts, key=lambda work: self._pressure(work, now), default=None)
        candidates = self._candidates(now)
        first = next(candidates, None)
        if paused is not None and (first is None or self._pressure(paused, now) >= self._urgency(first.job, now)):
            self.paused.remove(paused)
            return paused
        if first is None:
            return None
        return self._hold("embed" if first.job.is_embedding else "prefill", first.job.route, self._pack(first, candidates))

    def _urgency(self, job: Job, now: float) -> float:
        self.suspect = job
        return job.urgency(now)

    def _pressure(self, work: Work, now: float) -> float:
        return max(self._urgency(member.sequence.job, now) for member in work.members)

    def _candidates(self, now: float) -> Iterator[Sequence]:
        """Sequences with a prompt to process, most urgent first. Asking for one lets its job in."""
        jobs = [job for job in self.running if _unprocessed(job)] + self.waiting
        entered, is_closed = set(self.running), False
        for job in sorted(jobs, key=lambda job: -self._urgency(job, now)):
            self.suspect = job
            if job in entered:
                yield from _unprocessed(job)
            elif not is_closed and self._has_room(job):
                self._enter(job)
                yield job.sequences[0]
            elif job.urgency(now) > self._config.patience:
                is_closed = True  # it has been overtaken long enough: what comes free, as others end, is kept for it

    def _has_room(self, job: Job) -> bool:
        return self._ledger.fits(job.need.total) and self.num_sequences + job.request.n <= self._config.max_sequences

    def _enter(self, job: Job) -> None:
        self._ledger.hold(job, job.need.total)
        self.waiting.remove(job)
        self.running.append(job)

    def _pack(self, first: Sequence, others: Iterable[Sequence]) -> list[Sequence]:
        """Sequences whose next chunks together are no longer than one may be."""
        self.suspect = first.job
        pack, tokens = [first], _next_end(first) - first.past
        if first.is_alone or not (self._can_pack or first.job.is_embedding):
            return pack
        for other in others:
            if other.job.route is not first.job.route or other.job.is_embedding != first.job.is_embedding or other.is_alone:
                continue
            tokens += _next_end(other) - other.past
            if tokens > self._config.chunk_tokens:
                break
            pack.append(other)
        return pack

    def _hold(self, kind: StepKind, route: Route, sequences: list[Sequence]) -> Work:
        """The next step of these sequences. They are marked when nothing more can go wrong."""
        members = []
        for sequence in sequences:
            self.suspect = sequence.job
            members.append(Member(sequence, sequence.past, _next_end(sequence)))
        for sequence in sequences:
            sequence.is_held = True
        return Work(kind, route, tuple(members))


def _unprocessed(job: Job) -> list[Sequence]:
    """Sequences of a running job that have more than a decode step before them."""
    return [s for s in job.sequences if not (s.is_decoding or s.is_done or s.is_held)]


def _next_end(sequence: Sequence) -> int:
    return min(sequence.length, sequence.job.route.course.next_end(sequence.past))
