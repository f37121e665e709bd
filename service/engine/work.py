"""What runs: a step of work is one call of the model for sequences under one lane.

Of three kinds: `prefill` and `embed` process pieces of prompts, `decode` the latest token of each stream.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from torch import Tensor

from attention import Passage, Segments
from service.engine.allowlist import Lane
from service.engine.job import Job, Sequence
from service.engine.meter import Meter
from service.engine.sampling import Drawn, bytes_per_logit, is_adjusted

StepKind = Literal["prefill", "decode", "embed"]


@dataclass(frozen=True)
class Member:
    """The tokens from `start` to `end` of one sequence, of which the last may be guessed.

    drawn: the one token there is, where the step before drew it and it may not have been handed out.
    """

    sequence: Sequence
    start: int
    end: int
    guess: array[int] = field(default_factory=lambda: array("i"))
    drawn: int | None = None

    @property
    def job(self) -> Job:
        return self.sequence.job

    @property
    def is_last(self) -> bool:
        """Whether nothing of the sequence is left to process behind it."""
        return self.drawn is not None or self.end - len(self.guess) == self.sequence.length

    @property
    def place(self) -> int:
        """That of the answer at which a token is drawn behind it."""
        return self.end - len(self.guess) - len(self.job.prompt)

    @property
    def tokens(self) -> array[int]:
        if self.drawn is not None:
            return array("i", [self.drawn])
        return self.sequence.tokens(self.start, self.end - len(self.guess)) + self.guess


@dataclass(eq=False)
class Work:
    """One step: its members, and where its computation stands. May pause within the layers of the model."""

    kind: StepKind
    lane: Lane
    members: tuple[Member, ...]
    stages: Generator[None, None, None] | None = None
    meter: Meter | None = None  # measures this step's peak; None when it is not sampled
    begun_at: float | None = None  # time.monotonic() of its first slice
    seconds: float = 0.0  # of computing
    slice_seconds: float = 0.0  # of the latest slice
    elapsed: float = 0.0  # seconds with the way to the model thread and back, and what was drawn handed out
    drawn: list[tuple[Sequence, Drawn]] = field(default_factory=list)
    right: dict[Sequence, int] = field(default_factory=dict)  # tokens of each guess that were drawn, too

    @property
    def jobs(self) -> set[Job]:
        return {member.job for member in self.members}

    @property
    def tokens(self) -> int:
        return sum(member.end - member.start for member in self.members)

    @cached_property
    def segments(self) -> Segments:
        """Where each member's tokens stand in the packed batch, and how many came before."""
        return Segments(tuple(m.end - m.start for m in self.members), tuple(m.start for m in self.members))

    @property
    def totals(self) -> list[int]:
        """Tokens that each member's text may come to."""
        return [member.job.max_length for member in self.members]

    @property
    def has_guesses(self) -> bool:
        return any(member.guess for member in self.members)

    @cached_property
    def predicted_seconds(self) -> float:
        course = self.lane.course
        if self.kind == "decode":
            guessed = self.tokens - len(self.members)
            plain = course.rows_seconds(len(self.members), course.decode_seconds(self._mean_end))
            return plain + guessed * course.row_seconds(self._mean_end)
        mates = len(self.members) - 1
        return self._summed(course.step_seconds) - mates * course.pace.model.fixed  # which is paid once

    @property
    def predicted_bytes(self) -> int:
        drawing = [member for member in self.members if member.is_last and self.kind != "embed"]
        entries = sum((1 + len(member.guess)) * bytes_per_logit(member.job.request.sampling) for member in drawing)
        logits = self.lane.course.vocab_size * entries
        return max(int(self._summed(self.lane.course.step_bytes)), logits)

    def note(self) -> None:
        """Let the forecast learn how long it took; of a step with guesses, beside how long plain ones take."""
        drift = self.lane.drift
        if self.has_guesses:
            length, guessed = self._mean_end, self.tokens - len(self.members)
            plain = self.lane.plain_seconds(len(self.members), length)
            drift.note("guess", plain + guessed * self.lane.course.row_seconds(length), self.elapsed)
        else:
            drift.note(self.kind, self.predicted_seconds, self.elapsed)

    def begin(self, now: float) -> None:
        """Note when its first slice began, and its members' first step."""
        self.begun_at = self.begun_at or now
        for member in self.members:
            timings = member.job.request.timings
            timings.admitted_at = timings.admitted_at or self.begun_at

    def following(self, eos_ids: Collection[int]) -> Work | None:
        """The same sequences' next step, which reads what this one drew: it can begin before that is handed out.

        None where one of them may not go on, or goes on by more than its last token: its answer so far, its form, a guess.
        """
        members, lane = list[Member](), self.lane
        if self.kind != "decode" or lane.lookup.tokens > 0 or len(self.drawn) < len(self.members):
            return None
        for member, (sequence, drawn) in zip(self.members, self.drawn, strict=True):
            sampling = sequence.job.request.sampling
            is_last = sampling.is_end(drawn.token, eos_ids) or member.place + 1 >= sampling.max_tokens
            if is_last or is_adjusted(sampling) or sequence.is_done or sequence.is_alone:
                return None
            members.append(Member(sequence, member.end, member.end + 1, drawn=drawn.token))
        return Work("decode", lane, tuple(members))

    def move_on(self) -> None:
        """It has ended: its members' tokens are in their states."""
        for member in self.members:
            member.sequence.past, member.sequence.is_held = self.end(member), False

    def allocate(self) -> None:
        """A slot for every member that has none. Raises PoolExhausted."""
        for member in self.members:
            member.sequence.take_slot()

    def answering(self, layer: int, question: tuple[Tensor, Tensor, Tensor], segments: Segments, out: Tensor) -> Iterator[None]:
        """Answer a layer's question for all members, see `Lane.answering`."""
        return self.lane.answering(layer, question, segments, self._slots, out, self.kind == "decode")

    def passage(self, segments: Segments) -> Passage | None:
        """What answers a decode step's layers at once, see `Lane.passage`."""
        return self.lane.passage(self._slots, segments)

    def take_back(self) -> None:
        """Leave the states of its members as if only what was right of their guesses had been read."""
        for member in self.members:
            if member.guess and member.sequence.slot is not None:
                self.lane.take_back(member.sequence.slot, self.end(member))

    def end(self, member: Member) -> int:
        """Tokens of a member's sequence that are in its state, now that the step has ended."""
        return member.end - len(member.guess) + self.right.get(member.sequence, 0)

    @property
    def _slots(self) -> list[int]:
        return [member.sequence.slot for member in self.members if member.sequence.slot is not None]

    @property
    def _mean_end(self) -> int:
        return sum(member.end for member in self.members) // len(self.members)

    def _summed(self, law: Callable[[int, int], float]) -> float:
        """A law of (start, end) over all members; for streams, many and of nearly straight laws, that of their mean."""
        if self.kind != "decode":
            return sum(law(member.start, member.end) for member in self.members)
        return self.tokens * law(self._mean_end - 1, self._mean_end)
