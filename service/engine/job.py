"""A request inside the engine: what has been computed of it and what it holds.

A `Job` is one request; its `Sequence`s are its samples, the units that are scheduled. A sequence is a list of tokens of
which the first `past` are in its state. Prefill, decode and the replay after a fault are the same thing: processing the
tokens that are not. Owned by the event loop between steps and by the model thread during one, never by both.
"""

from __future__ import annotations

import math
import random
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from io import StringIO

from torch import Tensor

from service.engine.admission import Offer
from service.engine.ahead import Ahead
from service.engine.allowlist import Lane
from service.engine.answer import Answer
from service.engine.grammar import Grammar
from service.engine.lookup import Lookup
from service.engine.need import Need
from service.engine.prefixes import Found, Marks
from service.engine.request import Request, TokenLogprob
from service.engine.sampling import uniform
from service.engine.text import TextStream
from service.model.tokenizer import Tokenizer


@dataclass(eq=False)
class Sequence:
    """One sample of a job, or the input of an embedding."""

    job: Job
    index: int
    text: TextStream
    grammar: Grammar | None = None  # what its answer must be, as far as it has come
    output: array[int] = field(default_factory=lambda: array("i"))
    past: int = 0  # tokens in the state
    slot: int | None = None
    found: Found | None = None  # what it will go on from; the first `past` tokens are in that state
    is_held: bool = False  # part of a step that has begun
    is_alone: bool = False  # shared a step that failed: runs by itself until it has proved innocent
    is_done: bool = False
    is_opened: bool = False  # its first delta was handed out
    lookup: Lookup = field(default_factory=Lookup)
    spoke_at: float | None = None  # time.monotonic() of its latest token

    @property
    def length(self) -> int:
        return len(self.job.prompt) + len(self.output)

    @property
    def is_decoding(self) -> bool:
        """Only its latest token is left to process."""
        return len(self.output) > 0 and self.length - self.past == 1

    def tokens(self, start: int, end: int) -> array[int]:
        """Tokens at positions start..end, prompt and answer taken as one."""
        border = len(self.job.prompt)
        return self.job.prompt[start:end] + self.output[max(0, start - border) : max(0, end - border)]

    def next_end(self) -> int:
        """Where the piece of it ends that comes next."""
        return min(self.length, self.job.lane.course.next_end(self.past))

    def number(self, place: int) -> float:
        """The number by which its answer's token at a place is drawn."""
        return uniform(self.job.seed, self.index, place)

    def guess(self, price: Callable[[], float]) -> array[int]:
        """Tokens that may follow, to be looked over with its latest one; `price` as of `Lookup.guess`."""
        sampling, lane = self.job.request.sampling, self.job.lane
        room = min(sampling.max_tokens - len(self.output), lane.backend.runway(self.past)) - 1  # the step draws one anyway
        return self.lookup.guess(self.tokens, self.length, lane.lookup.ngram, min(lane.most_guessed(sampling), room), price)

    def go_on_from(self, found: Found | None) -> None:
        """Begin behind a kept prefix, or at the beginning. For a sequence that has no state yet."""
        course, prompt = self.job.lane.course, self.job.prompt
        self.found, self.past = found, 0 if found is None else found.tokens
        self.job.service_seconds = course.seconds(len(prompt)) - course.seconds(self.past)

    def take_slot(self) -> None:
        """Take a slot, unless it has one: a fresh one, or one that goes on from what was found. Raises PoolExhausted."""
        if self.slot is not None:
            return
        found, self.found = self.found, None
        if found is None:
            self.slot = self.job.lane.allocate(self.job.max_length)
        else:
            self.slot = self.job.lane.resume(found.kept.slot, found.tokens, self.job.max_length)
            self.job.request.timings.cached_tokens = found.tokens

    def free(self) -> None:
        """Give the state back."""
        slot, self.slot, self.found = self.slot, None, None
        if slot is not None:
            self.job.lane.release(slot)

    def branch(self) -> None:
        """Give each sample that waits for this one's prompt a copy of its state."""
        for sibling in self.job.siblings:
            assert self.slot is not None, "a processed prompt without a state"
            sibling.slot, sibling.past = self.job.lane.copy(self.slot), len(self.job.prompt)

    def rewind(self) -> None:
        """Forget the state, and copies of it, so that all tokens are processed again, alone."""
        self.past, self.is_alone, self.is_held = 0, True, False
        self.job.request.timings.cached_tokens = 0
        for sequence in (self, *self.job.siblings):
            sequence.free()


