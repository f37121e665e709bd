"""How far the prompts of a call have been read, for whoever waits for the first token: a comment in its stream.

A comment is a line of server-sent events that every client passes over (WHATWG HTML, section 9.2.6), so it may say what
OpenAI's chunks have no field for:

    : waiting; 4096 of 30000 tokens read, about 5.2 s to the first token
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from service.engine.request import Request, RequestError
from service.http.face import Host


@dataclass(frozen=True)
class Headway:
    """Of one call's prompts together."""

    read_tokens: int
    prompt_tokens: int
    seconds: float | None  # until they have been read; None: nobody knows

    @property
    def comment(self) -> bytes:
        """As a stream sends it."""
        told = ": waiting"
        if self.read_tokens < self.prompt_tokens:
            told += f"; {self.read_tokens} of {self.prompt_tokens} tokens read"
            told += "" if self.seconds is None else f", about {self.seconds:.1f} s to the first token"
        return f"{told}\n\n".encode()


def headway(requests: Sequence[Request], host: Host) -> Headway:
    """How far these requests are, which the engine has accepted."""
    read = sum(map(_read_tokens, requests))
    return Headway(read, sum(len(request.tokens) for request in requests), _seconds(requests, host))


def _read_tokens(request: Request) -> int:
    return request.timings.cached_tokens + sum(chunk.tokens for chunk in request.timings.chunks)


def _seconds(requests: Sequence[Request], host: Host) -> float | None:
    """Prompts are read one after the other: the seconds of those that have begun, and of all the queue for those that wait."""
    try:
        if any(request.timings.admitted_at is None for request in requests):
            return host.engine.plan(requests[0]).predicted_seconds["queue"]  # they stand in it themselves
        return sum(_remaining(request, host) for request in requests)
    except RequestError:  # its backend is no longer in the allow-list, by whose forecast this goes
        return None


def _remaining(request: Request, host: Host) -> float:
    """What the forecast says of the tokens to come, times how much slower than the forecast those before them were."""
    whole, read, timings = _predicted(request, len(request.tokens), host), _read_tokens(request), request.timings
    if not read or timings.admitted_at is None:
        return whole
    before, kept = _predicted(request, read, host), _predicted(request, timings.cached_tokens, host)
    slowness = (timings.chunks[-1].ended_at - timings.admitted_at) / (before - kept) if timings.chunks else 1.0
    return (whole - before) * slowness


def _predicted(request: Request, tokens: int, host: Host) -> float:
    """Seconds for the first so many tokens of its prompt, none of them kept."""
    if not tokens:
        return 0.0
    part = replace(request, tokens=request.tokens[:tokens], backend=request.timings.backend, reuses=False)
    return host.engine.plan(part).predicted_seconds["prefill"]
