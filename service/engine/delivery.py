"""How it is handed out: what follows from a step, from the drawn token to the caller, and a request's one way out.

Whatever fails here concerns one request, and is caught where that request is known; others are answered all the same.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from service.engine.job import Job, Sequence
from service.engine.observer import Observer, Outcome, Step
from service.engine.request import Delta, Embedding, FinishReason, InvalidRequest, ModelFailed, OutOfMemory, RequestError
from service.engine.reread import TAIL
from service.engine.runner import Runner
from service.engine.sampling import Drawn
from service.engine.scheduler import Scheduler
from service.engine.text import Settled
from service.engine.work import Work
from service.timing import Chunk

if TYPE_CHECKING:
    from service.engine.shadow import Shadow

logger = logging.getLogger(__name__)


class Delivery:
    """Moves the members of a finished step on, and hands out what they have to say."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        observer: Observer,
        eos_token_ids: Collection[int],
        shadow: Shadow,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._observer = observer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._shadow = shadow
        self.tail = array("i")  # of what was served last: what a check of the served truth reads
        self._is_followed = False  # the next step of the same sequences has begun
        self._ended: list[Sequence] = []  # in it, which reads their states

    def settle(self, work: Work, is_followed: bool = False) -> None:
        """Book a finished step: move its sequences on, hand out what was drawn, tell the observer.

        is_followed: the model thread is at the next step of the same sequences, until `land`.
        """
        now, self._is_followed = time.monotonic(), is_followed
        attempt(lambda: self._book(work, now))  # before its sequences move on
        work.move_on()
        for member in work.members:
            job, timings = member.job, member.job.request.timings
            timings.batch_mates = max(timings.batch_mates, len(work.members) - 1)
            if member.guess:
                timings.guessed_tokens += len(member.guess)
                member.sequence.lookup.learn(len(member.guess), work.right[member.sequence])
            if work.kind != "decode" and not job.is_over:
                timings.chunks.append(Chunk(work.begun_at or now, now, member.end - member.start))
                with self.concerning(job):
                    self._settle_prompt(member.sequence, now)
        for sequence, drawn in work.drawn:
            if not sequence.is_done:  # with its job, which failed a moment ago; or by a token of the same guess
                with self.concerning(sequence.job):
                    self._hand_out(sequence, drawn, now)

    def land(self) -> None:
        """The model thread has stopped: free the states of what ended while it read them."""
        self._is_followed = False
        ended, self._ended = self._ended, []
        for sequence in ended:
            attempt(sequence.free)

    def split(self, work: Work, error: Exception) -> None:
        """A step failed: alone, its request fails; in company, each member is run again from its beginning, alone."""
        if len(work.members) == 1:
            self.fail(work.members[0].job, error)
            return
        logger.warning("a step of %d sequences failed and is split: %r", len(work.members), error)
        for member in work.members:
            with self.concerning(member.job):
                member.sequence.rewind()

    @contextmanager
    def concerning(self, job: Job) -> Iterator[None]:
        """What fails within is a failure of this job, and of no other."""
        try:
            yield
        except Exception as error:  # whatever it is, others have nothing to do with it
            self.fail(job, error)

    def fail(self, job: Job, error: Exception) -> None:
        """End a job that something failed on."""
        logger.error("request %s failed", job.request.id, exc_info=error)
        if is_out_of_memory(error):
            message = "the machine refused the memory for this request"
            self.end(job, "out_of_memory", OutOfMemory(message, details={"reserved_bytes": job.need.total}))
        else:
            self.end(job, "model_failed", ModelFailed("the model failed on this request"))

    def end(self, job: Job, outcome: Outcome, error: RequestError | None = None) -> None:
        """The one way out: give everything back, tell the caller and the observer. Never fails half-way; twice is once."""
        if job.is_over:
            return
        samples = job.close()
        for sequence in samples:
            self._free(sequence)
        attempt(partial(self._scheduler.remove, job))
        job.request.timings.finished_at = time.monotonic()
        job.answer.end(error)
        attempt(partial(self._observer.finished, job.request, outcome))
        if outcome in ("stop", "length", "embedded"):
            self.tail = (job.prompt[-TAIL:] + samples[0].output[-TAIL:])[-TAIL:]
        if outcome in ("stop", "length"):
            attempt(partial(self._shadow.served, job.request, job.lane, job.prompt, samples[0].output))

    def _book(self, work: Work, now: float) -> None:
        """Tell the metering and the observer of a finished step, as it ran."""
        self._runner.measured(work)
        together = Counter(sequence for sequence, _ in work.drawn)  # the tokens of a guess share the time since the one before
        gaps = [(now - s.spoke_at) / together[s] for s, _ in work.drawn if s.spoke_at is not None and not s.is_done]
        self._observer.stepped(_told(work, gaps))

    def _settle_prompt(self, sequence: Sequence, now: float) -> None:
        """What follows from a chunk: the end of the prompt, of an embedding, of a request for no tokens."""
        job, timings = sequence.job, sequence.job.request.timings
        if sequence.past < sequence.length:
            return
        sequence.is_alone = False
        if timings.prefilled_at is None:
            timings.prefilled_at = now
        if job.is_pooled:
            assert job.vectors is not None, "a text was read, and no vector made of it"
            job.answer.put(Embedding(job.vectors))
            self.end(job, "embedded")
            return
        job.join()
        if job.request.sampling.max_tokens == 0:
            for each in job.sequences:
                self._finish(each, "length", each.text.flush())

    def _hand_out(self, sequence: Sequence, drawn: Drawn, now: float) -> None:
        """Add a drawn token to its sample and hand out what it settles."""
        sampling, timings = sequence.job.request.sampling, sequence.job.request.timings
        timings.output_tokens += 1
        timings.accepted_tokens += drawn.was_guessed
        timings.first_token_at = timings.first_token_at or now
        sequence.spoke_at = now
        if not self._keeps_form(sequence, drawn.token):
            return
        sequence.output.append(drawn.token)
        if sampling.is_end(drawn.token, self._eos_token_ids):
            self._finish(sequence, "stop", sequence.text.flush())
            return
        settled = sequence.text.push(drawn.token, drawn.logprob)
        if settled.stopped:
            self._finish(sequence, "stop", settled)
        elif sequence.grammar is not None and sequence.grammar.is_complete:
            self._finish(sequence, "stop", settled + sequence.text.flush())
        elif len(sequence.output) == sampling.max_tokens:
            self._finish(sequence, "length", settled + sequence.text.flush())
        elif settled.text:
            _emit(sequence, settled, None)

    def _keeps_form(self, sequence: Sequence, token: int) -> bool:
        """Go on by a token in the sample's grammar. Where that fails, which is the form's own fault, the request ends."""
        grammar = sequence.grammar
        if grammar is None:
            return True
        if grammar.fault is None:
            grammar.take(token)
        if grammar.fault is None:
            return True
        error = InvalidRequest(f"the answer's form cannot be kept to, send another: {grammar.fault:.300}", param=grammar.source)
        self.end(sequence.job, "form_failed", error)
        return False

    def _finish(self, sequence: Sequence, reason: FinishReason, settled: Settled) -> None:
        """End a sample, and its job with the last of them."""
        _emit(sequence, settled, reason)
        sequence.is_done = True
        self._free(sequence)
        job = sequence.job
        if all(each.is_done for each in (*job.sequences, *job.siblings)):
            self.end(job, reason)

    def _free(self, sequence: Sequence) -> None:
        """Give a sample's state back, behind the step that reads it."""
        if self._is_followed:
            self._ended.append(sequence)
        else:
            attempt(sequence.free)


