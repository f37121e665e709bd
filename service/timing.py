"""One stopwatch record per request, filled on its way; it becomes metrics, a log line and response headers.

All times are `time.monotonic()` seconds; durations are derived, never stored twice. Knows no engine and no HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Timings:
    """When each phase of a request ended, and what it shared the machine with."""

    tokenize_seconds: float = 0.0
    queued_at: float | None = None  # handed to the engine
    admitted_at: float | None = None  # reserved and scheduled for the first time
    prefilled_at: float | None = None  # the last prompt token was processed
    first_token_at: float | None = None
    finished_at: float | None = None
    prefill_chunks: int = 0
    decode_steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    batch_mates: int = 0  # most sequences it ever shared a step with, itself left out
    peak_bytes: int = 0  # reserved state and workspace, by the cost law
    backend: str = ""
    why: str = ""  # why this backend: "request", "default", or what `auto` measured
    token_times: list[float] = field(default_factory=list)  # when each output token was handed out
