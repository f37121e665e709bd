"""How it runs: tokens packed, the model called, tokens drawn. All of it on the model thread."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from attention import Passage, Segments
from service.engine.job import Job, Sequence
from service.engine.meter import Meter, Metering, counting_seconds
from service.engine.prefixes import Prefixes
from service.engine.request import TokenLogprob
from service.engine.sampling import Drawn, Past, draw, logprobs
from service.engine.work import Member, Work
from service.machine import Starvation
from service.model.pooler import gathered, pooled
from service.model.pooling import Pooling
from service.model.transformer import Transformer

LOGIT_ROWS = 64  # rows of an echoed prompt whose logits exist at one time
Answering = Callable[[int, tuple[Tensor, Tensor, Tensor], Segments, Tensor], Iterator[None]]
"""(layer, its question, the sequences, what takes the answer), see `Lane.answering`."""


class Runner:
    """Runs steps of work on one model."""

    def __init__(
        self, model: Transformer, unknown: Tensor, row_multiple: int | None, sample_share: float, prefixes: Prefixes
    ) -> None:
        """A runner of one model. Runs it a little.

        Args:
            unknown: int64 (U,), ids that are no tokens. None of them is drawn or told as an alternative.
            row_multiple: packed rows are padded to a multiple of it (see `forecast`) that the model has a height for.
            sample_share: of the time, for measuring what steps take in memory.
            prefixes: what keeps the states behind a prompt's whole chunks.
        """
        self._prefixes = prefixes
        self._model = model
        self._device = model.device
        self._unknown = unknown.to(self._device) if len(unknown) else None
        self._eos_ids = list(model.config.eos_token_ids)
        self._row_multiple = row_multiple or 1
        self._metering = Metering(self._device, sample_share, _counting_seconds(model))
        self.busy_seconds = 0.0  # spent on steps so far
        self.starvation = Starvation()  # of the model thread in steps; none where an accelerator computes

    @property
    def measuring_seconds(self) -> float:
        """What of it went into measuring memory."""
        return self._metering.seconds

    def run(self, work: Work, gives_way: Callable[[], bool]) -> bool:
        """Run a step to its end, or to the pause at which `gives_way()` holds. Returns whether it has ended.

        Changes the slots of its members, and on ending their jobs' sums, log-probabilities and the work's `drawn`.
        Raises whatever the model raises; the members' states are then undefined.
        """
        start, running = time.perf_counter(), time.thread_time()
        try:
            with torch.inference_mode():
                if work.stages is None:
                    work.allocate()
                    work.stages, work.meter = self._stages(work), self._meter(work)
                with work.meter or nullcontext():
                    if any(gives_way() for _ in work.stages):
                        return False
                work.take_back()
                _branch(work)
                self._keep(work)
                return True
        finally:
            seconds = time.perf_counter() - start
            work.seconds += seconds
            work.slice_seconds = seconds
            self.busy_seconds += seconds
            if self._device.type == "cpu":
                self.starvation.note(seconds, time.thread_time() - running)

    def _keep(self, work: Work) -> None:
        """Keep the states that now stand where they are worth it."""
        for member in work.members:
            if member.end in member.job.to_keep and not member.sequence.output and member.sequence.slot is not None:
                self._prefixes.keep(work.lane, member.sequence.slot, member.job.marks, member.end)

    def following(self, work: Work) -> Work | None:
        """What can run behind a step that has ended before that is settled, see `Work.following`."""
        return work.following(self._eos_ids)

    def measured(self, work: Work) -> None:
        """Book what a step that has ended took in memory, with the metering and with its members' requests."""
        self._metering.account(work.kind, work.seconds, work.meter)
        if work.meter is not None or work.kind != "decode":  # a decode step changes no state's size
            _tell_bytes(work)

    def _meter(self, work: Work) -> Meter | None:
        """A measure of this step's memory, where one is due: see `Metering`."""
        size = (work.kind, work.tokens.bit_length(), max(m.end for m in work.members).bit_length())

        def is_worth() -> bool:
            return work.kind == "decode" or any(map(_is_unmeasured, work.members))

        return self._metering.meter(work.kind, work.lane, size, is_worth)

    def _stages(self, work: Work) -> Generator[None, None, None]:
        """The computation of a step, pausing within layers."""
        tokens, segments = array("i"), work.segments
        for member in work.members:
            tokens += member.tokens
        is_decode, types = work.kind == "decode", self._types(work)
        passage = work.passage(segments) if is_decode and self._model.takes_passage else None
        hidden = yield from self.hidden(tokens, segments, work.answering, work.totals, types, is_decode, passage)
        if work.kind == "embed":
            self._pool(work, segments, hidden)
        else:
            self._tell_prompts(work, segments, hidden)
            self._draw(work, segments, hidden)

    def _types(self, work: Work) -> Tensor | None:
        """Which of a pair of texts each row is of (rows,); None where no member is a pair, or the model does not ask."""
        if self._model.config.num_token_types < 2:
            return None
        pairs = [member.job.request.second for member in work.members]
        if not any(pairs):
            return None
        types = torch.zeros(self._height(work.tokens), dtype=torch.long)
        for (start, end, _), second in zip(work.segments.spans(), pairs, strict=True):
            types[start + second if second else end : end] = 1
        return types.to(self._device)

    def _pool(self, work: Work, segments: Segments, hidden: Tensor) -> None:
        """Gather what counts of each member's hidden states, and make the vectors of those that end."""
        pooler, ended = self._model.pooler, list[Job]()
        for member, (start, end, _) in zip(work.members, segments.spans(), strict=True):
            _gather(member, hidden[start:end], member.job.request.pooling or pooler.plan.pooling)
            if member.is_last:
                ended.append(member.job)
        if ended:
            vectors = iter(pooler(torch.stack([row for job in ended for row in job.pooled])))
            for job in ended:
                job.vectors = [pooler.ended(next(vectors), job.request.is_ended).tolist() for _ in job.pooled]

    def hidden(
        self,
        tokens: array[int],
        segments: Segments,
        answering: Answering,
        totals: Iterable[int],
        types: Tensor | None = None,
        is_decode: bool = False,
        passage: Passage | None = None,
    ) -> Generator[None, None, Tensor]:
        """Hidden states of packed tokens; pauses between the parts of each layer's attention, and behind each layer.

        Args:
            tokens: T of them, which are padded to a height of the model's: rows.
            answering: answers each layer's question for T rows.
            totals: tokens that each sequence may come to.
            types: int64 (rows,), see `Transformer.hidden`.
            is_decode: whether each token is the next of a stream, likewise. passage: what then may answer all layers, likewise.

        Returns:
            (rows, C); what stands behind the first T is padding.
        """
        count, device = segments.total, self._device
        padding = self._height(count, is_decode) - count
        ids = torch.tensor(tokens + array("i", [0] * padding), dtype=torch.long, device=device)
        positions = segments.positions(device)
        if padding:  # stands there as one more text
            positions = torch.cat((positions, torch.arange(padding, device=device) % self._model.config.max_length))
        stages = self._model.stages(
            ids, positions, types, is_decode, self._totals(segments, totals, len(ids)), None if padding else passage
        )
        answer = None
        while True:
            try:
                question = stages.send(answer)
            except StopIteration as end:
                return cast(Tensor, end.value)
            answer = None
            if question is not None:
                layer, q, k, v = question
                answer = torch.zeros_like(q) if len(q) > count else torch.empty_like(q)  # padded rows get no answer
                yield from answering(layer, (q[:count], k[:count], v[:count]), segments, answer[:count])
                del q, k, v
            del question  # the rest of the layer has no use for it
            yield

    def _totals(self, segments: Segments, totals: Iterable[int], rows: int) -> Tensor | None:
        """As of `Transformer.hidden`; None where they make no difference."""
        if self._model.border is None:
            return None
        told = torch.full((rows,), self._model.config.max_length)
        for (start, end, _), total in zip(segments.spans(), totals, strict=True):
            told[start:end] = total
        return told.to(self._device)

    def _tell_prompts(self, work: Work, segments: Segments, hidden: Tensor) -> None:
        """Text of the prompt's tokens and their log-probabilities, for the members that echo them."""
        for member, (start, _, _) in zip(work.members, segments.spans(), strict=True):
            sampling = member.job.request.sampling
            if not sampling.echo or member.sequence.output:
                continue
            member.job.spell(member.end)
            if sampling.logprobs is not None:
                self._score(member, hidden[start:], sampling.logprobs)

    def _score(self, member: Member, hidden: Tensor, top: int) -> None:
        """Log-probabilities of the prompt's tokens that follow a member's, whose hidden states come first."""
        job = member.job
        if member.start == 0:
            job.prompt_logprobs = [TokenLogprob(job.prompt[0], None)]
        targets = job.prompt[member.start + 1 : member.end + 1]
        for a in range(0, len(targets), LOGIT_ROWS):
            some = targets[a : a + LOGIT_ROWS]
            job.prompt_logprobs += logprobs(self.logits(hidden[a : a + len(some)]), some, [top] * len(some))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states (N, C), those of ids that are no tokens at -inf: float32 (N, V)."""
        rows = len(hidden)
        if not self._model.tells_rows_apart and (missing := self._height(rows) - rows) > 0:
            hidden = torch.nn.functional.pad(hidden, (0, 0, 0, missing))
        logits = self._model.logits(hidden)[:rows]
        return logits if self._unknown is None else logits.index_fill_(1, self._unknown, -torch.inf)

    def _height(self, rows: int, is_decode: bool = False) -> int:
        """How many rows so many are padded to: none where a decode step computes each by itself."""
        if is_decode and self._model.takes_passage:
            return rows
        return -(-self._model.height(rows, is_decode) // self._row_multiple) * self._row_multiple

    def _draw(self, work: Work, segments: Segments, hidden: Tensor) -> None:
        """Draw the next token of every member that has none left to process, and of the samples that waited for it."""
        ends = zip(work.members, segments.last(), strict=True)
        ready = [(m, row) for m, row in ends if m.is_last and m.job.request.sampling.max_tokens > 0]
        if not ready:
            return
        asked = [row - back for m, row in ready for back in range(len(m.guess), -1, -1)]
        logits = self.logits(hidden if asked == list(range(len(hidden))) else hidden[asked])
        spots, rows, first = list[Spot](), list[int](), 0
        for member, _ in ready:
            own = _spots(member)
            spots += own
            rows += [first + spot.ahead for spot in own]
            first += 1 + len(member.guess)
        logits = logits if rows == list(range(len(logits))) else logits[rows]
        settings = [spot.sequence.job.request.sampling for spot in spots]
        drawing = zip(spots, settings, strict=True)
        numbers = [spot.sequence.number(spot.place) if own.temperature else 0.0 for spot, own in drawing]
        drawn = draw(logits, settings, numbers, [spot.past for spot in spots], self._eos_ids)
        _hand_over(work, zip(spots, drawn, strict=True))


@dataclass(frozen=True)
class Spot:
    """Where a token is drawn: behind a sequence and the first `ahead` tokens of a guess, at a place of its answer."""

    sequence: Sequence
    past: Past
    place: int
    ahead: int = 0
    guessed: int | None = None  # the token that was guessed for it


def _spots(member: Member) -> list[Spot]:
    """Where a member's step draws: for its sequence, along its guess, and for the samples that waited for its prompt."""
    if not member.guess:
        return [Spot(each, _past(each), member.place) for each in (member.sequence, *member.job.siblings)]
    sequence, guess, found = member.sequence, member.guess, list[Spot]()
    grammar = None if sequence.grammar is None else sequence.grammar.copy()
    for ahead, guessed in enumerate((*guess, None)):
        allowed = None if grammar is None else grammar.allowed()
        past = Past(sequence.job.prompt, sequence.output + guess[:ahead], allowed)
        found.append(Spot(sequence, past, member.place + ahead, ahead, guessed))
        if grammar is not None and allowed is not None and guessed is not None:
            if not allowed[guessed] or grammar.fault is not None:
                break
            grammar.take(guessed)
            if grammar.is_complete:
                break
    return found


