"""Pins: wishes that the state of a prompt's beginning is still there when the next question comes.

A pinned state stands where all kept states stand, within `prefix_share`, and goes last: never for another prefix, and for a
request only when nothing else is left to make room. A pin is known by lane and mark; when its state had to go, whoever asks
about the same text again puts it back.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from service.engine.allowlist import Lane
from service.engine.request import InvalidRequest, NeverFits, PrefixNotKept

MOST_PINS = 1024


@dataclass(frozen=True)
class Pin:
    """One wish: of whom, for which beginning, until when."""

    owner: str
    lane: Lane
    mark: bytes
    tokens: int
    num_bytes: int  # of the state, by the law of cost
    until: float  # time.monotonic() seconds; while it is read, later than it can be done
    id: str = field(default_factory=lambda: f"prefix-{secrets.token_hex(12)}")


class Pins:
    """The wishes that hold. Changed on the event loop, read on the model thread beside it."""

    def __init__(self) -> None:
        self._pins: Mapping[str, Pin] = {}  # replaced, never changed

    def current(self) -> list[Pin]:
        """All whose time is not over, oldest first."""
        now = time.monotonic()
        return [pin for pin in self._pins.values() if pin.until > now]

    def states(self) -> set[tuple[Lane, bytes]]:
        """Lanes and marks of the states that are wished for."""
        return {(pin.lane, pin.mark) for pin in self.current()}

    def add(self, pin: Pin, limit: int) -> None:
        """Take a wish in; what is pinned takes no more than `limit` bytes together.

        Raises:
            NeverFits: its state alone takes more.
            PrefixNotKept: it does beside those that are pinned now.
            InvalidRequest: there are MOST_PINS.
        """
        current = self.current()
        states = {(each.lane, each.mark): each.num_bytes for each in current}
        held = sum(states.values()) - states.get((pin.lane, pin.mark), 0)
        told = f"the state of {pin.tokens} tokens takes {pin.num_bytes} bytes, and kept prefixes may take {limit} together"
        details: dict[str, object] = {"needed_bytes": pin.num_bytes, "budget_bytes": limit, "pinned_bytes": held}
        if pin.num_bytes > limit:
            raise NeverFits(f"{told}: engine.prefix_share says how much", details=details)
        if pin.num_bytes + held > limit:
            raise PrefixNotKept(f"{told}, of which {held} are pinned: delete a pin, or wait until one ends", details=details)
        if len(current) >= MOST_PINS:
            raise InvalidRequest(f"{MOST_PINS} prefixes are pinned, and no more may be: delete one")
        self._pins = {each.id: each for each in (*current, pin)}

    def begin(self, pin: Pin, seconds: float) -> Pin:
        """The wish whose time begins now, for its text has been read."""
        begun = replace(pin, until=time.monotonic() + seconds)
        self._pins = {each.id: begun if each.id == pin.id else each for each in self.current()}
        return begun

    def remove(self, pin: Pin) -> None:
        """End a wish. Idempotent."""
        self._pins = {each.id: each for each in self.current() if each.id != pin.id}
