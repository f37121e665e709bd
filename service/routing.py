"""The rule by which a call finds its replica, and what a proxy knows when it applies it; no Ray.

`service/router.py` applies it in Serve's proxies, `service/capacity` to replicas that are only thought of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

TOLD_SECONDS = 1.0  # between two tellings of a replica
Told = Mapping[str, float]
"""outstanding_seconds, token_seconds (to read one more), tellings (how many there were); empty before the first."""


class Underway(NamedTuple):
    """A call that was sent and whose end is not known."""

    tokens: int  # of its prompt, about
    telling: float  # of its replica, the last one when it was sent


@dataclass
class Sent:
    """What a proxy has sent to a replica and knows no end of, by call."""

    calls: dict[str, Underway] = field(default_factory=dict)

    def seconds(self, told: Told) -> float:
        """Of the replica: what it tells, and what it cannot have counted yet. One telling may have crossed a call."""
        last = told.get("tellings", 0)
        new = sum(each.tokens for each in self.calls.values() if each.telling + 2 > last)
        return told.get("outstanding_seconds", 0.0) + told.get("token_seconds", 0.0) * new

    def add(self, call: str, tokens: int, told: Told) -> None:
        self.calls[call] = Underway(tokens, told.get("tellings", 0))

    def remove(self, call: str) -> None:
        self.calls.pop(call, None)

    def rank(self, told: Told, saved: float = 0.0) -> tuple[float, int]:
        """Of its replica for a call of which it need not compute `saved` seconds: the least is asked first.

        The seconds until it could be done with all but that; of those with as few, the one with the fewest calls.
        """
        return self.seconds(told) - saved, len(self.calls)