@dataclass(eq=False)
class Job:
    """One request on its way. Samples beyond the first join when the prompt that they share is processed."""

    request: Request
    lane: Lane
    need: Need
    prompt: array[int]
    answer: Answer
    seed: int
    deadline: float  # time.monotonic() value
    service_seconds: float  # predicted for what of its prompt is to be processed: the length that decides who overtakes whom
    sequences: list[Sequence] = field(default_factory=list)
    siblings: list[Sequence] = field(default_factory=list)  # samples that have not joined yet
    gathered: Tensor | None = None  # float32 (C,): what is kept of a chunk's hidden states so far, where no token is drawn
    pooled: list[Tensor] = field(default_factory=list)  # of the chunks that are read
    vectors: list[list[float]] | None = None  # what was made of them
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    echo: StringIO = field(default_factory=StringIO)  # the prompt's text, for an answer that begins with it
    echoed: int = 0  # tokens of the prompt that stand in it, or are left out
    is_over: bool = False
    marks: Marks = ()  # of the beginnings of its prompt that may be kept
    to_keep: frozenset[int] = frozenset()  # behind so many tokens of the prompt

    @classmethod
    def create(cls, request: Request, offer: Offer, answer: Answer, tokenizer: Tokenizer) -> Job:
        """A job that has done nothing yet, its stopwatch started. Draws the seed of a request that brings none."""
        lane, prompt, timings = offer.lane, offer.prompt, request.timings
        seconds = lane.course.seconds(len(prompt))
        seed = random.getrandbits(32) if request.sampling.seed is None else request.sampling.seed
        deadline = math.inf if request.deadline is None else request.deadline
        job = cls(request, lane, offer.need, prompt, answer, seed, deadline, seconds, echoed=request.leading)
        grammar = request.sampling.grammar
        samples = [
            Sequence(job, index, TextStream(tokenizer, request.sampling.stop), grammar and grammar.copy())
            for index in range(request.n)
        ]
        job.sequences, job.siblings = samples[:1], samples[1:]
        timings.queued_at, timings.backend, timings.why = time.monotonic(), lane.name, offer.why
        timings.prompt_tokens, timings.reserved_bytes = len(prompt), offer.need.total
        return job

    def spell(self, end: int) -> None:
        """Spell the prompt up to `end`, for the echo. Done once for each token, even if a fault has it processed again."""
        self.echo.write(self.sequences[0].text.prompt(self.prompt[self.echoed : end]))
        self.echoed = max(self.echoed, end)

    def join(self) -> None:
        """Let the samples in that waited for the prompt."""
        for sibling in self.siblings:
            sibling.text.follow(self.sequences[0].text)
        self.sequences, self.siblings = self.sequences + self.siblings, []

    def close(self) -> list[Sequence]:
        """End all its samples and let go of them, which hold their states yet: the caller frees those."""
        samples, self.sequences, self.siblings = self.sequences + self.siblings, [], []
        for sample in samples:
            sample.is_done, sample.is_held = True, False
        self.is_over = True
        return samples

    @property
    def is_pooled(self) -> bool:
        return self.request.is_pooled

    @property
    def max_length(self) -> int:
        """Tokens that each of its states must hold."""
        return self.request.total_tokens

    @property
    def held_bytes(self) -> int:
        """Bytes of the states that its samples hold."""
        slots = (each.slot for each in (*self.sequences, *self.siblings))
        return self.lane.held_bytes(slot for slot in slots if slot is not None)

    @property
    def remaining_seconds(self) -> float:
        """Predicted prefill seconds still to come."""
        past = min(self.sequences[0].past, len(self.prompt))
        return self.lane.prefill_seconds(len(self.prompt), past)

    @property
    def remaining_tokens(self) -> int:
        """Most tokens one of its samples may still draw."""
        if self.is_pooled:
            return 0
        return self.request.sampling.max_tokens - min(len(sequence.output) for sequence in self.sequences)

    @property
    def ahead(self) -> Ahead:
        return Ahead(self.remaining_seconds, self.remaining_tokens * self.lane.decode_seconds(len(self.prompt)))

    def urgency(self, now: float) -> float:
        """Waiting time in multiples of the job's own length (highest response ratio next, Brinch Hansen 1971).

        A short job overtakes a long one soon after it came. A long one gains too, without bound, so it never starves.
        """
        return (now - self.request.arrival) / max(self.service_seconds, 1e-6)
