"""Which backend answers a request: the one it names, the default, what `auto` weighs, or what it spills to.

`auto` picks by what is predicted here and now: the first of the operator's order (or the caller's) that keeps the limit of
seconds, the fastest where there is no order or none keeps it. Who has no bytes left comes into question last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from service.config import AutoConfig
from service.engine.allowlist import Lane
from service.engine.need import Need, need
from service.engine.request import AUTO, Request, UnknownBackend, Withdrawn

Lanes = Mapping[str, Lane]


@dataclass(frozen=True)
class Pick:
    """A lane, and what the request would hold under it."""

    lane: Lane
    why: str  # this lane: "request", "default", what `auto` weighed, or what did not fit
    need: Need


def choose(
    request: Request,
    lanes: Lanes,
    default: str,
    rules: AutoConfig,
    left: tuple[int, int],
    queue_seconds: Callable[[], float],
) -> Pick:
    """What a request runs under.

    Args:
        lanes: the allow-list.
        rules: the operator's, of which a request's own wishes replace what they say.
        left: bytes that are free now, and those of the whole budget.
        queue_seconds: predicted until all who came before are done.

    Raises:
        UnknownBackend: it names one that is not in the allow-list.
        Withdrawn: nothing is answered under it just now.
    """
    asked, strange = request.backend or default, [name for name in request.prefer if name not in lanes]
    if asked != AUTO and asked not in lanes:
        raise UnknownBackend(asked, (*lanes, AUTO))
    if strange:
        raise UnknownBackend(strange[0], lanes)
    prefer, limit = request.prefer or rules.prefer, request.max_seconds or rules.max_seconds
    _check_serves(lanes, [asked] if asked != AUTO else prefer or lanes)
    lanes = {name: lane for name, lane in lanes.items() if lane.withdrawn is None}
    if asked == AUTO:
        return _pick(request, lanes, tuple(name for name in prefer if name in lanes), limit, left, queue_seconds())
    choice = Pick(lanes[asked], "request" if request.backend else "default", need(request, lanes[asked]))
    is_spilling = rules.spill and not request.backend and choice.need.total > left[-1]
    return _spilled(request, choice, lanes, rules.prefer or tuple(lanes), left[-1]) if is_spilling else choice


def _check_serves(lanes: Lanes, names: Iterable[str]) -> None:
    """Raise Withdrawn unless one of them serves."""
    reasons = {name: lanes[name].withdrawn for name in names}
    if all(reasons.values()):
        raise Withdrawn(*next((name, str(reason)) for name, reason in reasons.items()))


def _pick(
    request: Request, lanes: Lanes, prefer: tuple[str, ...], limit: float | None, left: tuple[int, int], queued: float
) -> Pick:
    """What `auto` picks of those whose bytes are free; where none is, of those that the budget holds; else of all."""
    needs = {name: need(request, lanes[name]) for name in prefer or lanes}
    fitting = ([name for name in needs if needs[name].total <= room] for room in (*left, math.inf))
    seconds = {name: queued + predicted_seconds(request, lanes[name]) for name in next(filter(None, fitting))}
    quick = [name for name in seconds if limit is None or seconds[name] <= limit]
    best = quick[0] if prefer and quick else min(seconds, key=lambda name: seconds[name])
    rule = "preferred" if prefer and quick else "fastest"
    rule += "" if limit is None else f" within {limit:g} s" if quick else f", none within {limit:g} s"
    told = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items())
    short = [name for name in needs if name not in seconds]
    without = f"; no bytes for {', '.join(short)}" if short else ""
    return Pick(lanes[best], f"auto: {rule}, predicted {told}{without}", needs[best])


def _spilled(request: Request, choice: Pick, lanes: Lanes, order: tuple[str, ...], budget: int) -> Pick:
    """The next backend of the order that the budget holds; the choice as it is where none does."""
    asked = choice.lane.name
    for name in (name for name in (order[order.index(asked) + 1 :] if asked in order else order) if name in lanes):
        needed = need(request, lanes[name])
        if needed.total <= budget:
            why = f"spilled: {asked} needs {choice.need.total} bytes, the budget is {budget}"
            return Pick(lanes[name], why, needed)
    return choice


def predicted_seconds(request: Request, lane: Lane) -> float:
    """Seconds of the request on an idle engine."""
    return prefill_seconds(request, lane) + decode_seconds(request, lane)


def prefill_seconds(request: Request, lane: Lane, cached: int = 0) -> float:
    """Seconds of the prompt, of which the first `cached` tokens need not be processed."""
    return lane.prefill_seconds(len(request.tokens), cached, "embed" if request.kind == "embedding" else "prefill")


def decode_seconds(request: Request, lane: Lane) -> float:
    """Seconds of an answer of max_tokens, each as long as the one in the middle."""
    answer = request.total_tokens - len(request.tokens)
    return answer * lane.decode_seconds(len(request.tokens) + answer // 2 or 1)
