"""What is let in: the verdict on a request before anything is computed, and the ledger of who holds how many bytes.

Admission is by bytes. What a request will hold is known from the laws of cost before it runs: the state of its samples and
the workspace of its largest step, and what its answer may grow to. It is reserved as a whole, so a request that has begun
never lacks memory by our doing.
"""

from __future__ import annotations

import logging
import math
import time
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from service.engine.allowlist import Lane
from service.engine.grammar import GRAMMAR_BYTES
from service.engine.request import (
    AUTO,
    ContextTooLong,
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    NeverFits,
    QueueFull,
    Request,
    UnknownBackend,
    check_task,
)
from service.engine.sampling import bytes_per_logit
from service.model.pooling import Task

# Of Python objects, measured with tracemalloc and rounded up, see tests/engine/test_answer.py:
LOGPROB_BYTES = 256  # per token with log-probability and per alternative, of prompt and answer
TOKEN_BYTES = 128  # per token of an answer that waits to be read: its id, and text of up to 24 characters at four bytes
ECHO_BYTES = 64  # per token of a prompt that is given back with an answer, copies on the way included
SCORE_BYTES = 64 * 12  # per entry of the vocabulary while an echoed prompt is scored, 64 rows at a time

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Need:
    """Bytes a request holds from begin to end, by term."""

    terms: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.terms.values())


@dataclass(frozen=True)
class Plan:
    """What a request would cost and whether it would be admitted now."""

    backend: str
    why: str
    prompt_tokens: int
    cached_tokens: int  # of them, whose state is kept now: they would not be processed again
    total_tokens: int  # prompt and max_tokens
    terms: Mapping[str, int]  # bytes by term
    needed_bytes: int  # the sum of the terms
    budget_bytes: int
    free_bytes: int
    verdict: Literal["runs", "queues", "refused"]
    reason: str | None  # the refusal's code; None unless refused
    longest_tokens: int  # longest total that fits the whole budget under this backend, at most the model's context
    backends_that_fit: tuple[str, ...]
    predicted_seconds: Mapping[str, float]  # queue, prefill, decode


@dataclass(frozen=True)
class Offer:
    """What a request would run under, and what it would hold."""

    lane: Lane
    why: str  # this lane: "request", "default", or what `auto` measured
    need: Need
    prompt: array[int]


class Queue(Protocol):
    """Those who are in already: the scheduler."""

    @property
    def is_waiting(self) -> bool:
        """Whether anybody waits."""

    def why_full(self, tokens: int) -> str | None:
        """The bound that keeps a prompt of so many tokens out; None: it may come in."""

    def seconds_in_front(self) -> float:
        """Predicted seconds until all that runs or waits is done."""


