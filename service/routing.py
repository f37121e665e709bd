"""The rule by which a call finds its replica, and what a proxy knows when it applies it; no Ray.

`service/router.py` applies it in Serve's proxies, `service/capacity` to replicas that are only thought of.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

Replica = TypeVar("Replica", bound=Hashable)

TOLD_SECONDS = 1.0  # between two tellings of a replica
MOST_HOMES = 1 << 14  # beginnings of prompts, some 200 bytes each
HOME_SECONDS = 600.0  # after which a beginning that nobody asked for is taken for forgotten there
Told = Mapping[str, float]
"""outstanding_seconds, token_seconds (to read one more), tellings (how many there were), keeps_prefixes (1 where it does);
empty before the first."""


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


class Homes(Generic[Replica]):
    """Where prompts that began alike were sent last: what was computed of their beginning may be kept there."""

    def __init__(self) -> None:
        self._homes: OrderedDict[bytes, tuple[Replica, float]] = OrderedDict()  # by mark; when, by the monotonic clock

    def find(self, marks: Sequence[bytes]) -> tuple[Replica, int] | None:
        """Of a prompt with these marks, the shortest beginning's first: a replica, and how many of the marks it has seen."""
        for count in range(len(marks), 0, -1):
            replica, at = self._homes.get(marks[count - 1], (None, 0.0))
            if replica is not None and time.monotonic() - at < HOME_SECONDS:
                return replica, count
        return None

    def note(self, marks: Sequence[bytes], replica: Replica) -> None:
        """A prompt was sent there."""
        for mark in marks:
            self._homes[mark] = replica, time.monotonic()
            self._homes.move_to_end(mark)
        while len(self._homes) > MOST_HOMES:
            self._homes.popitem(last=False)
