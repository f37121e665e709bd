"""What stands around Ray Serve's proxy, in the proxy's own process: our connection limits, one shape of error, an end for an
answer whose replica has died, what the router has to know of a prompt, and no way to take a call out of the service's hands.

Serve calls `middlewares` when a proxy starts, for the environment variable RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it
(`service/cluster.py` sets it; set it on every node where Ray was started otherwise).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS

from service.config import LineConfig
from service.engine.request import InvalidRequest
from service.http import beginning, line, tickets
from service.http.beginning import read_beginning
from service.http.errors import ReplicaGone, body_of, response_to, shaped
from service.http.tickets import TICKETS

LIMITS = "LONGSERVE_LINE"
"""The environment variable that brings a `LineConfig` as JSON to the proxy."""

RAYS_OWN = "/-/"
"""Paths that Serve's proxy answers for itself, health and routes: their answers stay as they are."""

RENAMED = {b"x-request-timeout-seconds": b"x-longserve-timeout-seconds"}
"""Serve would answer a timeout itself, while the replica goes on; the service's own header says the same to the engine."""

DROPPED = frozenset({b"x-request-disconnect-disabled", beginning.HEADER, tickets.HEADER})
"""Would let a call go on after its caller has left; are the router's own."""

DONE = b"data: [DONE]\n\n"
"""By which the caller of a stream knows its end, a moment before the connection tells it."""

GONE = ReplicaGone("the replica that was answering has died; the same call may be sent again")
"""What Serve's proxy tells nobody: it leaves the caller of a dead replica without an answer, or with half of one."""


def middlewares() -> list[Middleware]:
    """Put our connections under the proxy that is about to start; returns what stands around its app."""
    limits = LineConfig.model_validate_json(os.environ.get(LIMITS, "{}"))
    line.Line.limits = limits
    HTTP_PROTOCOLS["auto"] = f"{line.__name__}:{line.Line.__name__}"  # what a uvicorn.Config without a wish of its own takes
    return [Middleware(Front)]


def hang_up(proxy: Any) -> bool:
    """Have Serve's proxy, the actor, take no call more, answer those that it has, and close its lines; whether that is done.

    It keeps its server in a private task; uvicorn's own end is the orderly one.
    """
    serving, server = proxy._start_http_server_task.result()
    server.should_exit = True
    return bool(serving.done())


class Front:
    """Wraps the proxy's app."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(RAYS_OWN):
            await self.app(scope, receive, send)
            return
        if _are_text(scope["headers"]):
            marks, receive = await read_beginning(scope, receive)
            ticket = TICKETS.issue()
            headers = [*_service_headers(scope["headers"]), (tickets.HEADER, ticket.encode())]
            headers += [(beginning.HEADER, b",".join(marks))] if marks else []
            answer = Reshaped(scope["path"], send, lambda: TICKETS.end(ticket))
            try:
                await self.app({**scope, "headers": headers}, receive, answer)
            finally:
                TICKETS.end(ticket)
            if not answer.has_begun:
                await response_to(GONE)(scope, receive, send)
            elif answer.is_open_stream:
                await send({"type": "http.response.body", "body": b"data: " + json.dumps(body_of(GONE)).encode() + b"\n\n"})
        else:
            await response_to(InvalidRequest("header values must be UTF-8"))(scope, receive, send)


class Reshaped:
    """A `send` that gives the proxy's plain errors the shape of the service's, and knows how far the answer has come."""

    def __init__(self, path: str, send: Send, ends: Callable[[], None]) -> None:
        """`ends` is called before the caller can know that the answer has ended."""
        self.has_begun = False
        self.is_open_stream = False
        self._path = path
        self._send, self._ends = send, ends
        self._start: Message | None = None  # of a plain error, held back until its text is known
        self._text = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            self.is_open_stream = _content_type(message).startswith("text/event-stream")
        elif not message.get("more_body", False):
            self.is_open_stream = False
        if message["type"] == "http.response.body" and (
            not message.get("more_body") or message.get("body", b"").endswith(DONE)
        ):
            self._ends()
        if message["type"] == "http.response.start" and _is_plain_error(message):
            self._start = message
        elif self._start is None:
            await self._send(message)
        else:
            self._text += message.get("body", b"")
            if not message.get("more_body", False):
                await self._finish(self._start)

    async def _finish(self, start: Message) -> None:
        status, told = start["status"], self._text.decode(errors="replace")
        message = f"no route {self._path[:200]!r}" if status == 404 else told or "the service could not answer"
        body = json.dumps(shaped(status, message)).encode()
        headers = MutableHeaders(scope=start)
        headers["content-type"], headers["content-length"] = "application/json", str(len(body))
        if status in (429, 503):
            headers.setdefault("retry-after", "1")
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})


def _is_plain_error(start: Message) -> bool:
    return start["status"] >= 400 and not _content_type(start).startswith("application/json")


def _content_type(start: Message) -> str:
    return Headers(raw=list(start["headers"])).get("content-type", "")


def _are_text(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether Serve's proxy can read them: it fails on others."""
    try:
        b"".join(value for _, value in headers).decode()
    except UnicodeDecodeError:
        return False
    return True


def _service_headers(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The caller's headers without those that would steer Serve's proxy past the service."""
    given, kept = {name for name, _ in headers}, []
    for name, value in headers:
        ours = RENAMED.get(name, name)
        if name not in DROPPED and (ours == name or ours not in given):
            kept.append((ours, value))
    return kept
