"""A ticket for each call that a proxy sends on: by it the router in that proxy and the replicas speak of the same call.

Whether a call is underway is known here before its caller can know that it is answered, so one that follows at once is sent by
what is left. Serve tells its router later, when the replica has closed the call.
"""

from __future__ import annotations

import itertools
import secrets

HEADER = b"x-longserve-ticket"
"""Carries it from the proxy to the replica. A caller's own is dropped."""


class Tickets:
    """Those of one process."""

    def __init__(self) -> None:
        self._process, self._numbers = secrets.token_hex(4), itertools.count()
        self._underway: set[str] = set()

    def issue(self) -> str:
        """A call begins."""
        ticket = f"{self._process}-{next(self._numbers)}"
        self._underway.add(ticket)
        return ticket

    def end(self, ticket: str) -> None:
        """It is answered, or nobody waits for its answer. May be said twice."""
        self._underway.discard(ticket)

    def __contains__(self, ticket: object) -> bool:
        """Whether it is underway."""
        return ticket in self._underway


TICKETS = Tickets()
"""Those of the proxy that this process is."""