def _hand_over(work: Work, found: Iterable[tuple[Spot, Drawn]]) -> None:
    """Note what was drawn, of each guess as far as it was right and one token more."""
    is_wrong = set[Sequence]()
    for spot, drawn in found:
        sequence, is_right = spot.sequence, drawn.token == spot.guessed
        if sequence not in is_wrong:
            work.drawn.append((sequence, replace(drawn, was_guessed=True) if is_right else drawn))
            work.right[sequence] = work.right.get(sequence, 0) + is_right
        if not is_right:
            is_wrong.add(sequence)


def _gather(member: Member, hidden: Tensor, pooling: Pooling) -> None:
    """Take a member's hidden states (T, C) in, late chunk by late chunk; a text for which none are asked is one."""
    job, at = member.job, member.start
    size = job.request.late_chunks or len(job.prompt)
    if at == 0:
        job.pooled.clear()  # of a reading that failed
    while at < member.end:
        begin = at - at % size
        end = min(begin + size, len(job.prompt), member.end)
        piece = hidden[at - member.start : end - member.start]
        job.gathered = gathered(None if at == begin else job.gathered, piece, pooling)
        if end in (begin + size, len(job.prompt)):
            job.pooled.append(pooled(job.gathered, pooling, end - begin))
        at = end


def _past(sequence: Sequence) -> Past:
    grammar = sequence.grammar
    return Past(sequence.job.prompt, sequence.output, None if grammar is None else grammar.allowed())


