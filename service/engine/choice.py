"""Which backend answers a request: the one it names, a candidate, the default, what `auto` weighs, or what it spills to.

`auto` picks by what is predicted here and now: the first of the operator's order (or the caller's) that keeps the limit of
seconds, the fastest where there is no order or none keeps it. Who has no bytes left comes into question last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256

from service.engine.allowlist import Backends, Lane
from service.engine.need import Need, need
from service.engine.request import AUTO, Request, UnknownBackend

Lanes = Mapping[str, Lane]


@dataclass(frozen=True)
class Pick:
    """A lane, and what the request would hold under it."""

    lane: Lane
    why: str  # this lane: "request", "candidate: ...", "default", what `auto` weighed, or what did not fit
    need: Need


def choose(
    request: Request,
    lanes: Lanes,
    rules: Backends,
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
    asked, why = _asked(request, rules, lanes)
    for name, allowed in ((asked, (*lanes, AUTO)), *((name, tuple(lanes)) for name in request.prefer)):
        if name not in allowed:
            raise UnknownBackend(name, allowed)
    order = [asked] if asked != AUTO else list(request.prefer or rules.auto.prefer or lanes)
    serving = {name: lanes[name] for name in order if lanes[name].withdrawn is None}
    if not serving:
        raise lanes[order[0]].refusal()
    if asked == AUTO:
        limit, is_order = request.max_seconds or rules.auto.max_seconds, bool(request.prefer or rules.auto.prefer)
        return _pick(request, serving, is_order, limit, left, queue_seconds())
    pick = Pick(lanes[asked], why, need(request, lanes[asked]))
    is_spilling = rules.auto.spill and not request.backend and pick.need.total > left[-1]
    return _spilled(request, pick, lanes, rules.auto.prefer or tuple(lanes), left[-1]) if is_spilling else pick


def _asked(request: Request, rules: Backends, lanes: Lanes) -> tuple[str, str]:
    """The backend to answer under, or auto, and why: by the request's own wish, as a candidate that serves, or by default."""
    if request.backend:
        return request.backend, "request"
    place = int.from_bytes(sha256(request.caller.encode()).digest()[:8]) / 2**64  # of the caller, always the same
    for name, share in rules.weights.items():
        if 0 <= place < share and lanes[name].withdrawn is None:
            return name, f"candidate: {share:g} of the calls"
        place -= share
    return rules.default, "default"


def _pick(request: Request, lanes: Lanes, is_order: bool, limit: float | None, left: tuple[int, int], queued: float) -> Pick:
    """What `auto` picks of those whose bytes are free; where none is, of those that the budget holds; else of all.

    lanes: those that come into question; `is_order`: the best first.
    """
    needs = {name: need(request, lane) for name, lane in lanes.items()}
    fitting = ([name for name in needs if needs[name].total <= room] for room in (*left, math.inf))
    seconds = {name: queued + predicted_seconds(request, lanes[name]) for name in next(filter(None, fitting))}
    quick = [name for name in seconds if limit is None or seconds[name] <= limit]
    best = quick[0] if is_order and quick else min(seconds, key=lambda name: seconds[name])
    rule = "preferred" if is_order and quick else "fastest"
    rule += "" if limit is None else f" within {limit:g} s" if quick else f", none within {limit:g} s"
    told = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items())
    short = [name for name in needs if name not in seconds]
    without = f"; no bytes for {', '.join(short)}" if short else ""
    return Pick(lanes[best], f"auto: {rule}, predicted {told}{without}", needs[best])


def _spilled(request: Request, pick: Pick, lanes: Lanes, order: tuple[str, ...], budget: int) -> Pick:
    """The next backend of the order that the budget holds; the pick as it is where none does."""
    asked = pick.lane.name
    for name in order[order.index(asked) + 1 :] if asked in order else order:
        needed = need(request, lanes[name])
        if needed.total <= budget and lanes[name].withdrawn is None:
            return Pick(lanes[name], f"spilled: {asked} needs {pick.need.total} bytes, the budget is {budget}", needed)
    return pick


def predicted_seconds(request: Request, lane: Lane) -> float:
    """Seconds of the request on an idle engine."""
    return prefill_seconds(request, lane) + decode_seconds(request, lane)


def prefill_seconds(request: Request, lane: Lane, cached: int = 0) -> float:
    """Seconds of the prompt, of which the first `cached` tokens need not be processed."""
    return lane.prefill_seconds(len(request.tokens), cached, "embed" if request.is_pooled else "prefill")


def decode_seconds(request: Request, lane: Lane) -> float:
    """Seconds of an answer of max_tokens behind its first, which the prompt brings; each as long as the one in the middle."""
    answer = request.total_tokens - len(request.tokens)
    return max(answer - 1, 0) * lane.decode_seconds(len(request.tokens) + answer // 2 or 1)
