"""Shadow quality: some of the answers that were given are scored again, while no request is there, under a reference backend.

What an operator learns is how far the distributions that callers' tokens were drawn from are from the reference's, behind the
same prompt and the same answer so far: at places of the answer itself, evenly spread, since these are what callers got. Of a
call with several samples it is the first. An answer never feels it: tokens are copied when it has ended, states are its own.

It waits for its turn: slices run while nothing else does, and its bytes are a loan that ends as soon as a request wants them.
Tokens stand in memory only, up to `kept_bytes`, until they are scored or newer ones take their place; what leaves is numbers,
by backend and length, and the request's id as exemplar. What becomes of each answer is counted, so nothing is left out unseen.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch

import attention
from attention import NATIVE, shares, truth
from service.config import ShadowConfig
from service.engine.admission import Ledger, Loan
from service.engine.allowlist import Lane, unmeasured
from service.engine.delivery import attempt
from service.engine.divergence import Divergence, diverging, reading_bytes
from service.engine.observer import Observer, Shadowed, ShadowLevels, ShadowResult
from service.engine.request import Request
from service.engine.runner import Runner
from service.model.transformer import Transformer

T = TypeVar("T")
RECORD_BYTES = 512  # of an answer that waits, its tokens and its id left out

logger = logging.getLogger(__name__)


class Idle(Protocol):
    """Where it runs: the engine."""

    async def when_idle(self) -> None:
        """Return when no request is there."""

    async def beside(self, parts: Generator[None, None, T], is_patient: bool = False) -> T | None:
        """What a computation in parts returns; None where it was given up."""

    def give_up(self, parts: Generator[None, None, T]) -> None:
        """End a computation in parts before the next step."""


@dataclass(frozen=True)
class ServedAnswer:
    """An answer as it was given: the tokens that were read, of which all behind the prompt's were drawn."""

    id: str
    lane: Lane
    tokens: array[int]
    prompt_tokens: int
    total_tokens: int  # that it might have come to

    @property
    def num_bytes(self) -> int:
        return RECORD_BYTES + sys.getsizeof(self.tokens) + sys.getsizeof(self.id)

    def places(self, most: int) -> list[int]:
        """Indices behind which tokens were drawn, the first and the last among them."""
        first, count = self.prompt_tokens - 1, len(self.tokens) - self.prompt_tokens + 1
        return [first + i * (count - 1) // max(1, min(most, count) - 1) for i in range(min(most, count))]


class Shadow:
    """The answers that wait to be scored again, and their way."""

    def __init__(
        self,
        config: ShadowConfig,
        model: Transformer,
        runner: Runner,
        ledger: Ledger,
        spared: int,
        observer: Observer,
        lanes: Callable[[], Mapping[str, Lane]],
    ) -> None:
        """`spared`: bytes of the budget that stay free beside what is lent. `lanes`: the allow-list in force."""
        self.reference = config.reference or ("dense" if model.config.native is None else NATIVE)  # its name
        self._config = config
        self._model = model
        self._runner = runner
        self._ledger = ledger
        self._spared = spared
        self._observer = observer
        self._lanes = lanes
        self._waiting: deque[ServedAnswer] = deque()
        self._came = asyncio.Event()
        self._chance = random.Random()
        self._kept_bytes = 0
        self._seconds = 0.0

    def levels(self) -> ShadowLevels:
        """How it stands. Safe from any thread."""
        return ShadowLevels(len(self._waiting), self._kept_bytes, self._ledger.lent, self._seconds)

    # ---- what is kept -----------------------------------------------------------------------------------------------

    def served(self, request: Request, lane: Lane, prompt: array[int], output: array[int]) -> None:
        """Keep an answer that has ended well, by chance; the oldest make room."""
        if not self._config.share or lane.name == self.reference or not output:
            return
        if self._chance.random() >= self._config.share:
            return
        answer = ServedAnswer(request.id, lane, prompt + output[:-1], len(prompt), request.total_tokens)
        if len(answer.tokens) > self._config.max_tokens:
            self._tell(answer, "too_long")
            return
        self._waiting.append(answer)
        self._kept_bytes += answer.num_bytes
        while self._kept_bytes > self._config.kept_bytes:
            self._tell(self._next(), "replaced")
        self._came.set()

    def _next(self) -> ServedAnswer:
        answer = self._waiting.popleft()
        self._kept_bytes -= answer.num_bytes
        return answer

    def _tell(self, answer: ServedAnswer, result: ShadowResult, found: Divergence | None = None) -> None:
        nats, agreed = (found.nats, found.agreed) if found is not None else ((), 0)
        told = Shadowed(answer.id, answer.lane.name, answer.prompt_tokens, result, nats, agreed)
        attempt(partial(self._observer.shadowed, told))

    # ---- what is scored ---------------------------------------------------------------------------------------------

    def find_reference(self, chunk: int) -> Generator[None, None, Lane]:
        """The lane to hold answers to: the allow-list's, or one that is built and checked for it, as what serves is; in parts.

        Raises ValueError for a backend that is not causal, needs options, or answers otherwise than its definition.
        """
        name, model, where = self.reference, self._model, f"engine.shadow.reference {self.reference}"
        if name in self._lanes():
            return self._lanes()[name]
        if name == NATIVE and model.config.native is None:
            raise ValueError(f"{where}: this checkpoint sees everything in every layer, which is dense")
        backend = attention.build(name, model.config.native if name == NATIVE else None, model.head_shape())
        if True not in backend.directions:
            raise ValueError(f"{where} has no causal form")
        for kind in shares(backend):
            verdict = yield from truth.checking(kind, max_length=model.config.max_length)
            if not verdict.passed:
                raise ValueError(f"{where} is {verdict.told}")
        return unmeasured(name, backend, model, chunk, self._ledger.budget)

    async def run(self, engine: Idle, reference: Lane) -> None:
        """Score what is kept, one after the other, whenever no request is there. Ends when cancelled.

        reference: the lane to hold answers to while none of its name is in force.
        """
        while True:
            await engine.when_idle()
            if not self._waiting:
                self._came.clear()
                await self._came.wait()
                continue
            answer, reference = self._next(), self._lanes().get(self.reference, reference)
            try:
                self._tell(answer, *await self._score(answer, reference, engine))
            except Exception:  # the outer edge: whatever it is, the next answer has nothing to do with it
                logger.exception("an answer could not be scored again")
                self._tell(answer, "failed")

    async def _score(self, answer: ServedAnswer, reference: Lane, engine: Idle) -> tuple[ShadowResult, Divergence | None]:
        if answer.lane not in self._lanes().values():
            return "switched", None
        if reference.withdrawn is not None:
            return "no_reference", None
        places = answer.places(self._config.max_positions)
        parts = self._timed(diverging(self._runner, reference, answer.lane, answer.tokens, places, answer.total_tokens))
        width = self._model.config.hidden_size * self._model.dtype.itemsize
        needed = reading_bytes(reference, answer.lane, len(answer.tokens), len(places), width)
        if not self._ledger.lend(Loan(needed, self._spared, partial(engine.give_up, parts))):
            return "no_memory", None
        try:
            found = await engine.beside(parts, is_patient=True)
        finally:
            self._ledger.settle()
        if found is None:
            return "gave_way", None
        return ("scored", found) if all(map(math.isfinite, found.nats)) else ("undefined", None)

    def _timed(self, parts: Generator[None, None, T]) -> Generator[None, None, T]:
        """The same, its time booked. An accelerator ends a part before the next begins: no request queues behind many."""
        while True:
            start = time.perf_counter()
            try:
                next(parts)
                if self._model.device.type == "cuda":
                    torch.cuda.synchronize(self._model.device)
            except StopIteration as end:
                value: T = end.value
                return value
            finally:
                self._seconds += time.perf_counter() - start
            yield
