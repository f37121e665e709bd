"""The engine: requests go in, deltas and embeddings come out. An event loop and one model thread; no HTTP, no Ray.

`_step` is the whole of it: schedule, run, settle. The event loop owns all state between steps, the model thread during one; so
nothing needs a lock. Each step costs one hop to the model thread and back, about 0.1 ms.

Whatever fails concerns one request, and is caught where that request is known: in a step of the model, while its answer is
settled, while the scheduler looks at it. The loop goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from attention import AttentionBackend
from service.config import EngineConfig
from service.engine import admission, forecast
from service.engine.admission import Backends, Plan, Route
from service.engine.answer import Answer
from service.engine.job import Job, Sequence
from service.engine.memory import Ledger, available_bytes, budget_bytes, is_out_of_memory, trim
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
from service.engine.runner import LOGIT_ROWS, Runner, row_multiple
from service.engine.sampling import Drawn
from service.engine.scheduler import Scheduler, Work
from service.engine.team import give_team_its_cpus
from service.engine.text import Settled
from service.model.tokenizer import Tokenizer
from service.model.transformer import Transformer
from service.timing import Chunk

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
    oldest_seconds: float  # the longest that a request has waited in the queue so far
    promised_tokens: int  # most tokens, of prompts and answers, that the running requests may come to
    bytes_in_use: int  # reserved of the budget
    budget_bytes: int
    pool_bytes: Mapping[str, int]  # decode state by backend
    pool_slots: Mapping[str, int]
    draining: bool
    row_multiple: int | None  # None: answers may differ in the last bits by what shares the batch
    busy_seconds: float  # the model thread has computed for so long
    measuring_seconds: float  # of it on measuring memory
    last_progress: float  # time.monotonic() of the last finished step or of the first request's coming; now when there is none


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
        self._known = np.isin(np.arange(model.config.vocab_size), list(tokenizer.ids))
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
        rows, sequences = self._config.chunk_tokens, self._config.max_sequences
        await self._on_model_thread(lambda: self._model.warm_up(max(rows, sequences), max(LOGIT_ROWS, sequences)))
        self._pace = await self._on_model_thread(lambda: forecast.measure_model(self._model))
        self._rows = await self._on_model_thread(lambda: row_multiple(self._model))
        self._routes = await self._built(self._backends)
        unknown, share = torch.from_numpy(np.flatnonzero(~self._known)), self._config.memory_sample_share
        self._runner = await self._on_model_thread(lambda: Runner(self._model, unknown, self._rows, share))
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
        self._wake.set()  # at rest, what the former ones leave free goes back to the system

    @property
    def backends(self) -> Backends:
        """The allow-list in force."""
        return self._backends

    # ---- requests ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Answer:
        """Accept a request, or raise its refusal here and now.

        The engine keeps the request, and of its tokens a compact array.

        Raises:
            InvalidRequest, UnknownBackend, ContextTooLong, NeverFits: it can never run.
            QueueFull, Draining, DeadlineExceeded: not now.
        """
        try:
            route, why = self._admit(request)
        except RequestError as error:
            self._attempt(partial(self._observer.refused, request, error.code))
            raise
        answer = Answer(lambda: self._lose(job, "cancelled", None))
        job = Job.create(request, route, admission.need(request, route), answer, self._tokenizer)
        timings = request.timings
        timings.queued_at, timings.backend, timings.why = time.monotonic(), route.name, why
        timings.prompt_tokens, timings.reserved_bytes = len(job.prompt), job.need.total
        if not self._jobs():
            self._last_progress = timings.queued_at  # the hours at rest are no standstill
        self._scheduler.waiting.append(job)
        self._idle.clear()
        self._wake.set()
        return answer

    def plan(self, request: Request) -> Plan:
        """What the request would cost and whether it would be admitted now. Raises InvalidRequest, UnknownBackend."""
        admission.check(request, self._known, self._max_length, self._config.max_sequences)
        route, why = admission.choose(request, self._routes, self._backends.default, self._ledger.budget)
        need, budget = admission.need(request, route), self._ledger.budget
        total = admission.total_tokens(request)
        reason = "memory_budget_exceeded" if need.total > budget else "draining" if self._is_draining else None
        reason = reason or ("queue_full" if self._why_full(len(request.tokens)) else None)
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
        names, now = sorted({route.name for route in routes}), time.monotonic()
        return Snapshot(
            running=sum(sequence.slot is not None for job in running for sequence in job.sequences),
            waiting=len(waiting),
            waiting_tokens=sum(len(job.prompt) for job in waiting),
            oldest_seconds=max((now - (job.request.timings.queued_at or now) for job in waiting), default=0.0),
            promised_tokens=sum(job.request.n * job.max_length for job in running),
            bytes_in_use=self._ledger.in_use,
            budget_bytes=self._ledger.budget,
            pool_bytes={name: sum(r.pool.bytes_in_use for r in routes if r.name == name) for name in names},
            pool_slots={name: sum(len(r.pool) for r in routes if r.name == name) for name in names},
            draining=self._is_draining,
            row_multiple=self._rows,
            busy_seconds=self._runner.busy_seconds,
            measuring_seconds=self._runner.measuring_seconds,
            last_progress=self._last_progress if running or waiting or self._is_dead else now,
        )

    # ---- admission --------------------------------------------------------------------------------------------------

    @property
    def _max_length(self) -> int:
        return self._model.config.max_length

    def _admit(self, request: Request) -> tuple[Route, str]:
        """The request's backend and why, or its refusal."""
        if self._is_draining or self._serving is None:
            raise Draining("the service is stopping and admits nothing more")
        if request.deadline is not None and request.deadline <= time.monotonic():
            raise DeadlineExceeded("the deadline had passed before the request came")
        admission.check(request, self._known, self._max_length, self._config.max_sequences)
        route, why = admission.choose(request, self._routes, self._backends.default, self._ledger.budget)
        if admission.need(request, route).total > self._ledger.budget:
            raise admission.refuse(self.plan(request), request.param)
        if limit := self._why_full(len(request.tokens)):
            seconds = self._work_in_front()
            raise QueueFull(f"the queue is full: {limit}; try again in about {seconds:.0f} s", seconds)
        return route, why

    def _why_full(self, tokens: int) -> str | None:
        """The bound that keeps a prompt of so many tokens out of the queue; None: it may come in. An empty queue takes any."""
        waiting, most = self._scheduler.waiting, self._config.max_waiting_requests
        if len(waiting) >= most:
            return f"{len(waiting)} requests wait and at most {most} may"
        queued, most = sum(len(job.prompt) for job in waiting), self._config.max_waiting_tokens
        if waiting and queued + tokens > most:
            return f"{queued} tokens wait, at most {most} may, and this prompt has {tokens}"
        return None

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
        """Step after step, until cancelled."""
        while True:
            try:
                await self._step()
            except Exception as error:  # the outer edge: between steps too, a request must not end the loop
                self._blame(error)

    async def _step(self) -> None:
        """Schedule, run, settle."""
        self._expire()
        self._sweep()
        work = self._scheduler.next(time.monotonic())
        if work is None:
            await self._rest()
            return
        await self._run(work)
        self._last_progress = time.monotonic()

    async def _run(self, work: Work) -> None:
        """One step, or one slice of it; then what follows from it."""
        work.begun_at = work.begun_at or time.monotonic()
        for member in work.members:
            timings = member.sequence.job.request.timings
            timings.admitted_at = timings.admitted_at or work.begun_at
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
        self._attempt(lambda: self._book(work, now))  # before its sequences move on
        for member in work.members:
            member.sequence.past, member.sequence.is_held = member.end, False
        for member in work.members:
            job, timings = member.sequence.job, member.sequence.job.request.timings
            timings.batch_mates = max(timings.batch_mates, len(work.members) - 1)
            if work.kind != "decode" and not job.is_over:
                timings.chunks.append(Chunk(work.begun_at or now, now, member.end - member.start))
                with self._concerning(job):
                    self._settle_prefill(member.sequence, now)
        for sequence, drawn in work.drawn:
            if not sequence.is_done:  # with its job, which failed a moment ago
                with self._concerning(sequence.job):
                    self._hand_out(sequence, drawn, now)

    def _book(self, work: Work, now: float) -> None:
        """Tell the sampler and the observer of a finished step, as it ran."""
        self._runner.measured(work)
        self._observer.stepped(_told(work, [now - s.spoke_at for s, _ in work.drawn if s.spoke_at is not None]))

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
        job.join()
        if job.request.sampling.max_tokens == 0:
            for each in job.sequences:
                self._finish(each, "length", each.text.flush())

    def _hand_out(self, sequence: Sequence, drawn: Drawn, now: float) -> None:
        """Add a drawn token to its sample and hand out what it settles."""
        sampling, timings = sequence.job.request.sampling, sequence.job.request.timings
        timings.output_tokens += 1
        timings.first_token_at = timings.first_token_at or now
        sequence.spoke_at = now
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
        self._attempt(sequence.free)
        job = sequence.job
        if all(each.is_done for each in (*job.sequences, *job.siblings)):
            self._end(job, reason)

    def _emit(self, sequence: Sequence, settled: Settled, reason: FinishReason | None) -> None:
        """Hand a delta out; the first of a sample that echoes carries the prompt."""
        job, sampling = sequence.job, sequence.job.request.sampling
        text, tokens, logprobs = settled.text, array("i", settled.tokens), settled.logprobs
        if sampling.echo and not sequence.is_opened:
            own = slice(job.request.leading, None)
            text, tokens = job.echo.getvalue() + text, job.prompt[own] + tokens
            logprobs = (*job.prompt_logprobs[own], *logprobs)
        sequence.is_opened = True
        told = logprobs if sampling.logprobs is not None else None
        job.answer.put(Delta(sequence.index, text, tokens, told, reason))

    def _end(self, job: Job, outcome: Outcome, error: RequestError | None = None) -> None:
        """The one way out: give everything back, tell the caller and the observer. Never fails half-way; twice is once."""
        if job.is_over:
            return
        for sequence in job.close():
            self._attempt(sequence.free)
        self._attempt(partial(self._scheduler.remove, job))
        job.request.timings.finished_at = time.monotonic()
        job.answer.end(error)
        self._attempt(partial(self._observer.finished, job.request, outcome))

    # ---- what goes wrong --------------------------------------------------------------------------------------------

    def _fault(self, work: Work, error: Exception) -> None:
        """A step failed: alone, its request fails; in company, each member is run again from its beginning, alone."""
        if len(work.members) == 1:
            self._fail(work.members[0].sequence.job, error)
            return
        log.warning("a step of %d sequences failed and is split: %r", len(work.members), error)
        for member in work.members:
            with self._concerning(member.sequence.job):
                member.sequence.rewind()

    def _blame(self, error: Exception) -> None:
        """Something failed between the steps: the request that was being looked at fails; when there was none, all do."""
        suspect, jobs = self._scheduler.suspect, self._jobs()
        self._scheduler.suspect = None
        log.critical("the engine failed between its steps", exc_info=error)
        for job in [suspect] if suspect in jobs else jobs:
            self._fail(job, error)

    @contextmanager
    def _concerning(self, job: Job) -> Iterator[None]:
        """What fails within is a failure of this job, and of no other."""
        try:
            yield
        except Exception as error:  # whatever it is, others have nothing to do with it
            self._fail(job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        """End a job that something failed on."""
        log.error("request %s failed", job.request.id, exc_info=error)
        if is_out_of_memory(error):
            message = "the machine refused the memory for this request"
            self._end(job, "out_of_memory", OutOfMemory(message, details={"reserved_bytes": job.need.total}))
        else:
            self._end(job, "model_failed", ModelFailed("the model failed on this request"))

    def _attempt(self, call: Callable[[], None]) -> None:
        """Do what may fail without harm to any request, like telling an observer."""
        try:
            call()
        except Exception:  # whatever it is, the requests have nothing to do with it
            log.exception("the engine could not do its books")

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
            if job.deadline <= now:
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


def _told(work: Work, gaps: list[float]) -> Step:
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
        token_gaps=tuple(gaps),
    )
