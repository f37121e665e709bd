"""The rule by which a call finds its replica, and what a proxy knows when it applies it; no Ray.

`service/router.py` applies it in Serve's proxies, `service/capacity` to replicas that are only thought of.
"""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypedDict, TypeVar

from service.engine.ahead import Ahead, together

Replica = TypeVar("Replica", bound=Hashable)

TOLD_SECONDS = 1.0  # between two tellings of a replica, and at most as long as one takes on its way
UNHEARD_SECONDS = 2 * TOLD_SECONDS  # after which a replica's last telling counts a call that it was sent
MOST_NAMED = 32  # calls of a telling, some 40 bytes each; a replica that has more names those with the most to do
MOST_HOMES = 1 << 14  # beginnings of prompts, some 200 bytes each
HOME_SECONDS = 600.0  # after which a beginning that nobody asked for is taken for forgotten there


class Told(TypedDict, total=False):
    """What a replica tells; empty before the first time. Serve sends it on when it differs from the last."""

    outstanding_seconds: float  # predicted, until all that runs or waits is done
    calls: Mapping[str, tuple[float, float]]  # what of that, by ticket: as `Ahead` has it
    others: tuple[float, float]  # and of calls that are not named
    token_seconds: float  # to read one token more
    keeps_prefixes: float  # 1 where it does


def tell(ahead: Mapping[str, Ahead], token_seconds: float, keeps_prefixes: bool) -> Told:
    """`ahead`: of each call, by ticket; of those that have none, under ""."""
    named = heapq.nlargest(MOST_NAMED, filter(None, ahead), key=lambda ticket: ahead[ticket].seconds)
    others = together(work for ticket, work in ahead.items() if ticket not in named)
    return {
        "outstanding_seconds": together(ahead.values()).seconds,
        "calls": {ticket: (ahead[ticket].prefill, ahead[ticket].decode) for ticket in named},
        "others": (others.prefill, others.decode),
        "token_seconds": token_seconds,
        "keeps_prefixes": float(keeps_prefixes),
    }


class Underway(NamedTuple):
    """A call that was sent and whose end is not known."""

    tokens: int  # of its prompt, about
    at: float  # when it was sent


@dataclass
class Sent:
    """What a proxy has sent to a replica, by ticket, and what of it has ended of late.

    A replica names the calls that it tells of. What it has been sent and does not name is added, what it names and has ended
    since is taken off, whatever has crossed what on the way.
    """

    calls: dict[str, Underway] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    _ended: dict[str, float] = field(default_factory=dict)  # when

    def seconds(self, told: Told) -> float:
        """Of the replica: what it tells without what has ended since, and what it cannot have counted yet."""
        self._forget(told)
        named, since = told.get("calls", {}), self.clock() - UNHEARD_SECONDS
        new = sum(each.tokens for ticket, each in self.calls.items() if each.at > since and ticket not in named)
        known = told.get("outstanding_seconds", 0.0)
        if self._ended.keys() & named.keys():
            left = [work for ticket, work in named.items() if ticket not in self._ended]
            known = together((*left, told.get("others", (0.0, 0.0)))).seconds
        return known + told.get("token_seconds", 0.0) * new

    def add(self, ticket: str, tokens: int) -> None:
        self.calls[ticket] = Underway(tokens, self.clock())

    def remove(self, ticket: str) -> None:
        """It has ended."""
        if self.calls.pop(ticket, None) is not None:
            self._ended[ticket] = self.clock()

    def keep(self, underway: Container[str]) -> None:
        """Of what was sent, all has ended but these calls."""
        for ticket in [each for each in self.calls if each not in underway]:
            self.remove(ticket)

    def _forget(self, told: Told) -> None:
        """The oldest ends, of which no telling can be on its way any more."""
        named, since = told.get("calls", {}), self.clock() - UNHEARD_SECONDS
        while self._ended:
            ticket, at = next(iter(self._ended.items()))
            if at > since or ticket in named:
                break
            del self._ended[ticket]

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
