"""What the engine tells whoever watches it: the calls that metrics and logs need. No metric object is here.

Every call is made on the event loop, never on the model thread, and must return quickly; one that raises is logged and
harms nobody. Levels (queue depth, bytes in use) are read from `Engine.snapshot()` when somebody asks, so that no gauge can
go stale; events are told here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from service.engine.request import Request

Outcome = Literal["stop", "length", "embedded", "cancelled", "deadline_exceeded", "draining", "out_of_memory", "model_failed"]
StepKind = Literal["prefill", "decode", "embed"]


@dataclass(frozen=True)
class Step:
    """One call of the model: what ran together and what it cost."""

    kind: StepKind
    backend: str
    tokens: int
    sequences: int
    seconds: float
    predicted_seconds: float
    predicted_bytes: int  # workspace by the cost law
    measured_bytes: int | None  # peak of storages made during the step; None when this step was not sampled
    method: str = "dispatch"  # how measured_bytes was taken: "dispatch" on CPU, "allocator" on CUDA
    token_gaps: tuple[float, ...] = ()  # seconds since the sample's token before, for each token of the step that had one


class Observer(Protocol):
    """Told of every request's end, every refusal and every step."""

    def finished(self, request: Request, outcome: Outcome) -> None:
        """A request that had been accepted left the engine; `request.timings` is complete. Called once for each."""

    def refused(self, request: Request, reason: str) -> None:
        """A request was turned away at the door; `reason` is the error's `code`. It is never told to `finished`."""

    def stepped(self, step: Step) -> None:
        """The model ran once."""


class NullObserver:
    """Watches nothing."""

    def finished(self, request: Request, outcome: Outcome) -> None:
        pass

    def refused(self, request: Request, reason: str) -> None:
        pass

    def stepped(self, step: Step) -> None:
        pass