def _branch(work: Work) -> None:
    """Copies of the state for the samples that waited for a prompt which is processed now, and what of it can be seen."""
    for member in work.members:
        if member.is_last:
            timings, prompt = member.job.request.timings, len(member.job.prompt)
            timings.seen_tokens = timings.seen_tokens or work.lane.course.seen_tokens(prompt)
            member.sequence.branch()


def _counting_seconds(model: Transformer) -> float:
    """What counting storages costs per operator of this model."""
    ids = torch.zeros(1, dtype=torch.long, device=model.device)
    return counting_seconds(lambda: model.hidden(ids, ids, lambda layer, q, k, v: q))


def _is_widest(member: Member) -> bool:
    """Whether no other chunk of the prompt takes more memory, by the laws of cost."""
    course = member.job.lane.course
    return course.step_bytes(member.start, member.end) >= course.prefill_bytes(len(member.job.prompt))


def _is_unmeasured(member: Member) -> bool:
    return member.job.request.timings.step_bytes is None and _is_widest(member)


def _tell_bytes(work: Work) -> None:
    """What each member's request holds as state, and its share of a measured step's peak, by tokens.

    A request counts as measured when the widest chunk of its prompt was; what its other steps showed is added to that.
    """
    tokens: dict[Job, int] = {}
    for member in work.members:
        job = member.job
        tokens[job] = tokens.get(job, 0) + member.end - member.start
    is_measured_prompt = work.meter is not None and work.kind != "decode"
    widest = {member.job for member in work.members if is_measured_prompt and _is_widest(member)}
    for job, count in tokens.items():
        timings = job.request.timings
        timings.state_bytes = max(timings.state_bytes, job.held_bytes)
        if work.meter is not None and (job in widest or timings.step_bytes is not None):
            timings.step_bytes = max(timings.step_bytes or 0, work.meter.peak_bytes * count // work.tokens)
