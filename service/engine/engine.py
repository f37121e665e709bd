"""The engine: requests go in, deltas and embeddings come out. An asyncio loop and one model thread.

Knows no HTTP and no Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from service.config import EngineConfig
from service.engine.admission import Backends, Plan
from service.engine.observer import NullObserver, Observer
from service.engine.request import Delta, Embedding, Request
from service.model.tokenizer import Tokenizer
from service.model.transformer import Transformer

__all__ = ["Answer", "Backends", "Engine", "Plan", "Snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """The engine's levels at one moment."""

    running: int  # sequences that hold state
    waiting: int  # requests in the queue
    waiting_tokens: int
    bytes_in_use: int  # reserved of the budget
    budget_bytes: int
    pool_bytes: Mapping[str, int]  # decode state by backend
    pool_slots: Mapping[str, int]
    draining: bool
    last_progress: float  # time.monotonic() of the last finished step, or of the last moment with nothing to do


class Answer:
    """The stream of one request: `Delta`s of a completion, or one `Embedding`.

    Iterating raises DeadlineExceeded, Draining, OutOfMemory or ModelFailed when the request fails on its way.
    `aclose()`, at any time, cancels what is left; leaving it unread costs nothing but memory.
    """

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Delta | Embedding:
        raise NotImplementedError

    async def aclose(self) -> None:
        raise NotImplementedError


class Engine:
    """Serves one model under the backends of an allow-list."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        backends: Backends,
        config: EngineConfig,
        observer: Observer | None = None,
    ) -> None:
        """Nothing runs before `start`. Raises ValueError when the weights leave no memory to serve with."""
        raise NotImplementedError

    @property
    def backends(self) -> Backends:
        """The allow-list in force."""
        raise NotImplementedError

    async def start(self) -> None:
        """Start the model thread, warm every backend up and measure its pace."""
        raise NotImplementedError

    async def stop(self) -> None:
        """End at once: what runs or waits fails with Draining. Idempotent."""
        raise NotImplementedError

    async def drain(self, cap_seconds: float) -> None:
        """Admit nothing more, finish what was accepted within the cap, tell the rest Draining."""
        raise NotImplementedError

    def submit(self, request: Request) -> Answer:
        """Accept a request, or raise its refusal here and now.

        Raises:
            InvalidRequest, UnknownBackend, ContextTooLong, NeverFits: it can never run.
            QueueFull, Draining: not now.
        """
        raise NotImplementedError

    def plan(self, request: Request) -> Plan:
        """What the request would cost and whether it would be admitted now. Raises InvalidRequest, UnknownBackend."""
        raise NotImplementedError

    async def swap(self, backends: Backends) -> None:
        """Put another allow-list in force for new requests. Requests in flight keep their backend."""
        raise NotImplementedError

    def snapshot(self) -> Snapshot:
        """The levels now. Safe from any thread."""
        raise NotImplementedError
