"""The rule by which a call finds its replica, and what a proxy knows when it applies it; no Ray.

`service/router.py` applies it in Serve's proxies, `service/capacity` to replicas that are only thought of.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

Replica = TypeVar("Replica", bound=Hashable)

TOLD_SECONDS = 1.0  # between two tellings of a replica
MOST_HOMES = 1 << 14  # beginnings of prompts, some 200 bytes each
HOME_SECONDS = 600.0  # after which a beginning that nobody asked for is taken for forgotten there
CROSSING = 2  # tellings that may have left before the proxy's last news of a call reached the replica, and the one after
Told = Mapping[str, float]
"""outstanding_seconds, token_seconds (to read one more), tellings (see `Tellings`), keeps_prefixes (1 where it does); empty
before the first."""


class Tellings:
    """Numbers what a replica tells. That it rests is a telling once: Serve sends on what differs from the last."""

    def __init__(self) -> None:
        self._number, self._rests = 0, True

    def number(self, work: Told) -> dict[str, float]:
        rests = not work.get("outstanding_seconds")
        self._number += not (rests and self._rests)
        self._rests = rests
        return {**work, "tellings": float(self._number)}


class Underway(NamedTuple):
    """A call that was sent and whose end is not known."""

    tokens: int  # of its prompt, about
    telling: float  # of its replica, the last one when it was sent


class Ended(NamedTuple):
    """A call whose end is known; its replica may not have told it yet."""

    call: Underway
    telling: float  # the last one when it ended
    at: float


@dataclass
class Sent:
    """What a proxy has sent to a replica, by call, and what of it has ended just now.

    A telling takes up to a second on its way, so the first one after a call was sent, or has ended, may know it or not. What is
    not known to be counted is added, what may still be counted is taken off: none of it is wrong for longer than two tellings.
    """

    calls: dict[str, Underway] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    _ended: deque[Ended] = field(default_factory=deque)

    def seconds(self, told: Told) -> float:
        """Of the replica: what it tells without what has ended since, and what it cannot have counted yet."""
        last, token_seconds = told.get("tellings", 0), told.get("token_seconds", 0.0)
        self._forget(last)
        new = sum(each.tokens for each in self.calls.values() if last < each.telling + CROSSING)
        gone = sum(each.call.tokens for each in self._ended if each.call.telling < last)
        return max(0.0, told.get("outstanding_seconds", 0.0) - token_seconds * gone) + token_seconds * new

    def add(self, call: str, tokens: int, told: Told) -> None:
        self.calls[call] = Underway(tokens, told.get("tellings", 0))

    def remove(self, call: str, told: Told) -> None:
        """It has ended."""
        if (known := self.calls.pop(call, None)) is not None:
            last = told.get("tellings", 0)
            self._forget(last)
            self._ended.append(Ended(known, last, self.clock()))

    def _forget(self, last: float) -> None:
        """Those that the last telling cannot hold any more."""
        oldest = self.clock() - CROSSING * TOLD_SECONDS
        while self._ended and (self._ended[0].telling + CROSSING <= last or self._ended[0].at < oldest):
            self._ended.popleft()

    @property
    def knows_any(self) -> bool:
        """Whether there is a call that is not over and forgotten."""
        return bool(self.calls or self._ended)

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
