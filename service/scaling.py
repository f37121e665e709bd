"""How many replicas there should be: as many as have the outstanding work done within a target of predicted seconds.

Serve's own policy counts calls, and a prompt of 32,768 tokens counts as one of ten. Each replica tells what it has to do
(`Longserve.record_autoscaling_stats`), Serve means that over `look_back_period_s`, and this says how many replicas it is work
for. Serve keeps the delays, factors and bounds of `autoscaling_config`; a replica that has to go drains first.

    autoscaling_config:
      min_replicas: 1
      max_replicas: 4
      policy: {policy_function: "service.scaling:ByWork", policy_kwargs: {seconds: 2.0}}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

WORK, HOLDS = "outstanding_seconds", "holds_pins"
"""What a replica tells: predicted seconds of all that runs and waits; 1 where it keeps prefixes that callers have pinned."""


class Context(Protocol):
    """What Serve's controller says of a deployment."""

    aggregated_metrics: Mapping[str, Mapping[Any, float]] | None  # by metric and replica, each over the look-back period
    current_num_replicas: int


class ByWork:
    """A policy of `autoscaling_config`.

    Args:
        seconds: of work that one replica may have before another is wanted.

    Raises:
        ValueError: a target that is not above 0.
    """

    def __init__(self, seconds: float = 2.0) -> None:
        if not seconds > 0:
            raise ValueError(f"policy_kwargs.seconds must be above 0, received {seconds}")
        self._seconds = seconds

    def __call__(self, context: Context) -> tuple[float, dict[str, Any]]:
        """How many replicas are wanted, before Serve's bounds and delays, and no state. Never fewer than hold pinned prefixes.

        Before any replica has told anything there shall be as many as there are.
        """
        told = context.aggregated_metrics or {}
        if WORK not in told:
            return context.current_num_replicas, {}
        wanted = math.ceil(sum(told[WORK].values()) / self._seconds)
        holders = sum(share > 0 for share in told.get(HOLDS, {}).values())
        return max(wanted, holders, min(1, context.current_num_replicas)), {}
