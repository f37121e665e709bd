"""Processes beside the replica for what takes long and holds Python's lock: reading large bodies, encoding long texts.

JSON libraries and tokenizers keep the lock for as long as they work. In the replica's process 16 MiB of small lists would stop
every stream for 1.7 s, whichever library reads them, and no thread can be told to stop. A process can: its work ends when the
caller leaves or the deadline passes. The queue in front is bounded, and large jobs never hold every worker.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from service.engine.request import QueueFull
from service.http import worker
from service.http.face import Tokenizer

P = ParamSpec("P")
T = TypeVar("T")

LARGE_BYTES = 2**20  # jobs above it leave one worker to the others
GRACE_SECONDS = 1.0  # a job whose caller left may take so long to end by itself: a new process costs half a second
FIRST_GUESS_SECONDS = 0.2  # of a job, before any was measured

Observe = Callable[[str, float, float], None]
"""Told of each job that ended: its name, its seconds in the queue, its seconds of work."""


def _unobserved(job: str, queue_seconds: float, work_seconds: float) -> None:
    pass


class WorkerFailed(Exception):
    """A worker ended in the middle of a job, or failed by our fault."""


class Workers:
    """`count` processes and the queue in front of them. `observe` feeds the metrics."""

    def __init__(self, directory: str, count: int, max_waiting: int, observe: Observe = _unobserved) -> None:
        self.waiting = 0
        self.observe = observe
        self._max_waiting = max_waiting
        self._workers = [Worker(directory) for _ in range(count)]
        self._idle: asyncio.LifoQueue[Worker] = asyncio.LifoQueue()
        self._large = asyncio.Semaphore(max(1, count - 1))
        self._usual_seconds = FIRST_GUESS_SECONDS
        self._tasks: set[asyncio.Task[Any]] = set()
        self._has_stopped = False
        for each in self._workers:
            self._idle.put_nowait(each)

    async def start(self) -> None:
        """Start the processes, which the first job would do otherwise. Raises WorkerFailed."""
        await asyncio.gather(*(each.start() for each in self._workers))

    async def stop(self) -> None:
        """End the processes, whatever they do; who waits for one gets WorkerFailed. Idempotent."""
        self._has_stopped = True
        for each in self._workers:
            each.end()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for each in self._workers:
            each.close()

    async def run(self, size_bytes: int, job: Callable[Concatenate[Tokenizer, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `job(tokenizer, *args)` returns or raises in a worker. Cancelled, it leaves the queue or ends the work.

        Raises:
            QueueFull: as many jobs wait as may.
            WorkerFailed: our fault.
        """
        assert not kwargs, "jobs take positional arguments"
        arrival = time.monotonic()
        seat = await self._seat(size_bytes > LARGE_BYTES)
        task = asyncio.create_task(self._work(seat, job, args, arrival))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.done():
                asyncio.get_running_loop().call_later(GRACE_SECONDS, _end, seat.worker, task)
            raise

    async def _seat(self, is_large: bool) -> _Seat:
        """A free worker, when it is this job's turn."""
        must_wait = self._idle.empty() or (is_large and self._large.locked())
        if must_wait and self.waiting >= self._max_waiting:
            seconds = self._usual_seconds * self.waiting / len(self._workers)
            raise QueueFull(f"{self.waiting} long inputs wait to be read, and no more may", seconds)
        self.waiting += 1
        try:
            if is_large:
                await self._large.acquire()
            try:
                return _Seat(await self._idle.get(), is_large)
            except asyncio.CancelledError:
                if is_large:
                    self._large.release()
                raise
        finally:
            self.waiting -= 1

    async def _work(self, seat: _Seat, job: Callable[..., T], arguments: tuple[Any, ...], arrival: float) -> T:
        start = time.monotonic()
        try:
            if self._has_stopped:
                raise WorkerFailed("the service is stopping")
            return await seat.worker.ask(job, arguments)
        finally:
            seconds = time.monotonic() - start
            self._usual_seconds += (seconds - self._usual_seconds) / 8
            self.observe(job.__name__, start - arrival, seconds)
            self._idle.put_nowait(seat.worker)
            if seat.is_large:
                self._large.release()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # of a job whose caller left: nobody else asks for it


def _end(worker: Worker, task: asyncio.Task[Any]) -> None:
    if not task.done():
        worker.end()


class _Seat:
    """A worker that is this job's for now."""

    def __init__(self, worker: Worker, is_large: bool) -> None:
        self.worker = worker
        self.is_large = is_large


class Worker:
    """One process, which does one job at a time. It is started when it is needed and not there."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._starting = asyncio.Lock()

    async def start(self) -> None:
        """Start the process, unless it runs, and wait until it has loaded its tokenizer. Raises WorkerFailed."""
        async with self._starting:
            if self._line is None:
                await self._start()

    async def _start(self) -> None:
        self._line, theirs = socket.socketpair()
        self._line.setblocking(False)
        with theirs:
            command = [sys.executable, "-m", worker.__name__, str(theirs.fileno()), self._directory]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false"}
            # in a group of its own: what interrupts the service must not end work that is being drained
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=environment, process_group=0
            )
        await self._receive()

    async def ask(self, job: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        """What the job returns or raises. Raises WorkerFailed."""
        await self.start()
        assert self._line is not None, "a started worker has its line"
        try:
            for part in worker.framed((job, arguments)):
                await asyncio.get_running_loop().sock_sendall(self._line, part)
        except OSError as error:
            self.close()
            raise WorkerFailed("a worker ended before its job") from error
        is_answer, value = await self._receive()
        if is_answer:
            return value  # type: ignore[no-any-return]
        raise WorkerFailed(str(value)) if isinstance(value, RuntimeError) else value

    def end(self) -> None:
        """End the process at once; who waits for its answer gets WorkerFailed. Idempotent."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """Give everything back, when nobody waits for an answer. Idempotent."""
        self.end()
        if self._process is not None:
            self._process.wait()
            self._process = None
        if self._line is not None:
            self._line.close()
            self._line = None

    async def _receive(self) -> Any:
        """The next frame's value."""
        size = int.from_bytes(await self._exactly(worker.LENGTH_BYTES), "little")
        return pickle.loads(await self._exactly(size))

    async def _exactly(self, count: int) -> bytearray:
        assert self._line is not None, "a started worker has its line"
        data, got = bytearray(count), 0
        while got < count:
            try:
                received = await asyncio.get_running_loop().sock_recv_into(self._line, memoryview(data)[got:])
            except OSError:  # it ended with a part of the job unread, which resets the line
                received = 0
            if not received:
                self.close()
                raise WorkerFailed("a worker ended in the middle of a job")
            got += received
        return data
