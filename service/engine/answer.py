"""The stream that a caller reads: the engine's side puts, the caller's side iterates.

What waits for a slow reader is joined as it comes: text and token ids, whose bytes were reserved with the request, and not a
queue of objects without a bound.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import deque
from collections.abc import Callable
from io import StringIO

from service.engine.request import Delta, Embedding, FinishReason, RequestError, TokenLogprob


class _Unread:
    """All that one sample has said since its reader came last."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._text = StringIO()
        self._tokens = array("i")
        self._logprobs: list[TokenLogprob] | None = None
        self._finish_reason: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        self._text.write(delta.text)
        self._tokens.extend(delta.tokens)
        self._finish_reason = delta.finish_reason
        if delta.logprobs is not None:
            self._logprobs = self._logprobs or []
            self._logprobs += delta.logprobs

    def taken(self) -> Delta:
        logprobs = None if self._logprobs is None else tuple(self._logprobs)
        return Delta(self._index, self._text.getvalue(), self._tokens, logprobs, self._finish_reason)


class Answer:
    """The stream of one request: `Delta`s of a completion, or one `Embedding`.

    Iterating raises DeadlineExceeded, Draining, OutOfMemory or ModelFailed when the request fails on its way.
    `aclose()`, at any time, cancels what is left; a caller that stops reading early must call it.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel: Callable[[], None] | None = cancel
        self._unread: deque[_Unread | Embedding] = deque()  # in the order of their beginnings
        self._samples: dict[int, _Unread] = {}
        self._news = asyncio.Event()
        self._error: RequestError | None = None
        self._is_over = False

    def put(self, item: Delta | Embedding) -> None:
        """Hand an item out."""
        if isinstance(item, Embedding):
            self._unread.append(item)
        else:
            if item.index not in self._samples:
                self._samples[item.index] = _Unread(item.index)
                self._unread.append(self._samples[item.index])
            self._samples[item.index].add(item)
        self._news.set()

    def end(self, error: RequestError | None = None) -> None:
        """Hand out the end, or the failure. Lets go of the request: nothing is left to cancel."""
        self._error, self._cancel = error, None
        self._news.set()

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Delta | Embedding:
        while not (self._is_over or self._unread or self._cancel is None):
            self._news.clear()
            await self._news.wait()
        if self._is_over or not self._unread:
            error = None if self._is_over else self._error
            self._is_over = True
            raise error or StopAsyncIteration
        item = self._unread.popleft()
        if isinstance(item, Embedding):
            return item
        delta = item.taken()
        del self._samples[delta.index]
        return delta

    async def aclose(self) -> None:
        """Cancel what is left. Returns at once; the engine gives the bytes back before its next step."""
        self._is_over = True
        self._news.set()
        if self._cancel is not None:
            self._cancel()
