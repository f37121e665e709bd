"""Who leaves before the answer is complete: callers that hang up, deadlines that pass, whom a drain has no time for."""

from __future__ import annotations

import time
from collections.abc import Callable

from service.engine.delivery import Delivery
from service.engine.job import Job
from service.engine.observer import Outcome
from service.engine.request import DeadlineExceeded, RequestError
from service.engine.scheduler import Scheduler


class Departures:
    """Jobs that must end. They do before the next step, and one whose step is paused with others' behind that step."""

    def __init__(self, scheduler: Scheduler, delivery: Delivery, wake: Callable[[], None]) -> None:
        """`wake`: called when there is somebody to see off."""
        self._scheduler = scheduler
        self._delivery = delivery
        self._wake = wake
        self._lost: list[tuple[Job, Outcome, RequestError | None]] = []

    def __bool__(self) -> bool:
        """Whether anybody is to leave."""
        return bool(self._lost)

    def mark(self, job: Job, outcome: Outcome, error: RequestError | None) -> None:
        """Note a job that must end; nothing is done now."""
        self._lost.append((job, outcome, error))
        self._wake()

    def see_off(self) -> None:
        """End the jobs that are marked, and those whose deadline has passed."""
        self._expire()
        lost, self._lost = self._lost, []
        alive = set(self._scheduler.jobs)
        doomed = {job: (job, outcome, error) for job, outcome, error in reversed(lost) if job in alive}
        for work in list(self._scheduler.paused):
            if work.jobs <= doomed.keys():
                self._scheduler.paused.remove(work)
            else:
                self._lost += [doomed.pop(job) for job in work.jobs if job in doomed]
        for job, outcome, error in doomed.values():
            self._delivery.end(job, outcome, error)

    def _expire(self) -> None:
        """Mark the jobs whose deadline has passed."""
        now = time.monotonic()
        for job in self._scheduler.jobs:
            if job.deadline <= now:
                self.mark(job, "deadline_exceeded", DeadlineExceeded("the deadline passed before the answer was complete"))
