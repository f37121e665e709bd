"""The engine: requests go in, deltas and embeddings come out. An event loop and one model thread; no HTTP, no Ray.

The loop of `_serve` is the whole of it: schedule, run, settle. The event loop owns all state between steps, the model thread
during one; so nothing needs a lock. Each step costs one hop to the model thread and back, about 0.1 ms.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from attention import AttentionBackend
from service.config import EngineConfig
from service.engine import admission, forecast
from service.engine.admission import Backends, Plan, Route
from service.engine.answer import Answer
from service.engine.job import Job, Sequence
from service.engine.memory import Ledger, available_bytes, budget_bytes, is_out_of_memory, trim, warm_up
from service.engine.observer import NullObserver, Observer, Outcome, Step
from service.engine.request import (
    DeadlineExceeded,
    Delta,
    Draining,
    Embedding,
    FinishReason,
    ModelFailed,
    OutOfMemory,
    QueueFull,
    Request,
    RequestError,
)
from service.engine.runner import Runner, row_multiple
from service.engine.sampling import Drawn
from service.engine.scheduler import Scheduler, Work
from service.engine.team import give_team_its_cpus
from service.engine.text import Settled
from service.model.tokenizer import Tokenizer
from service.model.transformer import Transformer

__all__ = ["Answer", "Backends", "Engine", "Plan", "Snapshot"]

T = TypeVar("T")
log = logging.getLogger(__name__)

STREAM_SLICES = 10  # slices after which a decode step gives way too: most end before, and a pause within one delays its streams
REST_SECONDS = 1.0  # with nothing to do for so long, free heap goes back to the system


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
    row_multiple: int | None  # None: answers may differ in the last bits by what shares the batch
    last_progress: float  # time.monotonic() of the last finished step, or now when there is nothing to do


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
    ) -> None:
        """Nothing runs before `start`. `cpus`: those that only this engine's model thread and its workers are to use."""
        self._model = model
        self._tokenizer = tokenizer
        self._backends = backends
        self._config = config
        self._observer = observer or NullObserver()
        self._cpus = sorted(cpus)
        self._routes: dict[str, Route] = {}
        self._is_draining = False
        self._is_dead = False
        self._lost: list[tuple[Job, Outcome, RequestError | None]] = []  # to be ended before the next step
        self._last_progress = time.monotonic()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None

    # ---- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the model thread, measure every backend's pace, and serve.

        Raises:
            ValueError: the weights leave no memory to serve with, or less than the configured budget.
        """
        available = available_bytes(self._model.device)
        self._ledger = Ledger(budget_bytes(self._config.memory_budget_bytes, self._config.memory_share, available))
        threads = torch.get_num_threads()
        give = partial(give_team_its_cpus, threads, self._cpus)
        self._thread = ThreadPoolExecutor(1, "longserve-model", initializer=give)
        await self._on_model_thread(warm_up)
        self._pace = await self._on_model_thread(lambda: forecast.measure_model(self._model))
        self._rows = await self._on_model_thread(lambda: row_multiple(self._model))
        self._routes = await self._built(self._backends)
        self._runner = Runner(self._model, self._rows, self._config.memory_sample_every)
        self._scheduler = Scheduler(self._config, self._ledger, can_pack=self._rows is not None)
        self._serving = asyncio.create_task(self._serve())
        self._serving.add_done_callback(self._died)

    async def stop(self) -> None:
        """End at once: what runs or waits fails with Draining. Idempotent."""
        await self.drain(0)
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
            self._serving = None
            self._thread.shutdown()

    async def drain(self, cap_seconds: float) -> None:
        """Admit nothing more, finish what was accepted within the cap, tell the rest Draining."""
        self._is_draining = True
        if self._serving is None:
            return
        try:
            await asyncio.wait_for(self._when_idle(), cap_seconds)
        except TimeoutError:
            for job in self._jobs():
                self._lose(job, "draining", Draining("the service is stopping; send the request again elsewhere"))
            await self._when_idle()

    async def swap(self, backends: Backends) -> None:
        """Put another allow-list in force for new requests. Requests in flight keep their backend."""
        self._routes = await self._built(backends)
        self._backends = backends

    @property
    def backends(self) -> Backends:
        """The allow-list in force."""
        return self._backends

    # ---- requests ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Answer:
        """Accept a request, or raise its refusal here and now.

        The engine keeps the request, and turns its tokens into a compact array.

        Raises:
            InvalidRequest, UnknownBackend, ContextTooLong, NeverFits: it can never run.
            QueueFull, Draining, DeadlineExceeded: not now.
        """
        try:
            route, why = self._admit(request)
        except RequestError as error:
            self._observer.refused(request, error.code)
            raise
        answer = Answer(lambda: self._lose(job, "cancelled", None))
        job = Job.create(request, route, admission.need(request, route), answer, self._tokenizer)
        timings = request.timings
        timings.queued_at, timings.backend, timings.why = time.monotonic(), route.name, why
        timings.prompt_tokens, timings.peak_bytes = len(job.prompt), job.need.total
        self._scheduler.waiting.append(job)
        self._idle.clear()
        self._wake.set()
        return answer

    def plan(self, request: Request) -> Plan:
        """What the request would cost and whether it would be admitted now. Raises InvalidRequest, UnknownBackend."""
        admission.check(request, self._vocab_size, self._max_length, self._config.max_sequences)
        route, why = admission.choose(request, self._routes, self._backends.default, self._ledger.budget)
        need, budget = admission.need(request, route), self._ledger.budget
        total = admission.total_tokens(request)
        reason = "memory_budget_exceeded" if need.total > budget else "draining" if self._is_draining else None
        reason = reason or ("queue_full" if self._is_full(len(request.tokens)) else None)
        runs = self._ledger.fits(need.total) and not self._scheduler.waiting
        prefill = route.course.seconds(len(request.tokens))
        return Plan(
            backend=route.name,
            why=why,
            prompt_tokens=len(request.tokens),
            total_tokens=total,
            terms=need.terms,
            needed_bytes=need.total,
            budget_bytes=budget,
            free_bytes=self._ledger.free,
            verdict="refused" if reason else "runs" if runs else "queues",
            reason=reason,
            longest_tokens=admission.longest_tokens(request, route, budget, self._max_length),
            backends_that_fit=admission.fitting(request, self._routes.values(), budget),
            predicted_seconds={
                "queue": self._work_in_front(),
                "prefill": prefill,
                "decode": admission.predicted_seconds(request, route) - prefill,
            },
        )

    def snapshot(self) -> Snapshot:
        """The levels now. Safe from any thread."""
        running, waiting = list(self._scheduler.running), list(self._scheduler.waiting)
        routes = {*self._routes.values(), *(job.route for job in running)}
        names = sorted({route.name for route in routes})
        return Snapshot(
            running=sum(sequence.slot is not None for job in running for sequence in job.sequences),
            waiting=len(waiting),
            waiting_tokens=sum(len(job.prompt) for job in waiting),
            bytes_in_use=self._ledger.in_use,
            budget_bytes=self._ledger.budget,
            pool_bytes={name: sum(r.pool.bytes_in_use for r in routes if r.name == name) for name in names},
            pool_slots={name: sum(len(r.pool) for r in routes if r.name == name) for name in names},
            draining=self._is_draining,
            row_multiple=self._rows,
            last_progress=self._last_progress if running or waiting or self._is_dead else time.monotonic(),
        )

    # ---- admission --------------------------------------------------------------------------------------------------

    @property
    def _vocab_size(self) -> int:
        return self._model.config.vocab_size

    @property
    def _max_length(self) -> int:
        return self._model.config.max_position_embeddings

    def _admit(self, request: Request) -> tuple[Route, str]:
        """The request's backend and why, or its refusal."""
        if self._is_draining or self._serving is None:
            raise Draining("the service is stopping and admits nothing more")
        if request.deadline is not None and request.deadline <= time.monotonic():
            raise DeadlineExceeded("the deadline had passed before the request came")
        admission.check(request, self._vocab_size, self._max_length, self._config.max_sequences)
        route, why = admission.choose(request, self._routes, self._backends.default, self._ledger.budget)
        if admission.need(request, route).total > self._ledger.budget:
            raise admission.refuse(self.plan(request))
        if self._is_full(len(request.tokens)):
            seconds = self._work_in_front()
            waiting = len(self._scheduler.waiting)
            raise QueueFull(f"the queue is full with {waiting} requests; try again in about {seconds:.0f} s", seconds)
        return route, why

    def _is_full(self, tokens: int) -> bool:
        """Whether the queue cannot take a prompt of so many tokens. An empty queue takes any."""
        waiting = self._scheduler.waiting
        queued = sum(len(job.prompt) for job in waiting)
        too_many = len(waiting) >= self._config.max_waiting_requests
        return too_many or bool(waiting and queued + tokens > self._config.max_waiting_tokens)

    def _work_in_front(self) -> float:
        """Predicted seconds until all that runs or waits is done: prefills one by one, decodes side by side."""
        jobs = self._jobs()
        prefill = sum(job.remaining_seconds for job in jobs)
        decode = max((job.remaining_tokens * job.route.course.decode_seconds(len(job.prompt)) for job in jobs), default=0.0)
        return prefill + decode

    async def _built(self, backends: Backends) -> dict[str, Route]:
        """A route for every backend; those that serve already keep theirs."""
        routes = {route.name: route for route in self._routes.values() if backends.by_name.get(route.name) is route.backend}
        for name in backends.names:
            if name not in routes:
                routes[name] = await self._on_model_thread(partial(self._route, name, backends.by_name[name]))
        return {name: routes[name] for name in backends.names}

    def _route(self, name: str, backend: AttentionBackend) -> Route:
        layers = self._model.config.num_hidden_layers
        pace = forecast.Pace(layers, self._pace, forecast.measure_attention(backend, self._max_length), backend)
        course = forecast.Course(self._model, pace, self._max_length, self._config.chunk_tokens)
        return Route(name, backend, course, backend.new_pool(layers, self._ledger.budget))

    # ---- the loop ---------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Schedule, run, settle, until cancelled."""
        while True:
            self._expire()
            self._sweep()
            work = self._scheduler.next(time.monotonic())
            if work is None:
                await self._rest()
                continue
            await self._run(work)
            self._last_progress = time.monotonic()

    async def _run(self, work: Work) -> None:
        """One step, or one slice of it; then what follows from it."""
        for member in work.members:
            timings = member.sequence.job.request.timings
            timings.admitted_at = timings.admitted_at or time.monotonic()
        slices = STREAM_SLICES if work.kind == "decode" else 1
        limit = time.perf_counter() + slices * self._config.slice_seconds
        before = work.seconds

        def gives_way() -> bool:
            return time.perf_counter() > limit and (bool(self._lost) or self._scheduler.has_other_work(work))

        try:
            is_over = await self._on_model_thread(lambda: self._runner.run(work, gives_way))
        except Exception as error:  # the outer edge: whatever a model call raises concerns its own requests only
            self._fault(work, error)
            return
        self._scheduler.account(work, work.seconds - before)
        if is_over:
            self._settle(work)
        else:
            self._scheduler.pause(work)

    async def _rest(self) -> None:
        """Wait for a request; give free heap back when none comes."""
        assert not self._jobs(), "requests wait, but none can be scheduled"
        self._idle.set()
        self._wake.clear()
        try:
            await asyncio.wait_for(self._wake.wait(), REST_SECONDS)
        except TimeoutError:
            await self._on_model_thread(trim)
            await self._wake.wait()

    async def _on_model_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def _when_idle(self) -> None:
        while self._jobs():
            self._idle.clear()
            self._wake.set()
            await self._idle.wait()

    def _jobs(self) -> list[Job]:
        return [*self._scheduler.running, *self._scheduler.waiting]

    # ---- what follows from a step -----------------------------------------------------------------------------------

    def _settle(self, work: Work) -> None:
        """Book a finished step: move its sequences on, hand out what was drawn, tell the observer."""
        now = time.monotonic()
        for member in work.members:
            sequence, timings = member.sequence, member.sequence.job.request.timings
            sequence.past, sequence.is_held = member.end, False
            timings.batch_mates = max(timings.batch_mates, len(work.members) - 1)
            if work.kind != "decode":
                timings.prefill_chunks += 1
                self._settle_prefill(sequence, now)
        for sequence, drawn in work.drawn:
            self._hand_out(sequence, drawn, now)
        self._observer.stepped(_step(work))

    def _settle_prefill(self, sequence: Sequence, now: float) -> None:
        """What follows from a chunk: the end of the prompt, of an embedding, of a request for no tokens."""
        job, timings = sequence.job, sequence.job.request.timings
        if sequence.past < sequence.length:
            return
        sequence.is_alone = False
        if timings.prefilled_at is None:
            timings.prefilled_at = now
        if job.is_embedding:
            job.answer.put(Embedding(job.vector()))
            self._end(job, "embedded")
            return
        job.sequences, job.siblings = job.sequences + job.siblings, []
        if job.request.sampling.max_tokens == 0:
            for each in job.sequences:
                self._finish(each, "length", each.text.flush())

    def _hand_out(self, sequence: Sequence, drawn: Drawn, now: float) -> None:
        """Add a drawn token to its sample and hand out what it settles."""
        sampling, timings = sequence.job.request.sampling, sequence.job.request.timings
        timings.output_tokens += 1
        timings.token_times.append(now)
        timings.first_token_at = timings.first_token_at or now
        sequence.output.append(drawn.token)
        if drawn.token in self._model.config.eos_token_ids and not sampling.ignore_eos:
            self._finish(sequence, "stop", sequence.text.flush())
            return
        settled = sequence.text.push(drawn.token, drawn.logprob)
        if settled.stopped:
            self._finish(sequence, "stop", settled)
        elif len(sequence.output) == sampling.max_tokens:
            self._finish(sequence, "length", _joined(settled, sequence.text.flush()))
        elif settled.text:
            self._emit(sequence, settled, None)

    def _finish(self, sequence: Sequence, reason: FinishReason, settled: Settled) -> None:
        """End a sample, and its job with the last of them."""
        self._emit(sequence, settled, reason)
        sequence.is_done = True
        sequence.free()
        job = sequence.job
        if all(each.is_done for each in (*job.sequences, *job.siblings)):
            self._end(job, reason)

    def _emit(self, sequence: Sequence, settled: Settled, reason: FinishReason | None) -> None:
        """Hand a delta out; the first of a sample that echoes carries the prompt."""
        job, sampling = sequence.job, sequence.job.request.sampling
        text, tokens, logprobs = settled.text, settled.tokens, settled.logprobs
        if sampling.echo and not sequence.is_opened:
            own = slice(job.request.leading, None)
            text, tokens = sequence.echoed + text, (*job.prompt[own], *tokens)
            logprobs = (*job.prompt_logprobs[own], *logprobs)
        sequence.is_opened = True
        told = logprobs if sampling.logprobs is not None else None
        job.answer.put(Delta(sequence.index, text, tokens, told, reason))

    def _end(self, job: Job, outcome: Outcome, error: RequestError | None = None) -> None:
        """The one way out: give everything back, tell the caller and the observer."""
        for sequence in (*job.sequences, *job.siblings):
            sequence.is_done = True
            sequence.free()
        self._scheduler.remove(job)
        job.request.timings.finished_at = time.monotonic()
        job.answer.end(error)
        self._observer.finished(job.request, outcome)

    # ---- what goes wrong --------------------------------------------------------------------------------------------

    def _fault(self, work: Work, error: Exception) -> None:
        """A step failed: alone, its request fails; in company, each member is run again from its beginning, alone."""
        jobs = {member.sequence.job for member in work.members}
        if len(work.members) > 1:
            log.warning("a step of %d sequences failed and is split: %r", len(work.members), error)
            for member in work.members:
                member.sequence.rewind()
            return
        for job in jobs:
            log.error("request %s failed", job.request.id, exc_info=error)
            for sequence in (*job.sequences, *job.siblings):
                sequence.is_held = False
            if is_out_of_memory(error):
                message = "the machine refused the memory for this request"
                self._end(job, "out_of_memory", OutOfMemory(message, details={"reserved_bytes": job.need.total}))
            else:
                self._end(job, "model_failed", ModelFailed("the model failed on this request"))

    def _died(self, task: asyncio.Task[None]) -> None:
        """The loop itself failed, which is a bug: tell everybody, and let the health check see no more progress."""
        if task.cancelled():
            return
        log.critical("the engine's loop failed", exc_info=task.exception())
        self._is_draining, self._is_dead, self._last_progress = True, True, float("-inf")
        for job in self._jobs():
            self._end(job, "model_failed", ModelFailed("the engine failed"))
        self._idle.set()

    def _lose(self, job: Job, outcome: Outcome, error: RequestError | None) -> None:
        """Mark a job as one that must end; it does before the next step."""
        self._lost.append((job, outcome, error))
        self._wake.set()

    def _expire(self) -> None:
        """Mark the jobs whose deadline has passed."""
        now = time.monotonic()
        for job in self._jobs():
            if job.request.deadline is not None and job.request.deadline <= now:
                self._lose(job, "deadline_exceeded", DeadlineExceeded("the deadline passed before the answer was complete"))

    def _sweep(self) -> None:
        """End the marked jobs. One whose step is paused with others' waits for that step's end."""
        lost, self._lost = self._lost, []
        alive = set(self._jobs())
        doomed = {job: (job, outcome, error) for job, outcome, error in reversed(lost) if job in alive}
        for work in list(self._scheduler.paused):
            if all(member.sequence.job in doomed for member in work.members):
                self._scheduler.paused.remove(work)
            else:
                for member in work.members:
                    kept = doomed.pop(member.sequence.job, None)
                    self._lost += [kept] if kept else []
        for job, outcome, error in doomed.values():
            self._end(job, outcome, error)


def _joined(first: Settled, rest: Settled) -> Settled:
    return Settled(first.text + rest.text, first.tokens + rest.tokens, first.logprobs + rest.logprobs, first.stopped)


def _step(work: Work) -> Step:
    gauge = work.gauge
    return Step(
        kind=work.kind,
        backend=work.route.name,
        tokens=work.tokens,
        sequences=len(work.members),
        seconds=work.seconds,
        predicted_seconds=work.predicted_seconds,
        predicted_bytes=work.predicted_bytes,
        measured_bytes=None if gauge is None else gauge.peak_bytes,
        method="dispatch" if gauge is None else gauge.method,
    )
