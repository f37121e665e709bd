"""One stopwatch record per request, filled on its way; it becomes metrics, a log line and response headers.

All times are `time.monotonic()` seconds; durations are derived, never stored twice. Knows no engine and no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Chunk:
    """A piece of a prompt that passed through the model at once, alone or beside others'."""

    began_at: float
    ended_at: float
    tokens: int


@dataclass
class Timings:
    """When each phase of a request ended, and what it shared the machine with."""

    tokenize_seconds: float = 0.0
    queued_at: float | None = None  # handed to the engine
    admitted_at: float | None = None  # reserved and scheduled for the first time
    prefilled_at: float | None = None  # the last prompt token was processed
    first_token_at: float | None = None
    finished_at: float | None = None
    chunks: list[Chunk] = field(default_factory=list)  # of the prompt, as they were processed
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, whose state was kept from an earlier request: they were not processed again
    dropped_tokens: int = 0  # of the input, as the caller asked: they are not among the prompt's
    output_tokens: int = 0
    guessed_tokens: int = 0  # by prompt lookup, that were looked over
    accepted_tokens: int = 0  # of those, that stand in the answer
    batch_mates: int = 0  # most sequences it ever shared a step with, itself left out
    seen_tokens: int = 0  # of the prompt, by its last token in one layer: all but those outside a window
    reserved_bytes: int = 0  # state and workspace, by the cost law, held from begin to end
    state_bytes: int = 0  # of the tensors that held its state, at most
    step_bytes: int | None = None  # its share, by tokens, of the largest measured peak of a step; None: not measured
    backend: str = ""
    why: str = ""  # why this backend: "request", "default", what `auto` weighed, or what did not fit

    @property
    def prefill_chunks(self) -> int:
        return len(self.chunks)

    @property
    def measured_bytes(self) -> int | None:
        """State and step as measured, the counterpart of `reserved_bytes`; None when the widest step was not measured."""
        return None if self.step_bytes is None else self.state_bytes + self.step_bytes

    @property
    def queue_seconds(self) -> float | None:
        """From the engine's door to the first step; None while it waits."""
        return _between(self.queued_at, self.admitted_at)

    @property
    def prefill_seconds(self) -> float | None:
        """From the first step to the last prompt token, other work between the chunks included."""
        return _between(self.admitted_at, self.prefilled_at)

    @property
    def decode_seconds(self) -> float | None:
        """From the last prompt token to the end."""
        return _between(self.prefilled_at, self.finished_at)

    @property
    def first_token_seconds(self) -> float | None:
        """From the engine's door to the first output token."""
        return _between(self.queued_at, self.first_token_at)

    @property
    def total_seconds(self) -> float | None:
        """From the engine's door to the end."""
        return _between(self.queued_at, self.finished_at)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


PHASES = ("tokenize", "queue", "prefill", "decode")


def receipt(records: Sequence[Timings]) -> dict[str, str | int | float | None]:
    """What the prompts of one call took, as plain data.

    Phases are those of the slowest prompt (they run side by side), bytes, tokens and chunks are sums, mates the most. A phase
    that has not ended is None, and so are measured bytes when not every prompt was measured.
    """
    seconds = {f"{phase}_seconds": _slowest([getattr(each, f"{phase}_seconds") for each in records]) for phase in PHASES}
    return {
        "backend": records[0].backend,
        "why": records[0].why,
        **seconds,
        "prefill_chunks": sum(each.prefill_chunks for each in records),
        "cached_tokens": sum(each.cached_tokens for each in records),
        "dropped_tokens": sum(each.dropped_tokens for each in records),
        "guessed_tokens": sum(each.guessed_tokens for each in records),
        "accepted_tokens": sum(each.accepted_tokens for each in records),
        "seen_tokens": sum(each.seen_tokens for each in records),
        "reserved_bytes": sum(each.reserved_bytes for each in records),
        "measured_bytes": _sum([each.measured_bytes for each in records]),
        "batch_mates": max(each.batch_mates for each in records),
    }


def _sum(amounts: Sequence[int | None]) -> int | None:
    known = [each for each in amounts if each is not None]
    return sum(known) if len(known) == len(amounts) else None


def _slowest(seconds: Sequence[float | None]) -> float | None:
    ended = [each for each in seconds if each is not None]
    return round(max(ended), 6) if len(ended) == len(seconds) else None
