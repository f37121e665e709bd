"""The stream that a caller reads: the engine's side puts, the caller's side iterates."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from service.engine.request import Delta, Embedding, RequestError


class Answer:
    """The stream of one request: `Delta`s of a completion, or one `Embedding`.

    Iterating raises DeadlineExceeded, Draining, OutOfMemory or ModelFailed when the request fails on its way.
    `aclose()`, at any time, cancels what is left; a caller that stops reading early must call it.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._items: asyncio.Queue[Delta | Embedding | RequestError | None] = asyncio.Queue()
        self._cancel = cancel
        self._is_over = False

    def put(self, item: Delta | Embedding) -> None:
        """Hand an item out."""
        self._items.put_nowait(item)

    def end(self, error: RequestError | None = None) -> None:
        """Hand out the end, or the failure."""
        self._items.put_nowait(error)

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Delta | Embedding:
        if self._is_over:
            raise StopAsyncIteration
        item = await self._items.get()
        if item is None or isinstance(item, RequestError):
            self._is_over = True
            raise item or StopAsyncIteration
        return item

    async def aclose(self) -> None:
        """Cancel what is left. Returns at once; the engine gives the bytes back before its next step."""
        self._is_over = True
        self._cancel()
