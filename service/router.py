"""Which replica a call goes to: the one whose work is done soonest, in predicted seconds, not the one with the fewest calls.

Serve's own routers count calls, and a prompt of 32,768 tokens counts as one of ten. Each replica tells once a second what it
has to do (`Longserve.record_routing_stats`); what this proxy has sent it since is added, by the length of the body, which is
all that a proxy sees of a prompt. With HAProxy in the proxy's place this is not asked: it sends to the fewest connections.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Mapping, Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from service.routing import Sent

TOKEN_BYTES = 4  # of a body, some


class LeastWork(RequestRouter):  # type: ignore[misc]
    """Serve's router of a deployment, one in each proxy."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sent: dict[ReplicaID, Sent] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # when none of them takes it
        self._sent = {each.replica_id: self._sent.get(each.replica_id, Sent()) for each in candidate_replicas}
        return [[each] for each in by_work(candidate_replicas, self._sent)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        if (replica := self._replicas.get(replica_id)) is not None:
            tokens = body_bytes(pending_request) // TOKEN_BYTES + 1
            self._sent[replica_id].add(pending_request.metadata.internal_request_id, tokens, replica.routing_stats)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        if (sent := self._sent.get(replica_id)) is not None:
            sent.remove(internal_request_id)


def by_work(replicas: Sequence[RunningReplica], sent: Mapping[ReplicaID, Sent]) -> list[RunningReplica]:
    """The replicas, the least seconds first; those with as few of them in any order, the fewest calls first."""

    def rank(replica: RunningReplica) -> tuple[float, int]:
        return sent[replica.replica_id].rank(replica.routing_stats)

    return sorted(random.sample(replicas, len(replicas)), key=rank)


def body_bytes(pending_request: PendingRequest) -> int:
    """As the caller's headers say, 0 where they do not, or where it is no caller of HTTP."""
    if not pending_request.args or not isinstance(pending_request.args[0], bytes):
        return 0
    headers = dict(pickle.loads(pending_request.args[0]).asgi_scope["headers"])  # packed by the proxy that this runs in
    told = headers.get(b"content-length", b"")
    return int(told) if told.isdigit() else 0
