"""The loop of an engine: step after step on the model thread, until cancelled. `_step` is the whole of it.

The event loop owns all state between steps, the model thread during one; so nothing needs a lock. A hop to the model thread
and back takes about 0.1 ms, as long as a small model's decode step. So the model thread goes on to the step that follows, from
what it has drawn itself (`Work.following`), while the event loop hands that out, for as long as nobody else wants the thread. A
state whose sample ends meanwhile is freed behind the last such step.

Whatever fails concerns one request, and is caught where that request is known: in a step of the model, while its answer is
settled, while the scheduler looks at it. The loop goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from service.config import EngineConfig
from service.engine.delivery import Delivery
from service.engine.departures import Departures
from service.engine.prefixes import Prefixes
from service.engine.request import ModelFailed
from service.engine.runner import Runner
from service.engine.scheduler import Scheduler
from service.engine.work import Work
from service.machine import trim

logger = logging.getLogger(__name__)

STREAM_SLICES = 10  # after which a decode step gives way too and none follows: most end before, and a pause delays its streams
REST_SECONDS = 1.0  # with nothing to do for so long, free heap goes back to the system
STARVED_RATIO = 0.2  # of the model thread's computing, from which that is worth a line in the log


class _Once:
    """Hands a step out at the first pause of the one that follows, which never gives way.

    That is when it is packed and about to compute: before, the two threads would only wait for each other's Python.
    """

    def __init__(self, hand_out: Callable[[], object]) -> None:
        self._hand_out: Callable[[], object] | None = hand_out

    def __call__(self) -> bool:
        hand_out, self._hand_out = self._hand_out, None
        if hand_out is not None:
            hand_out()
        return False


class Loop:
    """Schedules, runs and delivers for as long as it runs."""

    def __init__(
        self,
        config: EngineConfig,
        on_model_thread: Callable[[Callable[[], Any]], Awaitable[Any]],
        scheduler: Scheduler,
        prefixes: Prefixes,
    ) -> None:
        self.wake = asyncio.Event()  # there may be something to do
        self.idle = asyncio.Event()  # nothing runs or waits
        self.is_dead = False  # it failed itself, which is a bug
        self.last_progress = time.monotonic()  # when a step ended last, or the first request came
        self._config = config
        self._on_model_thread = on_model_thread
        self._scheduler = scheduler
        self._prefixes = prefixes
        self._is_starvation_told = False

    async def run(self, runner: Runner, delivery: Delivery, departures: Departures) -> None:
        """Step after step, until cancelled."""
        self._runner, self._delivery, self._departures = runner, delivery, departures
        while True:
            try:
                await self._step()
            except Exception as error:  # the outer edge: between steps too, a request must not end the loop
                self._blame(error)

    async def _step(self) -> None:
        """Schedule, run, deliver."""
        self._departures.see_off()
        self._prefixes.see_off()
        work = self._scheduler.next(time.monotonic())
        if work is None:
            await self._rest()
        else:
            await self._run(work)

    async def _run(self, work: Work) -> None:
        """Run a step, or one slice of it, and what follows at once; at the end of each what was drawn goes out."""
        work.begin(time.monotonic())
        start, events = time.perf_counter(), asyncio.get_running_loop()
        limit = start + (STREAM_SLICES if work.kind == "decode" else 1) * self._config.slice_seconds

        def is_wanted() -> bool:
            return bool(self._departures) or self._scheduler.has_other_work(work)

        def run() -> bool:
            nonlocal work, start
            is_over = self._runner.run(work, lambda: time.perf_counter() > limit and is_wanted())
            while is_over and (now := time.perf_counter()) < limit and not is_wanted():
                following = self._runner.following(work)
                if following is None:
                    break
                hand_out = _Once(partial(events.call_soon_threadsafe, self._settle_followed, work, now - start))
                work, start = following, now
                try:
                    self._runner.run(work, hand_out)
                finally:
                    hand_out()
            return is_over

        try:
            is_over: bool = await self._on_model_thread(run)
        except Exception as error:  # the outer edge: whatever a model call raises concerns its own requests only
            self._delivery.land()
            self._delivery.split(work, error)
        else:
            self._delivery.land()
            self._scheduler.account(work, work.slice_seconds)
            if is_over:
                self._delivery.settle(work)
            else:
                self._scheduler.pause(work)
            self._note(work, time.perf_counter() - start, is_over)
        self.last_progress = time.monotonic()
        self._tell_starvation()

    def _settle_followed(self, work: Work, seconds: float) -> None:
        """What was drawn goes out while the model thread is at the next step."""
        try:
            self._scheduler.account(work, work.slice_seconds)
            self._delivery.settle(work, is_followed=True)
            self._note(work, seconds, is_over=True)
        except Exception as error:  # the outer edge, as of `run`
            self._blame(error)
        self.last_progress = time.monotonic()

    def _note(self, work: Work, seconds: float, is_over: bool) -> None:
        """A slice took so long, with all around it: at the step's end the forecast learns of it."""
        work.elapsed += seconds
        if is_over and work.meter is None:  # counting takes time of its own
            work.note()

    def _tell_starvation(self) -> None:
        """Log, once, that other processes take the model thread's CPU."""
        ratio = self._runner.starvation.ratio
        if ratio > STARVED_RATIO and not self._is_starvation_told:
            self._is_starvation_told = True
            logger.warning("the model thread has no CPU for %.0f%% of the time it computes: others take its CPUs", 100 * ratio)

    async def _rest(self) -> None:
        """Wait for a request; give free heap back when none comes."""
        assert not self._scheduler.jobs, "requests wait, but none can be scheduled"
        self.idle.set()
        self.wake.clear()
        try:
            async with asyncio.timeout(REST_SECONDS):  # wait_for would lose a cancellation that comes with the wake
                await self.wake.wait()
        except TimeoutError:
            await self._on_model_thread(trim)
            await self.wake.wait()

    def _blame(self, error: Exception) -> None:
        """Something failed between the steps: the request that was being looked at fails; when there was none, all do."""
        suspect, jobs = self._scheduler.suspect, self._scheduler.jobs
        self._scheduler.suspect = None
        logger.critical("the engine failed between its steps", exc_info=error)
        for job in [suspect] if suspect in jobs else jobs:
            self._delivery.fail(job, error)

    def died(self, error: BaseException | None) -> None:
        """The loop itself failed, which is a bug: tell everybody, and let the health check see no more progress."""
        logger.critical("the engine's loop failed", exc_info=error)
        self.is_dead, self.last_progress = True, float("-inf")
        for job in self._scheduler.jobs:
            self._delivery.end(job, "model_failed", ModelFailed("the engine failed"))
        self.idle.set()
