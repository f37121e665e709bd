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
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from service.engine.allowlist import Backends, Lane
from service.engine.choice import Pick, choose, decode_seconds, prefill_seconds
from service.engine.need import fitting, longest_tokens
from service.engine.request import (
    ContextTooLong,
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    NeverFits,
    QueueFull,
    Request,
    check_task,
)
from service.model.pooling import Task

PACED_TOKENS = 4096  # of the prompt whose pace is told, where the context is as long

logger = logging.getLogger(__name__)


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
class Offer(Pick):
    """What a request would run under, and what it would hold."""

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


@dataclass(frozen=True)
class Loan:
    """Bytes of the budget for somebody who does without them as soon as a reservation wants them."""

    bytes: int
    spared: int  # what must stay free beside them
    recall: Callable[[], None]  # the bytes are given back before the next step


class Ledger:
    """Who has reserved how many bytes of the budget."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.in_use = 0
        self._held: dict[object, int] = {}
        self._loan: Loan | None = None

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
        loan = self._loan
        if loan is not None and self.free < loan.bytes + loan.spared:
            self._loan = None
            loan.recall()

    @property
    def lent(self) -> int:
        """Bytes that are lent."""
        return 0 if self._loan is None else self._loan.bytes

    def lend(self, loan: Loan) -> bool:
        """Lend bytes, which go on counting as free. Returns whether there are so many; one loan is made at a time."""
        assert self._loan is None, "lent twice"
        fits = self.fits(loan.bytes + loan.spared)
        self._loan = loan if fits else None
        return fits

    def settle(self) -> None:
        """Take the loan back, if it has not been recalled."""
        self._loan = None

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
        self.rules: Backends  # which of them answers whom
        self.is_closed = False  # nothing more is let in
        self._known = known
        self._max_length = max_length
        self._max_sequences = max_sequences
        self._ledger = ledger
        self._queue = queue
        self._cached = cached
        self._tasks = tasks

    def admit(self, request: Request) -> Offer:
        """What the request runs under, or its refusal, as `Engine.submit` lists them."""
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
        """What the request would cost and whether it would be admitted now. Raises InvalidRequest and its kinds, Withdrawn."""
        return self._planned(request, self.offer(request))

    def offer(self, request: Request) -> Offer:
        """What the request would run under. Raises InvalidRequest, UnknownBackend."""
        check_task(request.kind, self._tasks)
        prompt = check(request, self._known, self._max_length, self._max_sequences)
        left = (self._ledger.free, self._ledger.budget)
        choice = choose(request, self.lanes, self.rules, left, self._queue.seconds_in_front)
        return Offer(choice.lane, choice.why, choice.need, prompt)

    def token_seconds(self) -> float:
        """Predicted, to read a token of a prompt of `PACED_TOKENS` under the default backend, or under the first."""
        lane = self.lanes.get(self.rules.default) or next(iter(self.lanes.values()))
        tokens = min(PACED_TOKENS, self._max_length)
        return lane.prefill_seconds(tokens) / tokens

    def _planned(self, request: Request, offer: Offer) -> Plan:
        lane, needed, budget = offer.lane, offer.need.total, self._ledger.budget
        reason = NeverFits.code if needed > budget else Draining.code if self.is_closed else None
        reason = reason or (QueueFull.code if self._queue.why_full(len(offer.prompt)) else None)
        runs = self._ledger.fits(needed) and not self._queue.is_waiting
        cached = self._cached(request, offer)
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
                "prefill": prefill_seconds(request, lane, cached),
                "decode": decode_seconds(request, lane),
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
