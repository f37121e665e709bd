"""The engine: requests go in, deltas and embeddings come out. An event loop and one model thread; no HTTP, no Ray.

Its life, its door and its levels are here; what goes on between is in `loop.py`.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Collection, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import torch

from attention import AttentionBackend, gather_team, truth
from service.config import EngineConfig
from service.engine import reread
from service.engine.admission import Admission, Ledger, Offer, Plan
from service.engine.ahead import Ahead
from service.engine.allowlist import GUESSED, NO_LOOKUP, Backends, Lane, check_room, lane_for, lines_of, unmeasured
from service.engine.answer import Answer
from service.engine.delivery import Delivery, attempt
from service.engine.departures import Departures
from service.engine.forecast import Ramp, measure_model, row_multiple
from service.engine.grammar import Grammar, Grammars
from service.engine.job import Job
from service.engine.loop import Loop
from service.engine.observer import NullObserver, Observer, Snapshot
from service.engine.pins import Pin
from service.engine.prefixes import Prefixes
from service.engine.profile import Profile
from service.engine.request import Constraint, Draining, InvalidRequest, Request, RequestError
from service.engine.runner import LOGIT_ROWS, Runner
from service.engine.scheduler import Scheduler
from service.engine.shadow import Shadow
from service.machine import available_bytes, budget_bytes
from service.model.tokenizer import Tokenizer
from service.model.transformer import Transformer
from service.threads import give_team_its_cpus

__all__ = ["Answer", "Backends", "Engine", "Plan", "Profile", "Snapshot"]

T = TypeVar("T")
logger = logging.getLogger(__name__)

REST = 2.0  # times a slice of what runs beside requests, for them: a part may take some 50 ms, an answer many steps


class Engine:
    """Serves one model under the backends of an allow-list."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        backends: Backends,
        config: EngineConfig,
        observer: Observer | None = None,
        cpus: Collection[int] = (),
        profile: Profile | None = None,
    ) -> None:
        """Nothing runs before `start`.

        Args:
            cpus: those that only this engine's model thread and its workers are to use.
            profile: the pace as an earlier engine has measured it here, if one has.
        """
        self._model = model
        self._tokenizer = tokenizer
        self._backends = backends
        self._config = config
        self._observer = observer or NullObserver()
        self._cpus = sorted(cpus)
        self._profile = profile or Profile()
        self._serving: asyncio.Task[None] | None = None
        self._shadowing: asyncio.Task[None] | None = None

    # ---- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the model thread, measure every backend's pace, and serve.

        Raises:
            ValueError: the weights leave no memory to serve with, or less than the configured budget; or the config's reference
                of answers cannot be one.
        """
        model, config = self._model, self._config
        available = available_bytes(model.device)
        self._ledger = Ledger(budget_bytes(config.memory_budget_bytes, config.memory_share, available))
        give = partial(give_team_its_cpus, torch.get_num_threads(), self._cpus, gather_team)
        self._thread = ThreadPoolExecutor(1, "longserve-model", initializer=give)
        rows, logit_rows = max(config.chunk_tokens, config.max_sequences), max(LOGIT_ROWS, config.max_sequences)
        await self._on_model_thread(lambda: model.warm_up(rows, logit_rows))
        self._paces = await self._on_model_thread(lambda: _paces_of(model, self._profile, config.prompt_lookup.tokens > 0))
        self._rows = await self._on_model_thread(lambda: row_multiple(model))
        prefixes = Prefixes(self._ledger, config.chunk_tokens, config.prefix_share, config.prefix_shared, model.border)
        self._prefixes = prefixes
        self._scheduler = Scheduler(config, self._ledger, self._rows is not None, prefixes)
        self._loop = Loop(config, self._on_model_thread, self._scheduler, prefixes)
        known = np.isin(np.arange(model.config.vocab_size), list(self._tokenizer.ids))
        longest = model.config.max_length
        self._admission = Admission(
            known, longest, config.max_sequences, self._ledger, self._scheduler, self._cached, model.config.tasks
        )
        await self.swap(self._backends)
        self._grammars = Grammars(self._tokenizer, model.config.vocab_size, model.config.eos_token_ids)
        unknown = torch.from_numpy(np.flatnonzero(~known))
        share = config.memory_sample_share
        self._runner = await self._on_model_thread(lambda: Runner(model, unknown, self._rows, share, prefixes))
        self._shadow = Shadow(
            config.shadow, model, self._runner, self._ledger, prefixes.limit, self._observer, lambda: self._admission.lanes
        )
        if config.shadow.share and model.config.is_causal:
            reference = await self.beside(self._shadow.find_reference(config.chunk_tokens))
            self._shadowing = asyncio.create_task(self._shadow.run(self, reference))
        self._delivery = Delivery(self._scheduler, self._runner, self._observer, model.config.eos_token_ids, self._shadow)
        self._departures = Departures(self._scheduler, self._delivery, self._loop.wake.set)
        self._serving = asyncio.create_task(self._loop.run(self._runner, self._delivery, self._departures))
        self._serving.add_done_callback(self._died)

    async def stop(self) -> None:
        """End at once: what runs or waits fails with Draining. Idempotent."""
        if self._shadowing is not None:
            self._shadowing.cancel()
            await asyncio.gather(self._shadowing, return_exceptions=True)
        await self.drain(0)
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
            self._serving = None
            self._thread.shutdown()

    async def drain(self, cap_seconds: float) -> None:
        """Admit nothing more, finish what was accepted within the cap, tell the rest Draining."""
        if self._serving is None:
            return
        self._admission.is_closed = True
        try:
            async with asyncio.timeout(cap_seconds):
                await self.when_idle()
        except TimeoutError:
            for job in self._scheduler.jobs:
                error = Draining("the service is stopping; send the request again elsewhere")
                self._departures.mark(job, "draining", error)
            await self.when_idle()

    async def swap(self, backends: Backends) -> None:
        """Put another allow-list in force for new requests. Requests in flight keep their backend."""
        self._admission.lanes = await self._opened(backends)
        self._admission.rules = backends
        self._backends = backends
        lanes = self._prefixes.lanes = frozenset(self._admission.lanes.values())
        self._prefixes.forget(lambda kept: kept.lane not in lanes)
        self._loop.wake.set()  # at rest, what the former ones leave free goes back to the system

    async def _opened(self, backends: Backends) -> dict[str, Lane]:
        """A lane for every backend; those that serve already keep theirs."""
        lanes = dict(self._admission.lanes)
        for name, backend in backends.by_name.items():
            if name not in lanes or lanes[name].backend is not backend:
                lanes[name] = await self.beside(self._lane_for(name, backend))
        return {name: lanes[name] for name in backends.names}

    def _lane_for(self, name: str, backend: AttentionBackend) -> Generator[None, None, Lane]:
        chunk, budget = self._config.chunk_tokens, self._ledger.budget
        # A guess is looked over beside others' rows: nothing is guessed where those would change its last bits
        lookup = self._config.prompt_lookup if self._rows is not None else NO_LOOKUP
        return lane_for(name, backend, self._model, self._paces, self._profile, chunk, budget, lookup)

    def check_room(self, backend: AttentionBackend) -> None:
        """Raise ValueError for a backend under which the budget does not hold even the shortest request."""
        budget = self._ledger.budget
        check_room(unmeasured(backend.name, backend, self._model, self._config.chunk_tokens, budget), budget)

    async def check_served(self, backend: AttentionBackend) -> truth.Truth | None:
        """Whether a backend answers as it is defined on the tail of what was served last; None where nothing was served yet."""
        if not (tokens := self._delivery.tail):
            return None
        model = self._model
        lane = unmeasured(backend.name, backend, model, self._config.chunk_tokens, sys.maxsize)
        return await self.beside(reread.checking(self._runner, lane, tokens, model.config.is_causal))

    async def beside(self, parts: Generator[None, None, T], is_patient: bool = False) -> T:
        """What a computation in parts returns, run on the model thread at the mercy of requests: a slice between two steps.

        While requests are there, it leaves them the thread for REST times as long as each slice took; `is_patient`: altogether.
        """
        while True:
            if is_patient:
                await self.when_idle()
            ended, value, seconds = await self._on_model_thread(lambda: _slice(parts, self._config.slice_seconds))
            if ended:
                self._loop.wake.set()  # at rest, what it leaves free goes back to the system
                return cast(T, value)
            if self._scheduler.jobs and not is_patient:
                await asyncio.sleep(REST * seconds)

    def give_up(self, parts: Generator[None, None, T]) -> None:
        """End a computation in parts before the next step: whoever waits for what it returns gets None."""
        self._thread.submit(attempt, parts.close)

    # ---- requests ---------------------------------------------------------------------------------------------------

    @property
    def backends(self) -> Backends:
        """The allow-list in force."""
        return self._backends

    def check_together(self, requests: Sequence[Request]) -> None:
        """Raise InvalidRequest for prompts of one call that the queue would not take, however often it is asked."""
        if limit := self._scheduler.why_never([len(each.tokens) for each in requests]):
            raise InvalidRequest(f"{limit}: send them in several calls", param=requests[0].param)

    def submit(self, request: Request) -> Answer:
        """Accept a request, or raise its refusal here and now. Of its tokens the engine keeps an array of its own.

        Raises:
            InvalidRequest, UnknownBackend, ContextTooLong, NeverFits: it can never run.
            QueueFull, Draining, DeadlineExceeded, Withdrawn: not now.
        """
        try:
            offer = self._admission.admit(request)
        except RequestError as error:
            attempt(partial(self._observer.refused, request, error.code))
            raise
        answer = Answer(lambda: self._departures.mark(job, "cancelled", None))
        job = Job.create(request, offer, answer, self._tokenizer)
        job.marks = self._prefixes.marks(request, offer.prompt)
        if not self._scheduler.jobs:
            self._loop.last_progress = time.monotonic()  # the hours at rest are no standstill
        self._scheduler.take_in(job)
        self._loop.idle.clear()
        self._loop.wake.set()
        return answer

    def plan(self, request: Request) -> Plan:
        """What the request would cost and whether it would be admitted now. Raises InvalidRequest and its kinds, Withdrawn."""
        return self._admission.plan(request)

    def grammar(self, form: Constraint) -> Grammar:
        """The grammar of a form, for `Sampling`. Takes milliseconds, the first time up to seconds; from any thread.

        Raises InvalidRequest for a form that is none, or is beyond the limits.
        """
        return self._grammars.of(form)

    def pin(self, request: Request, seconds: float) -> tuple[Pin, Request]:
        """A pin of the whole chunks that a prompt begins with, and the request to submit so that their state is kept.

        Raises:
            InvalidRequest, UnknownBackend: no such state can be.
            NeverFits, PrefixNotKept: it would not fit beside what is pinned.
        """
        offer = self._admission.offer(request)
        pin = self._prefixes.pin(request, offer.lane, offer.prompt, seconds)
        nothing = replace(request.sampling, max_tokens=0)
        return pin, replace(request, tokens=offer.prompt[: pin.tokens], backend=offer.lane.name, sampling=nothing, n=1)

    def begin_pin(self, pin: Pin, seconds: float) -> Pin:
        """The pin as it is from now on, for so many seconds: its text has been read."""
        return self._prefixes.pins.begin(pin, seconds)

    def unpin(self, pin: Pin) -> None:
        """End a pin, and let go of its state before the next step."""
        self._prefixes.unpin(pin)
        self._loop.wake.set()

    def pins(self, owner: str) -> dict[Pin, bool]:
        """An owner's pins, and whether the state of each is there now; everybody's where prefixes are shared."""
        current, is_shared = self._prefixes.pins.current(), self._config.prefix_shared
        return {pin: self._prefixes.is_kept(pin.lane, pin.mark) for pin in current if is_shared or pin.owner == owner}

    @property
    def keeps_prefixes(self) -> bool:
        """Whether states of prompts' beginnings are kept for the next."""
        return self._prefixes.limit > 0

    @property
    def has_pins(self) -> bool:
        """Whether anybody has pinned a prefix."""
        return bool(self._prefixes.pins.current())

    def withdraw(self, name: str, reason: str | None) -> None:
        """Answer nothing more under a backend of the allow-list, and end what runs under it; None: it serves again."""
        lane = self._admission.lanes[name]
        lane.withdrawn = reason
        for job in self._scheduler.jobs:
            if reason is not None and job.lane is lane:
                self._departures.mark(job, "withdrawn", lane.refusal())

    @property
    def withdrawn(self) -> dict[str, str]:
        """Backends of the allow-list under which nothing is answered, and why."""
        return {name: lane.withdrawn for name, lane in self._admission.lanes.items() if lane.withdrawn is not None}

    async def when_idle(self) -> None:
        """Return when nothing runs or waits."""
        while self._scheduler.jobs:
            self._loop.idle.clear()
            self._loop.wake.set()
            await self._loop.idle.wait()

    def forget_prefixes(self) -> None:
        """Let go of all prefixes that are kept, before the next step."""
        self._prefixes.forget(lambda kept: True)
        self._loop.wake.set()

    def _cached(self, request: Request, offer: Offer) -> int:
        """Tokens of a prompt whose state is kept now."""
        found = self._prefixes.find(offer.lane, self._prefixes.marks(request, offer.prompt), len(offer.prompt))
        return 0 if found is None else found.tokens

    def snapshot(self) -> Snapshot:
        """The levels now. Safe from any thread."""
        running, waiting = list(self._scheduler.running), list(self._scheduler.waiting)
        lanes = {*self._admission.lanes.values(), *(job.lane for job in running)}
        names, now = sorted({lane.name for lane in lanes}), time.monotonic()
        return Snapshot(
            running=sum(sequence.slot is not None for job in running for sequence in job.sequences),
            waiting=len(waiting),
            waiting_tokens=sum(len(job.prompt) for job in waiting),
            oldest_seconds=max((now - (job.request.timings.queued_at or now) for job in waiting), default=0.0),
            promised_tokens=sum(job.request.n * job.max_length for job in running),
            bytes_in_use=self._ledger.in_use,
            budget_bytes=self._ledger.budget,
            pool_bytes={name: sum(each.bytes_in_use for each in lanes if each.name == name) for name in names},
            pool_slots={name: sum(each.num_slots for each in lanes if each.name == name) for name in names},
            prefix_bytes={name: sum(each.kept.bytes_in_use for each in lanes if each.name == name) for name in names},
            withdrawn={name: lane.withdrawn is not None for name, lane in self._admission.lanes.items()},
            prefix_hits=self._prefixes.hits,
            prefix_misses=self._prefixes.misses,
            prefix_evictions=self._prefixes.evictions,
            draining=self._admission.is_closed,
            row_multiple=self._rows,
            busy_seconds=self._runner.busy_seconds,
            cpu_starved_ratio=self._runner.starvation.ratio,
            measuring_seconds=self._runner.measuring_seconds,
            shadow=self._shadow.levels(),
            last_progress=self._loop.last_progress if running or waiting or self._loop.is_dead else now,
        )

    def ahead(self) -> dict[str, Ahead]:
        """What is still to be done, by call, see `Scheduler.ahead`."""
        return self._scheduler.ahead()

    def token_seconds(self) -> float:
        """Predicted, to read a token of a prompt, see `Admission.token_seconds`."""
        return self._admission.token_seconds()

    def laws(self) -> dict[str, Any]:
        """What is predicted by, as plain data: whoever has it and the model's config predicts the same (service/capacity).

        Straight lines are (seconds, seconds for each more), see `forecast.Ramp`: `model` over a prompt's tokens and over rows
        of a decode step, those of a backend over one layer's flops as `lines_of` has them. `drift`: times as long that steps of
        a kind lately took. `packs`: prompts may share a step.
        """
        lanes = self._admission.lanes.values()
        backends = {
            each.name: {"lines": [(r.fixed, r.slope) for r in lines_of(each)], "drift": each.drift.now()} for each in lanes
        }
        return {"model": [(r.fixed, r.slope) for r in self._paces], "packs": self._rows is not None, "backends": backends}

    def _died(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._admission.is_closed = True
            self._loop.died(task.exception())

    async def _on_model_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)


def _paces_of(model: Transformer, profile: Profile, has_guesses: bool) -> tuple[Ramp, Ramp]:
    """The model's own pace: the profile's, else measured and kept there."""
    key = "model" + GUESSED * has_guesses
    if (kept := profile.recall(key, 2)) is None:
        kept = [*measure_model(model, has_guesses)]
        profile.keep(key, kept)
    return kept[0], kept[1]


def _slice(parts: Generator[None, None, T], limit: float) -> tuple[bool, T | None, float]:
    """Run parts for `limit` seconds, one at least. Returns whether that was all, then what they return, and the seconds."""
    start, seconds = time.perf_counter(), 0.0
    while seconds <= limit:
        try:
            next(parts)
        except StopIteration as end:
            return True, end.value, seconds
        seconds = time.perf_counter() - start
    return False, None, seconds
