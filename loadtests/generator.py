"""Sends what was planned, when it was planned, in one process or several.

Open loop: every request has its time before the run begins, and no answer delays a later send. Closed loop: so many in
flight, each new one due the moment one before it ends. What the generator itself does late is measured, by the delay of each
send behind its time and by the lag of the event loop, and judged in `measures.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from loadtests.client import Ask, Client, Outcome, Record, begun

SPIN_SECONDS = 0.0015  # timers of the event loop are rounded up to a millisecond: the rest is waited out awake
LAG_SECONDS = 0.02  # between two looks at the event loop's lag
RATE_OF_ONE_PROCESS = 300.0  # requests a second that one process sends on time with room to spare
FAILED_SECONDS = 0.1  # that a closed loop waits after a failure, lest it hammer a server that refuses at once
LEAD_SECONDS = 0.05  # between the start of a block and its first send
MEETING_SECONDS = 120.0  # within which all processes must have started


@dataclass(frozen=True)
class Traffic:
    """One stream's requests in a block: a schedule (`in_flight` None), or prompts that a closed loop takes in turn."""

    name: str
    asks: tuple[Ask, ...]
    in_flight: int | None = None
    seconds: float = 0.0  # a closed loop sends for so long,
    min_requests: int = 0  # and at least so many


@dataclass(frozen=True)
class Load:
    """Everything one block sends, and where to."""

    url: str
    headers: dict[str, str]
    timeout_seconds: float
    max_in_flight: int
    traffic: tuple[Traffic, ...]


@dataclass
class Sent:
    """What became of a block: every request, and how late the event loop was, looked at 50 times a second."""

    records: list[Record]
    lags: list[float]
    interrupted: bool = False


class Interrupt:
    """Set once by Ctrl-C: nothing more is sent, what is in flight is given up."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    def __bool__(self) -> bool:
        return self.event.is_set()


def processes_for(rate: float | None) -> int:
    """How many generator processes a rate needs: as many as there are CPUs at most."""
    wanted = 1 if rate is None else int(-(-rate // RATE_OF_ONE_PROCESS))
    return max(1, min(wanted, len(os.sched_getaffinity(0))))


async def run(load: Load, processes: int, interrupt: Interrupt, progress: Callable[[Record], None]) -> Sent:
    """Send a block. `progress` hears of each request that ends, in one process; of all at the end, in several."""
    if processes == 1:
        return await send(load, time.monotonic() + LEAD_SECONDS, interrupt, progress)
    loop, context = asyncio.get_running_loop(), multiprocessing.get_context("spawn")
    meeting = (context.Barrier(processes), context.Value("d", 0.0))
    with ProcessPoolExecutor(processes, context, _meet_at, meeting) as pool:
        shares = [loop.run_in_executor(pool, _in_process, share) for share in split(load, processes)]
        parts = await asyncio.gather(*shares)
    whole = Sent([], [], any(part.interrupted for part in parts) or bool(interrupt))
    for part in parts:
        whole.records += part.records
        whole.lags += part.lags
    for record in whole.records:
        progress(record)
    return whole


def split(load: Load, processes: int) -> list[Load]:
    """The load in equal shares: every so-manieth request of a schedule, and of those in flight."""
    return [
        replace(load, max_in_flight=-(-load.max_in_flight // processes), traffic=_shares(load, i, processes))
        for i in range(processes)
    ]


def _shares(load: Load, place: int, processes: int) -> tuple[Traffic, ...]:
    found = []
    for each in load.traffic:
        if each.in_flight is None:
            found.append(replace(each, asks=each.asks[place::processes]))
        elif (mine := len(range(place, each.in_flight, processes))) > 0:
            found.append(replace(each, in_flight=mine, min_requests=-(-each.min_requests // processes)))
    return tuple(found)


_meeting: list[Any] = []  # of a generator process: the barrier at which all wait, and where the first of them writes the start


def _meet_at(*meeting: Any) -> None:
    _meeting[:] = meeting


def _in_process(load: Load) -> Sent:
    """A share's requests, from one moment on in all processes, which come to life at different times."""
    barrier, start = _meeting
    if barrier.wait(MEETING_SECONDS) == 0:
        start.value = time.monotonic() + LEAD_SECONDS
    barrier.wait(MEETING_SECONDS)
    return asyncio.run(_interruptible(load, start.value))


