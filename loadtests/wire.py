"""HTTP/1.1 as a load generator needs it: one POST at a time over kept connections, every byte's arrival timed.

What a client spends on a request is counted as the server's time, and a general one spends about a millisecond where requests
are rare and its code is out of the processor's caches. Here a request is one write, and llhttp (by httptools) reads the
answer as it arrives. Redirects are not followed and nothing is asked for compressed: the answer is what the server sent.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque

import httptools
from yarl import URL

CONNECT_SECONDS = 30.0
IDLE_SECONDS = 2.0  # kept unused; less than a server's usual five: a request into a closing connection would be lost
MAX_HEAD_BYTES = 2**18


class Unreachable(Exception):
    """No connection to the server."""


class CutOff(Exception):
    """The connection ended before the answer did."""


class NotHttp(Exception):
    """What the server sent is no HTTP/1.1."""


class Wire:
    """Kept connections to one server. `url` may have a path; `headers` go with every request."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        address = URL(url)
        self._secure = ssl.create_default_context() if address.scheme == "https" else None
        self._host, self._port = address.raw_host or "", address.port or 80
        self._base = address.raw_path.rstrip("/")
        fixed = {"host": address.raw_authority, "accept": "*/*", "accept-encoding": "identity", **headers}
        self._fixed = "".join(f"{name}: {value}\r\n" for name, value in fixed.items()).encode()
        self._idle: deque[tuple[float, Connection]] = deque()

    async def post(self, path: str, body: bytes) -> Answer:
        """Send a request; returns when the answer's head has come. Raises Unreachable, CutOff and NotHttp."""
        connection = self._kept() or await self._new()
        start = f"POST {self._base}{path} HTTP/1.1\r\ncontent-length: {len(body)}\r\n".encode()
        answer = connection.ask(b"".join((start, self._fixed, b"\r\n", body)))
        try:
            await answer.begun()
        except BaseException:
            connection.abort()
            raise
        return answer

    def release(self, answer: Answer) -> None:
        """Keep the connection of an answer that was read to its end; end any other."""
        if answer.is_whole and answer.keeps_connection:
            self._idle.append((time.monotonic() + IDLE_SECONDS, answer.connection))
        else:
            answer.connection.abort()

    def close(self) -> None:
        for _, connection in self._idle:
            connection.abort()
        self._idle.clear()

    def _kept(self) -> Connection | None:
        """The connection used last, if one is left that is still open; those unused for long are ended."""
        now = time.monotonic()
        while self._idle and (self._idle[0][0] < now or not self._idle[0][1].is_open):
            self._idle.popleft()[1].abort()
        while self._idle:
            _, connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _new(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, connection = await loop.create_connection(Connection, self._host, self._port, ssl=self._secure)
        except (OSError, TimeoutError, UnicodeError) as error:
            raise Unreachable(str(error) or f"no connection within {CONNECT_SECONDS:g} s") from error
        return connection


class Answer:
    """One answer as it arrives. Monotonic seconds: `arrived`, of the bytes given out last; `ended`, of the last of all."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.status = 0
        self.headers: dict[str, str] = {}  # names in lower case
        self.arrived = self.ended = 0.0
        self.is_whole = False
        self.keeps_connection = False
        self._parts: deque[tuple[float, bytes]] = deque()
        self._error: Exception | None = None
        self._news: asyncio.Future[None] | None = None

    async def begun(self) -> None:
        """Wait for status and headers."""
        while not self.status:
            await self._more()

    async def part(self) -> bytes:
        """The next bytes of the body, empty at its end. Raises CutOff and NotHttp."""
        while not self._parts:
            if self.is_whole:
                return b""
            await self._more()
        self.arrived, data = self._parts.popleft()
        return data

    def take(self, when: float, data: bytes) -> None:
        self._parts.append((when, data))
        self.tell()

    def end(self, when: float) -> None:
        self.is_whole, self.ended = True, when
        self.tell()

    def fail(self, error: Exception) -> None:
        self._error = self._error or error
        self.tell()

    def tell(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def _more(self) -> None:
        if self._error is not None:
            raise self._error
        self._news = asyncio.get_running_loop().create_future()
        await self._news


class Connection(asyncio.Protocol):
    """A connection that carries one request at a time; also what llhttp calls back."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._head_bytes = 0
        self._headers: dict[str, str] = {}
        self._now = 0.0

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def ask(self, request: bytes) -> Answer:
        """Write a request; its answer will come into what is returned."""
        assert self._transport is not None, "a connection is made before it is used"
        self._answer, self._parser, self._head_bytes = Answer(self), httptools.HttpResponseParser(self), 0
        self._transport.write(request)
        return self._answer

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()
        answer, parser = self._answer, self._parser
        if answer is None or parser is None or answer.is_whole:  # said without being asked
            self.abort()
            return
        try:
            parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, UnicodeError) as error:
            self._end(answer, NotHttp(f"{error}: {data[:80]!r}"))
            return
        if not answer.status:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._end(answer, NotHttp(f"no end of the headers within {MAX_HEAD_BYTES} bytes"))

    def connection_lost(self, error: Exception | None) -> None:
        answer = self._answer
        if answer is None or answer.is_whole:
            return
        if error is None and answer.status and not answer.headers.keys() & {"content-length", "transfer-encoding"}:
            answer.end(time.monotonic())  # a body without a length ends with its connection
        else:
            answer.fail(CutOff("the server ended the connection"))

    def _end(self, answer: Answer, error: Exception) -> None:
        answer.fail(error)
        self.abort()

    # What llhttp calls, in this order.

    def on_message_begin(self) -> None:
        assert self._answer is not None
        if self._answer.is_whole:
            raise NotHttp("a second answer to one request")
        self._headers = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        assert self._parser is not None and self._answer is not None
        status = self._parser.get_status_code()
        if status >= 200:
            self._answer.status, self._answer.headers = status, self._headers
            self._answer.keeps_connection = self._parser.should_keep_alive()
            self._answer.tell()

    def on_body(self, data: bytes) -> None:
        assert self._answer is not None
        self._answer.take(self._now, data)

    def on_message_complete(self) -> None:
        assert self._answer is not None
        if self._answer.status:  # else the end of a 1xx, which the answer follows
            self._answer.end(self._now)
