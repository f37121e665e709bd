"""Which replica a call goes to: the one whose work is done soonest, in predicted seconds, not the one with the fewest calls.

Serve's own routers count calls, and a prompt of 32,768 tokens counts as one of ten. Each replica tells once a second what it
has to do, and of which calls (`Longserve.record_routing_stats`); what this proxy has sent it and it does not name is added, by
the length of the body, and what it names and has ended since is taken off. Both know a call by its ticket
(service/http/tickets.py). What a replica may have kept of a prompt need not be computed there: a call whose beginning was sent
to a replica before goes there again, unless it would wait there for longer than that saves (service/http/beginning.py). With
HAProxy in the proxy's place this is not asked: it sends to the fewest connections.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Mapping, Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from service.http import beginning, tickets
from service.http.beginning import STEP_BYTES
from service.routing import Homes, Sent

TOKEN_BYTES = 4  # of a body, some


class LeastWork(RequestRouter):  # type: ignore[misc]
    """Serve's router of a deployment, one in each proxy."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sent: dict[ReplicaID, Sent] = {}
        self._homes: Homes[ReplicaID] = Homes()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        headers = {} if pending_request is None else headers_of(pending_request)
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # when none of them takes it
        self._sent = {each.replica_id: self._sent.get(each.replica_id) or Sent() for each in candidate_replicas}
        for sent in self._sent.values():
            sent.keep(tickets.TICKETS)  # by its module: Serve pickles this class with all that it names, but for modules
        self._take_back(headers)  # it was refused, and is asked about again
        ranked = by_work(candidate_replicas, self._sent, self._homes.find(marks_of(headers)))
        self._count(headers, ranked[0].replica_id)  # now, for the next of a burst comes before any replica has taken one
        return [[each] for each in ranked]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        headers = headers_of(pending_request)
        self._take_back(headers)  # from the first, where that had no room
        self._count(headers, replica_id)

    def _count(self, headers: Head, replica_id: ReplicaID) -> None:
        """A call is a replica's."""
        ticket, sent = ticket_of(headers), self._sent.get(replica_id)
        if ticket and sent is not None:
            self._homes.note(marks_of(headers), replica_id)
            sent.add(ticket, body_bytes(headers) // TOKEN_BYTES + 1)

    def _take_back(self, headers: Head) -> None:
        """It is nobody's."""
        for sent in self._sent.values():
            sent.calls.pop(ticket_of(headers), None)


def by_work(
    replicas: Sequence[RunningReplica], sent: Mapping[ReplicaID, Sent], home: tuple[ReplicaID, int] | None = None
) -> list[RunningReplica]:
    """The replicas, the least seconds first; those with as few of them in any order, the fewest calls first.

    home: the one that has seen the prompt's beginning, and how many steps of it: the seconds that reading those takes are less
    to do there, where prefixes are kept.
    """
    at, steps = home or (None, 0)

    def rank(replica: RunningReplica) -> tuple[float, int]:
        told, is_home = replica.routing_stats, replica.replica_id == at
        tokens = steps * STEP_BYTES // TOKEN_BYTES if is_home and told.get("keeps_prefixes") else 0
        return sent[replica.replica_id].rank(told, told.get("token_seconds", 0.0) * tokens)

    return sorted(random.sample(replicas, len(replicas)), key=rank)


Head = Mapping[bytes, bytes]


def headers_of(pending_request: PendingRequest) -> Head:
    """Those of a call by HTTP; none where it is no such call."""
    if not pending_request.args or not isinstance(pending_request.args[0], bytes):
        return {}
    return dict(pickle.loads(pending_request.args[0]).asgi_scope["headers"])  # packed by the proxy that this runs in


def ticket_of(headers: Head) -> str:
    """Empty where it has none."""
    return headers.get(tickets.HEADER, b"").decode()


def marks_of(headers: Head) -> list[bytes]:
    """Those of the prompt's beginning, as the proxy found them."""
    return [mark for mark in headers.get(beginning.HEADER, b"").split(b",") if mark]


def body_bytes(headers: Head) -> int:
    """As the caller says, 0 where it does not."""
    told = headers.get(b"content-length", b"")
    return int(told[:20]) if told.isdigit() else 0
