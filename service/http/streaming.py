"""Answers while they come: several prompts' answers merged into one sequence that ends when the caller hangs up, and the
server-sent events (WHATWG HTML, section 9.2) made of it.

Every answer that was opened is closed, whatever happens: closing is what gives the engine its bytes back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from enum import Enum

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.engine.request import Delta, Embedding, Request, RequestError
from service.http import answers
from service.http.answers import Completion
from service.http.auth import Caller
from service.http.drawn_schemas import StreamOptions
from service.http.errors import ClientGone, InternalError, body_of
from service.http.face import Host
from service.http.headway import headway
from service.http.reader import left

Item = tuple[int, Delta | Embedding]
"""(index of the prompt, what its answer gave next)."""


class Signal(Enum):
    """What may stand in an item's place."""

    END = "every answer is complete"
    SILENCE = "nothing came for as long as the reader wanted to wait"


class Merged:
    """The items of several answers in the order they come, and the caller's leaving."""

    def __init__(self, queue: asyncio.Queue[Item | Signal | Exception], running: int) -> None:
        self._queue = queue
        self._running = running

    async def next(self, patience_seconds: float | None = None) -> Item | Signal:
        """The next item, END, or SILENCE after `patience_seconds`. Raises the first failure, or ClientGone."""
        try:
            async with asyncio.timeout(patience_seconds):
                return await self._next()
        except TimeoutError:
            return Signal.SILENCE

    async def _next(self) -> Item | Signal:
        while self._running:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            if item is not Signal.END:
                return item
            self._running -= 1
        return Signal.END


@asynccontextmanager
async def merged(host: Host, requests: Sequence[Request], caller: HttpRequest) -> AsyncGenerator[Merged]:
    """Submit the requests and merge their answers; the exit cancels what is left. Raises the engine's refusals and the key's.

    The queue holds one item: what a slow reader leaves stays in its answer, which joins it.
    """
    queue: asyncio.Queue[Item | Signal | Exception] = asyncio.Queue(1)
    async with AsyncExitStack() as stack:
        host.engine.check_together(requests)
        stack.enter_context(_charged(caller.state.owner, requests, host))
        opened = []
        for request in requests:
            opened.append(host.engine.submit(request))
            stack.push_async_callback(opened[-1].aclose)
        tasks = [asyncio.create_task(_move(index, answer, queue)) for index, answer in enumerate(opened)]
        stack.push_async_callback(_end, [*tasks, asyncio.create_task(_watch(caller, queue))])
        yield Merged(queue, len(tasks))


@contextmanager
def _charged(owner: Caller, requests: Sequence[Request], host: Host) -> Iterator[None]:
    """Count the call on its key's budgets: bytes while it lasts, and tokens as far as they were read and written."""
    owner.enter()
    plans = [] if owner.config.memory_share is None else [host.engine.plan(request) for request in requests]
    try:
        with owner.holding(sum(plan.needed_bytes for plan in plans), plans[0].budget_bytes if plans else 0):
            yield
    finally:
        owner.used(sum(_read_and_written(request) for request in requests))


def _read_and_written(request: Request) -> int:
    return sum(chunk.tokens for chunk in request.timings.chunks) + request.timings.output_tokens


async def _move(index: int, answer: AsyncIterator[Delta | Embedding], queue: asyncio.Queue[Item | Signal | Exception]) -> None:
    """One answer's items into the queue, then END; or its failure, for the reader to raise."""
    try:
        async for item in answer:
            await queue.put((index, item))
        await queue.put(Signal.END)
    except Exception as error:
        await queue.put(error)


async def _watch(caller: HttpRequest, queue: asyncio.Queue[Item | Signal | Exception]) -> None:
    await left(caller)
    await queue.put(ClientGone("the caller hung up"))


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def complete(host: Host, requests: Sequence[Request], completion: Completion, caller: HttpRequest) -> bytes:
    """The whole answer to a completion call, as JSON. Raises RequestError."""
    async with merged(host, requests, caller) as running:
        while (item := await running.next()) is not Signal.END:
            assert isinstance(item, tuple) and isinstance(item[1], Delta)
            await completion.take(item[0], item[1])
    if completion.is_long:
        return await asyncio.to_thread(lambda: answers.encoded_in_pieces(completion.whole()))
    return answers.encoded(completion.whole())


async def read(host: Host, request: Request, caller: HttpRequest) -> None:
    """Wait until a request that asks for no answer has been processed. Raises RequestError."""
    async with merged(host, [request], caller) as running:
        while await running.next() is not Signal.END:
            pass


async def embed(host: Host, requests: Sequence[Request], caller: HttpRequest) -> list[Embedding]:
    """The inputs' embeddings, in the inputs' order. Raises RequestError."""
    found: dict[int, Embedding] = {}
    async with merged(host, requests, caller) as running:
        while (item := await running.next()) is not Signal.END:
            assert isinstance(item, tuple) and isinstance(item[1], Embedding)
            found[item[0]] = item[1]
    return [found[index] for index in range(len(requests))]


class CompletionStream(Response):
    """A completion as server-sent events.

    The response begins with the first item, so that a failure until then has its true status; or after a silence of
    `stream_ping_seconds`, with a comment that says how far it is, so that no proxy on the way gives up on a long prefill. A
    later failure is an event `{"error": ...}` and the end, without `[DONE]`.
    """

    def __init__(self, host: Host, requests: Sequence[Request], completion: Completion, options: StreamOptions) -> None:
        super().__init__(media_type="text/event-stream")
        self.host = host
        self.requests = requests
        self.completion = completion
        self.options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with merged(self.host, self.requests, HttpRequest(scope, receive)) as running:
            first = await running.next(self.host.config.stream_ping_seconds)
            await send({"type": "http.response.start", "status": 200, "headers": self._start_headers()})
            async with aclosing(self._events(first, running)) as events:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    def _start_headers(self) -> list[tuple[bytes, bytes]]:
        known = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", "x-accel-buffering": "no"}
        return [(name.encode(), value.encode()) for name, value in (known | answers.headers(self.requests)).items()]

    async def _events(self, item: Item | Signal, running: Merged) -> AsyncGenerator[bytes]:
        try:
            while item is not Signal.END:
                if item is Signal.SILENCE:
                    yield headway(self.requests, self.host).comment
                else:
                    yield await self._chunk(item)
                item = await running.next(self.host.config.stream_ping_seconds)
            if self.options.include_usage:
                yield _event(answers.encoded(self.completion.usage_chunk()))
            yield b"data: [DONE]\n\n"
        except ClientGone:
            return
        except RequestError as error:
            yield _event(answers.encoded(body_of(error)))
        except Exception:
            yield _event(answers.encoded(body_of(InternalError("internal error"))))
            raise

    async def _chunk(self, item: Item | Signal) -> bytes:
        assert isinstance(item, tuple) and isinstance(item[1], Delta)
        chunk = await self.completion.take(item[0], item[1])
        if self.options.continuous_usage_stats:
            chunk["usage"] = self.completion.usage()
        elif self.options.include_usage:
            chunk["usage"] = None  # OpenAI's: on every chunk but the last
        is_long = len(item[1].logprobs or ()) > answers.LONG_LIST
        return _event(await asyncio.to_thread(answers.encoded_in_pieces, chunk) if is_long else answers.encoded(chunk))


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
