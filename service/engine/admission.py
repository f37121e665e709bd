"""Who may run: the allow-list of backends, and the verdict on a request before anything is computed.

Admission is by bytes. What a request will hold is known from the laws of cost before it runs: the state of its samples and
the workspace of its largest step. It is reserved as a whole, so a request that has begun never lacks memory by our doing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from attention import AttentionBackend, StatePool
from service.engine.forecast import Course
from service.engine.request import AUTO, ContextTooLong, InvalidRequest, NeverFits, Request, UnknownBackend
from service.engine.sampling import bytes_per_logit

LOGPROB_BYTES = 256  # of Python objects per echoed token and per alternative, measured with tracemalloc and rounded up
SCORE_BYTES = 64 * 12  # per entry of the vocabulary while an echoed prompt is scored, 64 rows at a time

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backends:
    """The allow-list: backends by name in the operator's order, and the default, one of them or `auto`.

    Raises:
        ValueError: an empty list, a default that is not in it, or a backend that cannot continue a sequence.
    """

    by_name: Mapping[str, AttentionBackend]
    default: str

    def __post_init__(self) -> None:
        if not self.by_name:
            raise ValueError("attention.backends must name at least one backend")
        if self.default not in (*self.by_name, AUTO):
            raise ValueError(f"attention.default must be {AUTO} or one of {', '.join(self.by_name)}, received {self.default!r}")
        bidirectional = [name for name, backend in self.by_name.items() if True not in backend.directions]
        if bidirectional:
            raise ValueError(
                f"attention.backends must be causal, for the model is a decoder; bidirectional only: {', '.join(bidirectional)}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.by_name)


@dataclass(frozen=True, eq=False)
class Route:
    """One backend in force, ready to serve: its forecast and the pool of its states."""

    name: str
    backend: AttentionBackend
    course: Course
    pool: StatePool


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


def check(request: Request, vocab_size: int, max_length: int, max_sequences: int) -> None:
    """Raise InvalidRequest or ContextTooLong unless the request can be computed at all."""
    sampling, count = request.sampling, len(request.tokens)
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
    if sampling.top_k < 0:
        raise InvalidRequest(f"top_k must be at least 0 (0: all tokens), received {sampling.top_k}", param="top_k")
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= vocab_size:
        raise InvalidRequest(f"logprobs must be from 0 to {vocab_size}, received {sampling.logprobs}", param="logprobs")
    if "" in sampling.stop:
        raise InvalidRequest("stop strings must not be empty", param="stop")
    total = total_tokens(request)
    if total > max_length:
        answer = "" if request.kind == "embedding" else f" and max_tokens {sampling.max_tokens}, together {total},"
        raise ContextTooLong(
            f"the input has {count} tokens{answer} but the model's context is {max_length} tokens",
            param=request.param,
            details={"prompt_tokens": count, "total_tokens": total, "max_tokens": max_length},
        )
    if not (min(request.tokens) >= 0 and max(request.tokens) < vocab_size):
        raise InvalidRequest(f"token ids must be from 0 to {vocab_size - 1}", param=request.param)


def total_tokens(request: Request) -> int:
    """Most tokens one sequence of the request may have."""
    return len(request.tokens) + (0 if request.kind == "embedding" else request.sampling.max_tokens)


def choose(request: Request, routes: Mapping[str, Route], default: str, budget: int) -> tuple[Route, str]:
    """The backend a request runs under, and why. Raises UnknownBackend."""
    asked = request.backend or default
    if asked == AUTO:
        return _fastest(request, routes, budget)
    if asked not in routes:
        raise UnknownBackend(asked, (*routes, AUTO))
    return routes[asked], "request" if request.backend else "default"


def _fastest(request: Request, routes: Mapping[str, Route], budget: int) -> tuple[Route, str]:
    """The backend of the least predicted seconds among those whose bytes fit the budget (among all, when none does)."""
    fitting = [route for route in routes.values() if need(request, route).total <= budget]
    seconds = {route.name: predicted_seconds(request, route) for route in fitting or routes.values()}
    best = min(seconds, key=lambda name: seconds[name])
    told = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items())
    return routes[best], f"auto: predicted {told}"


def predicted_seconds(request: Request, route: Route) -> float:
    """Seconds of the request on an idle engine."""
    decode = 0 if request.kind == "embedding" else request.sampling.max_tokens
    return route.course.seconds(len(request.tokens)) + decode * route.course.decode_seconds(total_tokens(request))


def need(request: Request, route: Route, prompt_tokens: int | None = None) -> Need:
    """Bytes the request holds under a backend; of a prompt of another length when `prompt_tokens` is given."""
    sampling, prompt = request.sampling, len(request.tokens) if prompt_tokens is None else prompt_tokens
    if request.kind == "embedding":
        return Need({"state": route.pool.slot_bytes(prompt), "step": route.course.prefill_bytes(prompt)})
    total = prompt + sampling.max_tokens
    is_scored = sampling.echo and sampling.logprobs is not None
    terms = {
        "state": request.n * route.pool.slot_bytes(total),
        "step": max(route.course.prefill_bytes(total), request.n * route.course.step_bytes(total - 1, total)),
        "logits": route.course.vocab_size * max(request.n * bytes_per_logit(sampling), SCORE_BYTES if is_scored else 0),
        "logprobs": prompt * LOGPROB_BYTES * (1 + (sampling.logprobs or 0)) if is_scored else 0,
    }
    return Need(terms)


def longest_tokens(request: Request, route: Route, budget: int, max_length: int) -> int:
    """The longest total, prompt and max_tokens, that the budget holds under a backend; 0 when none does."""
    answer = total_tokens(request) - len(request.tokens)
    low, high = 0, max(0, max_length - answer)  # prompt lengths: low fits (or is 0), above high is not asked
    while low < high:
        middle = (low + high + 1) // 2
        if need(request, route, middle).total <= budget:
            low = middle
        else:
            high = middle - 1
    return low + answer if low else 0


def fitting(request: Request, routes: Iterable[Route], budget: int) -> tuple[str, ...]:
    """Names of the backends under which the request fits the whole budget."""
    return tuple(route.name for route in routes if need(request, route).total <= budget)


def refuse(plan: Plan, param: str) -> NeverFits:
    """The refusal of a request that needs more than the whole budget, each term of the bound logged."""
    terms = ", ".join(f"{name} {value}" for name, value in plan.terms.items())
    log.info("refused %d tokens under %s: %s; budget %d", plan.total_tokens, plan.backend, terms, plan.budget_bytes)
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
