"""Who is next: the queue, the running jobs, and the choice among them.

Streams and prompts share the time: behind each slice of prefill the running streams get their share. Among prompts the one
that has waited longest in multiples of its own length comes first, at every chunk. A prompt enters when its bytes are free;
smaller ones may pass it meanwhile, until it has waited for `patience` times its own length.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from functools import cache
from weakref import WeakKeyDictionary

from service.config import EngineConfig
from service.engine.admission import Ledger
from service.engine.ahead import Ahead, together
from service.engine.allowlist import Lane
from service.engine.job import Job, Sequence
from service.engine.prefixes import Prefixes, bytes_of
from service.engine.work import Member, StepKind, Work


class Scheduler:
    """Makes the next step of work, and reserves the bytes of the jobs that enter with it."""

    def __init__(self, config: EngineConfig, ledger: Ledger, can_pack: bool, prefixes: Prefixes) -> None:
        """`can_pack`: prompts may share a call of the model without changing each other's numbers."""
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.paused: list[Work] = []
        self.suspect: Job | None = None  # the job being looked at: to blame when `next` raises
        self._config = config
        self._ledger = ledger
        self._can_pack = can_pack
        self._prefixes = prefixes
        self._owed = 0.0  # seconds that streams are owed for prefill that went before them
        self._served: WeakKeyDictionary[Lane, int] = WeakKeyDictionary()  # decode steps are dealt in turn among lanes
        self._turn = 0

    # ---- the queue --------------------------------------------------------------------------------------------------

    @property
    def jobs(self) -> list[Job]:
        """All that run or wait."""
        return [*self.running, *self.waiting]

    @property
    def is_waiting(self) -> bool:
        """Whether anybody waits."""
        return bool(self.waiting)

    @property
    def num_sequences(self) -> int:
        """Sequences that hold state or are promised one."""
        return sum(len(job.sequences) + len(job.siblings) for job in self.running)

    def why_full(self, tokens: int) -> str | None:
        """The bound that keeps a prompt of so many tokens out of the queue; None: it may come in. An empty queue takes any."""
        most = self._config.max_waiting_requests
        if len(self.waiting) >= most:
            return f"{len(self.waiting)} requests wait and at most {most} may"
        queued, most = sum(len(job.prompt) for job in self.waiting), self._config.max_waiting_tokens
        if self.waiting and queued + tokens > most:
            return f"{queued} tokens wait, at most {most} may, and this prompt has {tokens}"
        return None

    def why_never(self, lengths: list[int]) -> str | None:
        """The bound that prompts of so many tokens each pass together, though nobody else waits; None: they may wait."""
        if len(lengths) > (most := self._config.max_waiting_requests):
            return f"{len(lengths)} prompts of a call wait together and at most {most} requests may"
        if len(lengths) > 1 and sum(lengths) > (most := self._config.max_waiting_tokens):
            return f"the prompts of a call have {sum(lengths)} tokens and at most {most} may wait"
        return None

    def seconds_in_front(self) -> float:
        """Predicted seconds until all that runs or waits is done."""
        return together(job.ahead for job in self.jobs).seconds

    def ahead(self) -> dict[str, Ahead]:
        """What is still to be done of each call that runs or waits, by its ticket; of all that have none, under ""."""
        jobs: dict[str, list[Ahead]] = {}
        for job in self.jobs:
            jobs.setdefault(job.request.ticket, []).append(job.ahead)
        return {ticket: together(works) for ticket, works in jobs.items()}

    def take_in(self, job: Job) -> None:
        """Let a job wait that was let in."""
        self.meet(job)
        self.waiting.append(job)

    def remove(self, job: Job) -> None:
        """Forget a job, and the step of its own that is paused."""
        self._ledger.release(job)
        self.paused = [work for work in self.paused if work.jobs != {job}]
        (self.running if job in self.running else self.waiting).remove(job)

    # ---- the choice -------------------------------------------------------------------------------------------------

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

    def has_other_work(self, work: Work) -> bool:
        """Whether anybody but this step's members could run."""
        held = work.jobs
        return bool(self.waiting) or any(job not in held for job in self.running)

    def _streams(self) -> dict[Lane, list[Sequence]]:
        """Sequences that can decode, by lane; one that must run alone replaces its lane's batch."""
        streams: dict[Lane, list[Sequence]] = {}
        for job in self.running:
            self.suspect = job
            for sequence in job.sequences:
                if sequence.is_decoding and not sequence.is_done and not sequence.is_held:
                    streams.setdefault(job.lane, []).append(sequence)
        return streams

    def _decode(self, streams: dict[Lane, list[Sequence]]) -> Work:
        """The streams of the lane whose turn it is; its step that is paused comes before another of it."""
        paused = {work.lane: work for work in self.paused if work.kind == "decode"}
        lane = min((*paused, *streams), key=lambda lane: self._served.get(lane, 0))
        self._turn += 1
        self._served[lane] = self._turn
        if lane in paused:
            self.paused.remove(paused[lane])
            return paused[lane]
        alone = [sequence for sequence in streams[lane] if sequence.is_alone]
        return self._hold("decode", lane, alone[:1] or streams[lane])

    def _prefill(self, now: float) -> Work | None:
        """The most urgent prompt that can go on, with others of its lane when they fit beside it."""
        prompts = [work for work in self.paused if work.kind != "decode"]
        paused = max(prompts, key=lambda work: self._pressure(work, now), default=None)
        candidates = self._candidates(now)
        first = next(candidates, None)
        if paused is not None and (first is None or self._pressure(paused, now) >= self._urgency(first.job, now)):
            self.paused.remove(paused)
            return paused
        if first is None:
            return None
        pack = self._pack(first, candidates)
        self._let_in(pack)
        return self._hold("embed" if first.job.is_pooled else "prefill", first.job.lane, pack)

    def _pressure(self, work: Work, now: float) -> float:
        return max(self._urgency(member.job, now) for member in work.members)

    def _urgency(self, job: Job, now: float) -> float:
        self.suspect = job
        return job.urgency(now)

    def _candidates(self, now: float) -> Iterator[Sequence]:
        """Sequences with a prompt to process, most urgent first, of jobs that are in or have room beside those before them."""
        jobs = [job for job in self.running if _unprocessed(job)] + self.waiting
        entered, before, is_closed = set(self.running), list[Job](), False
        for job in sorted(jobs, key=lambda job: -self._urgency(job, now)):
            self.suspect = job
            if job in entered:
                if job.sequences[0].found is not None:
                    self.meet(job, before)  # another of its pack failed before their step began: look again
                yield from _unprocessed(job)
            elif not is_closed and self._has_room(job, before):
                self.meet(job, before)
                before.append(job)
                yield job.sequences[0]
            elif job.urgency(now) > self._config.patience:
                is_closed = True  # it has been overtaken long enough: what comes free, as others end, is kept for it

    def _has_room(self, job: Job, before: Iterable[Job]) -> bool:
        """Whether a job may enter when those before it have."""
        jobs = [job, *before]
        num_sequences = self.num_sequences + sum(each.request.n for each in jobs)
        return self._ledger.fits(sum(each.need.total for each in jobs)) and num_sequences <= self._config.max_sequences

    def meet(self, job: Job, before: Iterable[Job] = ()) -> None:
        """Let a job that waits go on from what is kept of its prompt now, if there is room for that, too."""
        found = self._prefixes.find(job.lane, job.marks, len(job.prompt))
        jobs = [job, *before]
        others = [each.sequences[0].found for each in before]
        wanted = bytes_of([each for each in (found, *others) if each is not None])
        fits = self._ledger.fits(sum(each.need.total for each in jobs) + wanted)
        job.sequences[0].go_on_from(found if fits else None)

    def _pack(self, first: Sequence, others: Iterable[Sequence]) -> list[Sequence]:
        """Sequences whose next chunks together are no longer than one may be."""
        self.suspect = first.job
        pack, tokens = [first], first.next_end() - first.past
        if first.is_alone or not (self._can_pack or first.job.is_pooled):
            return pack
        for other in others:
            if other.job.lane is not first.job.lane or other.job.is_pooled != first.job.is_pooled or other.is_alone:
                continue
            tokens += other.next_end() - other.past
            if tokens > self._config.chunk_tokens:
                break
            pack.append(other)
        return pack

    def _let_in(self, pack: list[Sequence]) -> None:
        """Let those of a pack in that wait; kept prefixes make room, but for those that the pack goes on from."""
        for sequence in pack:
            self.suspect = sequence.job
            if sequence.job not in self.running:
                self._enter(sequence.job)
        self._prefixes.make_room(self._ledger.free, {each.found.kept for each in pack if each.found is not None})

    def _enter(self, job: Job) -> None:
        self._ledger.hold(job, job.need.total)
        self.waiting.remove(job)
        self.running.append(job)
        job.to_keep = self._prefixes.enter(job.lane, job.marks, job.sequences[0].found)

    def _hold(self, kind: StepKind, lane: Lane, sequences: list[Sequence]) -> Work:
        """The next step of these sequences. They are marked when nothing more can go wrong."""
        members, price = [], cache(lambda: lane.row_price(len(sequences), sum(s.length for s in sequences) // len(sequences)))
        may_guess = kind == "decode" and lane.lookup.tokens > 0
        for sequence in sequences:
            self.suspect = sequence.job
            guess = sequence.guess(price) if may_guess else array("i")
            members.append(Member(sequence, sequence.past, sequence.next_end() + len(guess), guess))
        for sequence in sequences:
            sequence.is_held = True
        return Work(kind, lane, tuple(members))


def _unprocessed(job: Job) -> list[Sequence]:
    """Sequences of a running job that have more than a decode step before them."""
    return [s for s in job.sequences if not (s.is_decoding or s.is_done or s.is_held)]
