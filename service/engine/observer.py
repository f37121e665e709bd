"""What the engine tells whoever watches it: events, and levels for metrics and logs. No metric object is here.

Every call is made on the event loop, never on the model thread, and must return quickly; one that raises is logged and
harms nobody. Levels (queue depth, bytes in use) are read from `Engine.snapshot()` when somebody asks, so that no gauge can
go stale; events are told as they happen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from service.engine.request import Request

if TYPE_CHECKING:
    from service.engine.work import StepKind

Outcome = Literal[
    "stop",
    "length",
    "embedded",
    "cancelled",
    "deadline_exceeded",
    "draining",
    "withdrawn",
    "out_of_memory",
    "model_failed",
    "form_failed",
]


@dataclass(frozen=True)
class Step:
    """One call of the model: what ran together and what it cost."""

    kind: StepKind
    backend: str
    tokens: int
    sequences: int
    seconds: float
    predicted_seconds: float
    predicted_bytes: int | None  # workspace by the cost law; None when this step was not sampled
    measured_bytes: int | None  # peak of storages made during the step, likewise
    method: str = "dispatch"  # how measured_bytes was taken: "dispatch" on CPU, "allocator" on CUDA
    token_gaps: tuple[float, ...] = ()  # seconds since the sample's token before, for each token of the step that had one
    guessed: int = 0  # of the tokens, by prompt lookup
    right: int = 0  # of those


ShadowResult = Literal[
    "scored",
    "replaced",  # newer answers took its place
    "too_long",  # for engine.shadow.max_tokens
    "no_memory",  # the budget cannot hold it
    "gave_way",  # a request wanted its bytes
    "no_reference",  # which is withdrawn
    "switched",  # its backend is in force no more
    "undefined",  # a distribution that is none
    "failed",
]


@dataclass(frozen=True)
class Shadowed:
    """What became of an answer that was to be scored again under the reference."""

    id: str
    backend: str
    prompt_tokens: int
    result: ShadowResult
    nats: tuple[float, ...] = ()  # KL(reference || served) at each place that was compared
    agreed: int = 0  # places where both find the same token likeliest


@dataclass(frozen=True)
class ShadowLevels:
    """How it stands with answers that are scored again."""

    waiting: int
    kept_bytes: int  # of those that wait
    lent_bytes: int  # of the budget, for the one that is being scored
    seconds: float  # that the model thread has spent on it


@dataclass(frozen=True)
class Snapshot:
    """The engine's levels at one moment."""

    running: int  # sequences that hold state
    waiting: int  # requests in the queue
    waiting_tokens: int
    oldest_seconds: float  # the longest that a request has waited in the queue so far
    promised_tokens: int  # most tokens, of prompts and answers, that the running requests may come to
    bytes_in_use: int  # reserved of the budget
    budget_bytes: int
    pool_bytes: Mapping[str, int]  # decode state by backend
    pool_slots: Mapping[str, int]
    prefix_bytes: Mapping[str, int]  # states of prefixes that are kept, by backend
    withdrawn: Mapping[str, bool]  # backends in force: whether nothing is answered under it
    prefix_hits: int  # completions so far that went on from one
    prefix_misses: int  # and those that found none
    prefix_evictions: int  # kept states that had to make room
    draining: bool
    row_multiple: int | None  # None: answers may differ in the last bits by what shares the batch
    busy_seconds: float  # the model thread has computed for so long
    cpu_starved_ratio: float  # of it lately, the share in which it had no CPU
    measuring_seconds: float  # of it on measuring memory
    shadow: ShadowLevels
    last_progress: float  # time.monotonic() of the last finished step or of the first request's coming; now when there is none


class Observer(Protocol):
    """Told of every request's end, every refusal and every step."""

    def finished(self, request: Request, outcome: Outcome) -> None:
        """A request that had been accepted left the engine; `request.timings` is complete. Called once for each."""

    def refused(self, request: Request, reason: str) -> None:
        """A request was turned away at the door; `reason` is the error's `code`. It is never told to `finished`."""

    def stepped(self, step: Step) -> None:
        """The model ran once."""

    def shadowed(self, shadowed: Shadowed) -> None:
        """An answer was scored again, or was left out."""


class NullObserver:
    """Watches nothing."""

    def finished(self, request: Request, outcome: Outcome) -> None:
        pass

    def refused(self, request: Request, reason: str) -> None:
        pass

    def stepped(self, step: Step) -> None:
        pass

    def shadowed(self, shadowed: Shadowed) -> None:
        pass
