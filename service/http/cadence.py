"""How often streams speak. An event takes its way, through Serve and a proxy, some tenths of a millisecond of the CPUs' time,
however many tokens it has; the CPUs' time is what the model lacks then.

So the streams of a replica share what events there may be: each rests behind an event for as long as one of every other stream
that speaks takes, and what is drawn meanwhile is in its next. One stream alone does not rest, nor does a first event or a last.
"""

from __future__ import annotations

from service.engine.answer import Answer

EVENT_SECONDS = 2e-3  # for an event on its way, of the replica's and the proxy's CPUs (`--parts streams`)
WHOLE_SECONDS = 0.1  # between two readings of an answer that nobody sees before its end


class Cadence:
    """The streams that speak just now."""

    def __init__(self) -> None:
        self.speaking: set[Answer] = set()

    def rest_seconds(self) -> float:
        """Behind an event of one of them."""
        return EVENT_SECONDS * (len(self.speaking) - 1)


def whole() -> float:
    """Seconds of rest where an answer is told as a whole."""
    return WHOLE_SECONDS
