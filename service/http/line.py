"""One connection: uvicorn's own protocol, and what it lacks against clients who are slow, silent or many.

uvicorn waits for ever for a request's first byte, for its last header and for a reader. It takes headers of any length, sends
HTTP/1.0 the marks of chunks, answers what it cannot parse in plain text, hands connections to WebSocket where no route is one,
and loses the body of a call that offers another protocol. Its classes are not documented: what is used of them here is held to
its word by `tests/http/test_line.py`.
"""

from __future__ import annotations

import asyncio
import json
import socket
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.config import LineConfig
from service.http.errors import shaped

UNSENT_BYTES = 1 << 17
"""That the kernel takes of an answer before its reader has room for them: else it takes four megabytes, and a slow reader is
noticed when those are full."""

FRAMING = (b"content-length", b"transfer-encoding")
"""Headers that say where a body ends."""


class Parser(httptools.HttpRequestParser):
    """Goes on in HTTP/1.1 where a client offers another protocol, as a server may (RFC 9110, section 7.8).

    httptools takes the offer for accepted, and what follows for no HTTP: the body, too, of a call whose client offers h2c with
    every call, as that of Java does.
    """

    def __init__(self, line: Line) -> None:
        super().__init__(line)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        self._line = line

    def feed_data(self, data: Any) -> None:
        feed = super().feed_data
        while data:
            try:
                return feed(data)
            except httptools.HttpParserUpgrade as end:
                data = memoryview(data)[end.args[0] :]
            if framing := self._line.framing:  # the body comes, which a parser of its own reads behind a head of ours
                self._line.parser = successor = Parser(self._line)
                feed = super(Parser, successor).feed_data
                feed(b"POST / HTTP/1.1\r\n%b\r\n" % framing)


class Line(HttpToolsProtocol):
    """uvicorn's `http` class, with the limits of `config`."""

    limits = LineConfig()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser = Parser(self)
        self.framing = b""  # of a body behind an offer of another protocol: the head of ours that it is read behind
        self._timer: asyncio.TimerHandle | None = None  # for a head, or for the rest of a body that was refused
        self._reader_timer: asyncio.TimerHandle | None = None
        self._awaits_head = True
        self._awaits_body = False
        self._received = 0  # bytes of the head that is awaited: timed from the first, until then uvicorn's keep-alive holds
        self._head_bytes = 0  # of the fields read so far, and of trailers

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if (own := transport.get_extra_info("socket")) is not None and own.family != socket.AF_UNIX:
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(503, f"{self.limits.max_connections} connections are open, and no more may be")
        else:
            self._wait(self.limits.head_timeout_seconds, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        if self._reader_timer is not None:
            self._reader_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._received += len(data) * self._awaits_head
        super().data_received(data)
        if self._awaits_head and self._received > self.limits.max_head_bytes:
            self._refuse(431, self._too_long())
        elif self._awaits_head and self._timer is None:
            self._wait(self.limits.head_timeout_seconds, self._late)

    def on_message_begin(self) -> None:
        if not self.framing:
            super().on_message_begin()
            self._awaits_head = True

    def on_url(self, url: bytes) -> None:
        if not self.framing:
            self._count(len(url))
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.framing:
            self._count(len(name) + len(value))
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.framing:
            self.framing = b""
            return
        self._awaits_head, self._awaits_body = False, True
        self._received = self._head_bytes = 0
        self._wait_no_more()
        super().on_headers_complete()
        if self.parser.should_upgrade():
            fields = (each for each in self.headers if each[0] in FRAMING)
            self.framing = b"".join(b"%b: %b\r\n" % each for each in fields)

    def on_message_complete(self) -> None:
        if self.framing:
            return  # its body comes
        super().on_message_complete()
        self._awaits_body = False
        self._wait_no_more()
        self._awaits_head = self.cycle.response_complete

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._awaits_body:
            self._wait(self.limits.rest_timeout_seconds, self.transport.close)
        else:
            self._awaits_head = True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reader_timer = self.loop.call_later(self.limits.send_timeout_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reader_timer is not None:
            self._reader_timer.cancel()

    def send_400_response(self, msg: str) -> None:
        if self._head_bytes > self.limits.max_head_bytes:
            self._refuse(431, self._too_long())
        else:
            self._refuse(400, "this is no HTTP/1.1 request that can be read")

    def _should_upgrade_to_ws(self) -> bool:
        return False

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.scope["http_version"] == "1.0":
            cycle.__class__ = UntilClose
        super()._start_asgi_task(cycle, app)

    def _count(self, count: int) -> None:
        self._head_bytes += count
        if self._head_bytes > self.limits.max_head_bytes:
            raise ValueError(self._too_long())  # ends the parsing, and comes to `send_400_response`

    def _too_long(self) -> str:
        return f"request line and headers may have {self.limits.max_head_bytes} bytes"

    def _late(self) -> None:
        if self._received:
            self._refuse(408, f"request line and headers must arrive within {self.limits.head_timeout_seconds:g} s")
        else:
            self.transport.close()

    def _wait(self, seconds: float, then: Any) -> None:
        self._wait_no_more()
        self._timer = self.loop.call_later(seconds, then)

    def _wait_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int, message: str) -> None:
        """Answer before there is a request to answer, and hang up; in the middle of another's answer only that."""
        self._wait_no_more()
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.close()
            return
        body = json.dumps(shaped(status, message)).encode()
        lines = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            *(["retry-after: 1"] if status == 503 else []),
            "connection: close",
        ]
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        self.transport.close()


def line_under(limits: LineConfig) -> type[Line]:
    """uvicorn's `http` class under these limits."""
    return type("Line", (Line,), {"limits": limits})


class UntilClose(RequestResponseCycle):
    """An exchange with a client of HTTP/1.0, who knows no chunks: an answer of unknown length ends with the connection."""

    is_open_ended = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.is_open_ended = all(name.lower() != b"content-length" for name, _ in message.get("headers", []))
            self.chunked_encoding = False if self.is_open_ended else None
        elif self.is_open_ended:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)
