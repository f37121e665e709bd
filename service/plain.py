"""A replica served by uvicorn alone: for tests, benchmarks, and machines where Ray cannot start.

The same routes, the same metrics, one process; no second replica, no proxy.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn

from service.config import ServiceConfig, UserConfig
from service.http.line import line_under
from service.replica import Replica


@asynccontextmanager
async def listening(replica: Replica, user: UserConfig) -> AsyncIterator[str]:
    """The base URL under which a replica answers on loopback, at a free port, for as long as the block lasts."""
    await replica.start(user)
    # asyncio turns Nagle's delay off, 40 ms for an answer, on sockets that say they are TCP
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        line = line_under(replica.config.line)
        server = uvicorn.Server(uvicorn.Config(replica.app, http=line, log_level="error", timeout_graceful_shutdown=5))
        serving = asyncio.create_task(server.serve([listener]))
        try:
            while not server.started:
                await asyncio.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving
            await replica.stop()


@contextmanager
def listening_in_thread(config: ServiceConfig, user: UserConfig) -> Iterator[tuple[str, Replica]]:
    """The same from a thread with an event loop of its own, for callers that have none. Yields URL and replica."""
    replica = Replica(config)
    answering, ended = threading.Event(), asyncio.Event()
    state: dict[str, str | BaseException] = {}
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with listening(replica, user) as url:
            state["url"] = url
            answering.set()
            await ended.wait()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        except BaseException as error:  # told to the caller below, who waits in another thread
            state["error"] = error
        finally:
            loop.close()
            answering.set()

    thread = threading.Thread(target=run, name="longserve-plain")
    thread.start()
    answering.wait()
    try:
        if isinstance(error := state.get("error"), BaseException):
            raise error
        yield str(state["url"]), replica
    finally:
        if not loop.is_closed():
            loop.call_soon_threadsafe(ended.set)
        thread.join()