def attempt(call: Callable[[], None]) -> None:
    """Do what may fail without harm to any request, like telling an observer."""
    try:
        call()
    except Exception:  # whatever it is, the requests have nothing to do with it
        logger.exception("the engine could not do its books")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory was refused. torch's CPU allocator has no exception type of its own."""
    refused = "can't allocate memory" in str(error) or "not enough memory" in str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (isinstance(error, RuntimeError) and refused)


def _emit(sequence: Sequence, settled: Settled, reason: FinishReason | None) -> None:
    """Hand a delta out; the first of a sample that echoes carries the prompt."""
    job, sampling = sequence.job, sequence.job.request.sampling
    text, tokens, logprobs = settled.text, array("i", settled.tokens), settled.logprobs
    if sampling.echo and not sequence.is_opened:
        own = slice(job.request.leading, None)
        text, tokens = job.echo.getvalue() + text, job.prompt[own] + tokens
        logprobs = (*job.prompt_logprobs[own], *logprobs)
    sequence.is_opened = True
    told = logprobs if sampling.logprobs is not None else None
    job.answer.put(Delta(sequence.index, text, tokens, told, reason))


def _told(work: Work, gaps: list[float]) -> Step:
    meter = work.meter
    return Step(
        kind=work.kind,
        backend=work.lane.name,
        tokens=work.tokens,
        sequences=len(work.members),
        seconds=work.seconds,
        predicted_seconds=work.predicted_seconds,
        predicted_bytes=None if meter is None else work.predicted_bytes,
        measured_bytes=None if meter is None else meter.peak_bytes,
        method="dispatch" if meter is None else meter.method,
        token_gaps=tuple(gaps),
        guessed=sum(len(member.guess) for member in work.members),
        right=sum(work.right.values()),
    )
