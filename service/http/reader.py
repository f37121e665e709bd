"""Bodies to records and texts to tokens: small ones here and now, large ones in a worker, so that no stream waits for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request as HttpRequest

from service.engine.request import MOST_QUOTED, DeadlineExceeded, Request, Task
from service.http import worker
from service.http.body import parse
from service.http.errors import ClientGone
from service.http.face import Tokenizer
from service.http.tickets import HEADER
from service.http.workers import Workers

TICKET = HEADER.decode()

B = TypeVar("B", bound=BaseModel)
T = TypeVar("T")

SMALL_BODY = 2**16  # bytes; the worst of them, small lists all through, takes 7 ms
SMALL_TEXT = 4096  # characters; some 4 ms
SMALL_TOKENS = 4096  # ids; some 1 ms


@dataclass(frozen=True)
class Call:
    """One HTTP call: who waits for its answer, and how long."""

    id: str
    deadline: float  # time.monotonic() seconds
    caller: HttpRequest

    @property
    def owner(self) -> str:
        """Whose key was shown."""
        return str(self.caller.state.owner.config.digest.hex())

    @property
    def ticket(self) -> str:
        """What the proxy that sent it here knows it by."""
        return self.caller.headers.get(TICKET, "")[:MOST_QUOTED]

    def asks(self, kind: Task, **more: Any) -> Request:
        """The request of it, its prompt left out."""
        return Request(self.id, kind, (), deadline=self.deadline, trace=self.trace, ticket=self.ticket, **more)

    @property
    def stays(self) -> str:
        """What keeps a caller under one backend while only a share of the calls is tried under it: the key, else the call."""
        return self.owner if self.caller.state.owner.config.key or self.caller.state.owner.config.sha256 else self.id

    @property
    def trace(self) -> dict[str, str]:
        """The caller's W3C trace context, by header."""
        return {name: self.caller.headers[name] for name in ("traceparent", "tracestate") if name in self.caller.headers}


class Reader:
    """What a replica's routes read with.

    Every method raises QueueFull, DeadlineExceeded and ClientGone for what is too large to be read at once, and InvalidRequest
    for a text that the tokenizer gives up on.
    """

    def __init__(self, tokenizer: Tokenizer, workers: Workers) -> None:
        self._tokenizer = tokenizer
        self._workers = workers

    async def body(self, raw: bytes, kind: type[B], call: Call) -> B:
        """A body's record. Raises InvalidRequest."""
        if len(raw) <= SMALL_BODY:
            return parse(raw, kind)
        return await _awaited(call, self._workers.run(len(raw), worker.read, raw, kind))

    async def encode(self, text: str, add_special_tokens: bool, call: Call) -> Sequence[int]:
        """A text's token ids."""
        if len(text) <= SMALL_TEXT:
            return worker.encode(self._tokenizer, text, add_special_tokens)
        return await _awaited(call, self._workers.run(len(text), worker.encode, text, add_special_tokens))

    async def encode_pair(self, first: str, second: str, call: Call) -> tuple[Sequence[int], int, int | None]:
        """A pair's token ids, and where those of the second text and of the second type begin, see `Tokenizer.encode_pair`."""
        size = len(first) + len(second)
        if size <= SMALL_TEXT:
            return worker.encode_pair(self._tokenizer, first, second)
        return await _awaited(call, self._workers.run(size, worker.encode_pair, first, second))

    async def spans(self, text: str, add_special_tokens: bool, size: int, call: Call) -> Sequence[tuple[int, int]]:
        """Where each `size` tokens of a text begin and end, in characters."""
        if len(text) <= SMALL_TEXT:
            return worker.spans(self._tokenizer, text, add_special_tokens, size)
        return await _awaited(call, self._workers.run(len(text), worker.spans, text, add_special_tokens, size))

    async def chat(
        self, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any], max_length: int | None, call: Call
    ) -> Sequence[int]:
        """A conversation's token ids; always in a worker, for the template is foreign code.

        Raises:
            InvalidRequest: and ContextTooLong, unless `max_length` is None.
        """
        size = sum(len(each["content"]) for each in messages)
        return await _awaited(call, self._workers.run(size, worker.chat, messages, options, max_length))

    async def tokenized(self, text: str, add_special_tokens: bool, max_length: int, call: Call) -> bytes:
        """The answer to `/tokenize`, as JSON."""
        if len(text) <= SMALL_TEXT:
            return worker.tokenized(self._tokenizer, text, add_special_tokens, max_length)
        return await _awaited(call, self._workers.run(len(text), worker.tokenized, text, add_special_tokens, max_length))

    async def detokenized(self, tokens: Sequence[int], call: Call) -> bytes:
        """The answer to `/detokenize`, as JSON. The ids are tokens."""
        if len(tokens) <= SMALL_TOKENS:
            return worker.detokenized(self._tokenizer, tokens)
        return await _awaited(call, self._workers.run(len(tokens), worker.detokenized, tokens))


async def _awaited(call: Call, work: Coroutine[Any, Any, T]) -> T:
    """What the work returns or raises, as long as somebody waits for it: until the caller hangs up or the deadline passes.

    Raises:
        ClientGone, DeadlineExceeded: nobody waits any more; the work is cancelled.
    """
    task, leaving = asyncio.create_task(work), asyncio.create_task(left(call.caller))
    try:
        patience = max(0.0, call.deadline - time.monotonic())
        await asyncio.wait((task, leaving), timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone("the caller hung up") if leaving.done() else DeadlineExceeded("the deadline passed before it was read")
    finally:
        task.cancel()
        leaving.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def left(caller: HttpRequest) -> None:
    """Returns when the caller has hung up."""
    while (await caller.receive())["type"] != "http.disconnect":
        pass