class Ledger:
    """Who has reserved how many bytes of the budget."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.in_use = 0
        self._held: dict[object, int] = {}

    @property
    def free(self) -> int:
        return self.budget - self.in_use

    def fits(self, needed: int) -> bool:
        return needed <= self.free

    def hold(self, owner: object, needed: int) -> None:
        """Set what an owner holds. Growing past the budget is our fault: callers ask `fits` first."""
        change = needed - self._held.get(owner, 0)
        assert change <= self.free, f"reservation of {change} bytes passes the {self.free} that are free"
        self._held[owner] = needed
        self.in_use += change

    def release(self, owner: object) -> None:
        """Give back all that an owner holds; nothing when it holds nothing."""
        self.in_use -= self._held.pop(owner, 0)


class Admission:
    """The door: which requests come in, under which lane, for how many bytes. Reserves nothing; the scheduler does."""

    def __init__(
        self,
        known: NDArray[np.bool_],
        max_length: int,
        max_sequences: int,
        ledger: Ledger,
        queue: Queue,
        cached: Callable[[Request, Offer], int],
        tasks: Collection[Task],
    ) -> None:
        """A door for a model's requests.

        Args:
            known: for each id of the model's vocabulary whether it is a token (V,).
            cached: how many tokens of a prompt stand in a state that is kept.
            tasks: what may be asked for.
        """
        self.lanes: Mapping[str, Lane] = {}  # the allow-list in force
        self.default = AUTO
        self.is_closed = False  # nothing more is let in
        self._known = known
        self._max_length = max_length
        self._max_sequences = max_sequences
        self._ledger = ledger
        self._queue = queue
        self._cached = cached
        self._tasks = tasks

    def admit(self, request: Request) -> Offer:
        """What the request runs under, or its refusal: InvalidRequest and its kinds, QueueFull, Draining, DeadlineExceeded."""
        if self.is_closed:
            raise Draining("the service is stopping and admits nothing more")
        if request.deadline is not None and request.deadline <= time.monotonic():
            raise DeadlineExceeded("the deadline had passed before the request came")
        offer = self.offer(request)
        if offer.need.total > self._ledger.budget:
            raise refuse(self._planned(request, offer), request.param)
        if limit := self._queue.why_full(len(offer.prompt)):
            seconds = self._queue.seconds_in_front()
            raise QueueFull(f"the queue is full: {limit}; try again in about {seconds:.0f} s", seconds)
        return offer

    def plan(self, request: Request) -> Plan:
        """What the request would cost and whether it would be admitted now. Raises InvalidRequest, UnknownBackend."""
        return self._planned(request, self.offer(request))

    def offer(self, request: Request) -> Offer:
        """What the request would run under. Raises InvalidRequest, UnknownBackend."""
        check_task(request.kind, self._tasks)
        prompt = check(request, self._known, self._max_length, self._max_sequences)
        return Offer(*choose(request, self.lanes, self.default, self._ledger.budget), prompt)

    def _planned(self, request: Request, offer: Offer) -> Plan:
        lane, needed, budget = offer.lane, offer.need.total, self._ledger.budget
        reason = NeverFits.code if needed > budget else Draining.code if self.is_closed else None
        reason = reason or (QueueFull.code if self._queue.why_full(len(offer.prompt)) else None)
        runs = self._ledger.fits(needed) and not self._queue.is_waiting
        cached = self._cached(request, offer)
        prefill, whole = lane.course.seconds(len(offer.prompt)) - lane.course.seconds(cached), predicted_seconds(request, lane)
        return Plan(
            backend=lane.name,
            why=offer.why,
            prompt_tokens=len(offer.prompt),
            cached_tokens=cached,
            total_tokens=request.total_tokens,
            terms=offer.need.terms,
            needed_bytes=needed,
            budget_bytes=budget,
            free_bytes=self._ledger.free,
            verdict="refused" if reason else "runs" if runs else "queues",
            reason=reason,
            longest_tokens=longest_tokens(request, lane, budget, self._max_length),
            backends_that_fit=fitting(request, self.lanes.values(), budget),
            predicted_seconds={
                "queue": self._queue.seconds_in_front(),
                "prefill": prefill,
                "decode": whole - lane.course.seconds(len(offer.prompt)),
            },
        )


def check(request: Request, known: NDArray[np.bool_], max_length: int, max_sequences: int) -> array[int]:
    """The prompt, at four bytes a token. Raises InvalidRequest or ContextTooLong unless the request can be computed at all.

    `known`: for each id of the model's vocabulary whether it is a token (V,).
    """
    sampling, count, most = request.sampling, len(request.tokens), int(known.sum())
    if count == 0:
        raise InvalidRequest("the input has no tokens; at least one is needed", param=request.param)
    if not 1 <= request.n <= max_sequences:
        raise InvalidRequest(f"n must be from 1 to {max_sequences}, received {request.n}", param="n")
    if sampling.max_tokens < 0:
        raise InvalidRequest(f"max_tokens must be at least 0, received {sampling.max_tokens}", param="max_tokens")
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise InvalidRequest(f"temperature must be a number >= 0, received {sampling.temperature}", param="temperature")
    if not 0 < sampling.top_p <= 1:
        raise InvalidRequest(f"top_p must be above 0 and at most 1, received {sampling.top_p}", param="top_p")
    if not 0 <= sampling.top_k < 2**63:
        raise InvalidRequest(f"top_k must be from 0 (all tokens) to 2^63 - 1, received {sampling.top_k}", param="top_k")
    if sampling.seed is not None and not -(2**63) <= sampling.seed < 2**63:
        raise InvalidRequest(f"seed must be a number of 64 bits, received {sampling.seed}", param="seed")
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= most:
        raise InvalidRequest(f"logprobs must be from 0 to {most}, received {sampling.logprobs}", param="logprobs")
    if "" in sampling.stop:
        raise InvalidRequest("stop strings must not be empty", param="stop")
    total = request.total_tokens
    if total > max_length:
        answer = "" if request.is_pooled else f" and max_tokens {sampling.max_tokens}, together {total},"
        raise ContextTooLong(
            f"the input has {count} tokens{answer} but the model's context is {max_length} tokens",
            param=request.param,
            details={"prompt_tokens": count, "total_tokens": total, "max_tokens": max_length},
        )
    return _checked_ids(request, known)  # last: it looks at every id, whose number is bounded now


def _checked_ids(request: Request, known: NDArray[np.bool_]) -> array[int]:
    """Ids that are that already stay as they are."""
    tokens = request.tokens
    try:
        prompt = tokens if isinstance(tokens, array) and tokens.typecode == "i" else array("i", tokens)
    except (TypeError, OverflowError):
        raise InvalidRequest("token ids must be whole numbers of the model's vocabulary", param=request.param) from None
    ids, last = np.asarray(prompt), len(known) - 1
    if ids.min() < 0 or ids.max() > last:
        raise InvalidRequest(f"token ids must be from 0 to {last}", param=request.param)
    if not known[ids].all():
        raise InvalidRequest(f"token id {ids[~known[ids]][0]} is no token of this model", param=request.param)
    return prompt


def choose(request: Request, lanes: Mapping[str, Lane], default: str, budget: int) -> tuple[Lane, str, Need]:
    """The lane a request runs under, why, and what it needs there. Raises UnknownBackend."""
    asked = request.backend or default
    if asked == AUTO:
        return _fastest(request, lanes, budget)
    if asked not in lanes:
        raise UnknownBackend(asked, (*lanes, AUTO))
    return lanes[asked], "request" if request.backend else "default", need(request, lanes[asked])


def _fastest(request: Request, lanes: Mapping[str, Lane], budget: int) -> tuple[Lane, str, Need]:
    """The lane of the least predicted seconds among those whose bytes fit the budget (among all, when none does)."""
    needs = {name: need(request, lane) for name, lane in lanes.items()}
    fits = [name for name in lanes if needs[name].total <= budget]
    seconds = {name: predicted_seconds(request, lanes[name]) for name in fits or lanes}
    best = min(seconds, key=lambda name: seconds[name])
    told = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items())
    return lanes[best], f"auto: predicted {told}", needs[best]


def predicted_seconds(request: Request, lane: Lane) -> float:
    """Seconds of the request on an idle engine."""
    decode = 0 if request.is_pooled else request.sampling.max_tokens
    return lane.course.seconds(len(request.tokens)) + decode * lane.course.decode_seconds(request.total_tokens)


def need(request: Request, lane: Lane, prompt_tokens: int | None = None) -> Need:
    """Bytes the request holds under a backend; of a prompt of another length when `prompt_tokens` is given."""
    sampling, prompt = request.sampling, len(request.tokens) if prompt_tokens is None else prompt_tokens
    if request.is_pooled:
        return Need({"state": lane.state_bytes(prompt), "step": lane.course.prefill_bytes(prompt)})
    total = prompt + sampling.max_tokens
    is_scored = sampling.echo and sampling.logprobs is not None
    scored = request.n * sampling.max_tokens + (prompt if is_scored else 0)
    terms = {
        "state": request.n * lane.state_bytes(total),
        "step": max(lane.course.prefill_bytes(total), request.n * lane.course.step_bytes(total - 1, total)),
        "logits": lane.course.vocab_size * max(request.n * bytes_per_logit(sampling), SCORE_BYTES if is_scored else 0),
        "answer": request.n * (sampling.max_tokens * TOKEN_BYTES + (prompt * ECHO_BYTES if sampling.echo else 0)),
        "logprobs": 0 if sampling.logprobs is None else scored * LOGPROB_BYTES * (1 + sampling.logprobs),
        "grammar": 0 if sampling.grammar is None else (1 + request.n) * GRAMMAR_BYTES,
    }
    return Need(terms)


def longest_tokens(request: Request, lane: Lane, budget: int, max_length: int) -> int:
    """The longest total, prompt and max_tokens, that the budget holds under a backend; 0 when none does."""
    answer = request.total_tokens - len(request.tokens)
    low, high = 0, max(0, max_length - answer)  # prompt lengths: low fits (or is 0), above high is not asked
    while low < high:
        middle = (low + high + 1) // 2
        if need(request, lane, middle).total <= budget:
            low = middle
        else:
            high = middle - 1
    return low + answer if low else 0


def fitting(request: Request, lanes: Iterable[Lane], budget: int) -> tuple[str, ...]:
    """Names of the backends under which the request fits the whole budget."""
    return tuple(lane.name for lane in lanes if need(request, lane).total <= budget)


def refuse(plan: Plan, param: str) -> NeverFits:
    """The refusal of a request that needs more than the whole budget, each term of the bound logged."""
    terms = ", ".join(f"{name} {value}" for name, value in plan.terms.items())
    logger.info("refused %d tokens under %s: %s; budget %d", plan.total_tokens, plan.backend, terms, plan.budget_bytes)
    other = f"; backends that would fit: {', '.join(plan.backends_that_fit)}" if plan.backends_that_fit else ""
    return NeverFits(
        f"{plan.total_tokens} tokens under {plan.backend} need {plan.needed_bytes} bytes, the budget is {plan.budget_bytes}; "
        f"the longest that fits is {plan.longest_tokens} tokens{other}",
        param=param,
        details={
            "needed_bytes": plan.needed_bytes,
            "budget_bytes": plan.budget_bytes,
            "longest_tokens": plan.longest_tokens,
            "backends_that_fit": list(plan.backends_that_fit),
            "terms": dict(plan.terms),
        },
    )