async def _interruptible(load: Load, start: float) -> Sent:
    interrupt = Interrupt()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupt.event.set)
    return await send(load, start, interrupt, lambda _: None)


async def send(load: Load, start: float, interrupt: Interrupt, progress: Callable[[Record], None]) -> Sent:
    """Send a share from `start` (monotonic seconds) on, in this process."""
    client = Client(load.url, load.headers, load.timeout_seconds)
    flight = Flight(client, load.max_in_flight, progress)
    lags: list[float] = []
    watch = asyncio.create_task(_watch(lags))
    work = asyncio.create_task(_all(flight, load.traffic, start))
    stop = asyncio.create_task(_stop(interrupt, work, flight))
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await work
        await flight.landed()
    finally:
        for task in (watch, stop):
            task.cancel()
        client.close()
    return Sent(flight.records, lags, bool(interrupt))


async def _all(flight: Flight, traffic: Sequence[Traffic], start: float) -> None:
    await asyncio.gather(*(_traffic(flight, each, start) for each in traffic))


async def _stop(interrupt: Interrupt, work: asyncio.Task[None], flight: Flight) -> None:
    """End a block when the operator says so: send nothing more, give up what is under way."""
    await interrupt.event.wait()
    work.cancel()
    flight.give_up()


class Flight:
    """The requests under way and those that ended."""

    def __init__(self, client: Client, most: int, progress: Callable[[Record], None]) -> None:
        self.records: list[Record] = []
        self._client = client
        self._most = most
        self._progress = progress
        self._tasks: set[asyncio.Task[Record]] = set()

    def launch(self, ask: Ask, intended: float) -> None:
        """Send without waiting; not at all, and say so, where too many are under way."""
        if len(self._tasks) >= self._most:
            record = begun(ask, intended)
            record.sent = record.done = time.monotonic()
            record.outcome, record.told = Outcome.NOT_SENT, f"{self._most} requests were in flight already"
            self._end(record)
            return
        task = asyncio.create_task(self.send(ask, intended))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def send(self, ask: Ask, intended: float) -> Record:
        """Send and wait for the answer."""
        record = begun(ask, intended)
        try:
            await self._client.send(ask, record)
        finally:
            self._end(record)
        return record

    def _end(self, record: Record) -> None:
        self.records.append(record)
        self._progress(record)

    def give_up(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def landed(self) -> None:
        """Wait for all that were launched."""
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _traffic(flight: Flight, traffic: Traffic, start: float) -> None:
    if traffic.in_flight is None:
        await _open(flight, traffic.asks, start)
    else:
        await _closed(flight, traffic, start)


async def _open(flight: Flight, asks: Sequence[Ask], start: float) -> None:
    """Send each request at its time, whatever the others do."""
    for ask in asks:
        assert ask.at is not None, "a request of a schedule has its time"
        await until(start + ask.at)
        flight.launch(ask, start + ask.at)
    await flight.landed()


async def _closed(flight: Flight, traffic: Traffic, start: float) -> None:
    """Keep so many in flight until time is up and enough are sent."""
    assert traffic.in_flight is not None and traffic.asks, "a closed loop has prompts and a width"
    turn, count = itertools.cycle(traffic.asks), itertools.count()
    await until(start)

    async def lane() -> None:
        due = start
        while (index := next(count)) < traffic.min_requests or due < start + traffic.seconds:
            record = await flight.send(replace(next(turn), index=index), due)
            if record.outcome is not Outcome.OK:
                await asyncio.sleep(FAILED_SECONDS)
            due = time.monotonic()

    await asyncio.gather(*(lane() for _ in range(traffic.in_flight)))


async def until(moment: float) -> None:
    """Return at a monotonic moment, to some ten microseconds where the machine allows."""
    rest = moment - time.monotonic()
    if rest > SPIN_SECONDS:
        await asyncio.sleep(rest - SPIN_SECONDS)
    while time.monotonic() < moment:
        await asyncio.sleep(0)


async def _watch(lags: list[float]) -> None:
    """Note how much later than asked the event loop wakes a sleeper."""
    while True:
        due = time.monotonic() + LAG_SECONDS
        await asyncio.sleep(LAG_SECONDS)
        lags.append(max(0.0, time.monotonic() - due))
