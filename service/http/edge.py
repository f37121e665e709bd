"""The outer edge of the app, where every call passes: request id, API key, bounded body, HEAD, count, and the last-resort 500.

Plain ASGI: middleware that wraps requests and responses in objects of its own breaks streams and disconnects.
"""

from __future__ import annotations

import logging
import re
import uuid
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.engine.request import RequestError
from service.http import admin
from service.http.auth import ApiKeys
from service.http.errors import internal_error, response_to
from service.http.face import Host
from service.http.intake import Intake, Share

logger = logging.getLogger("longserve.http")
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass
class Exchange:
    """One call on its way through: what is known of its answer so far."""

    request_id: str
    share: Share
    status: int | None = None  # None until the response has begun


class Edge:
    """Wraps the app. `echoes_request_id` is False where a proxy in front already answers with the id."""

    def __init__(
        self, app: ASGIApp, host: Host, keys: ApiKeys, echoes_request_id: bool = True, operators: ApiKeys | None = None
    ) -> None:
        """`operators`: the keys that let into /admin, which know no other route; None: there is no /admin."""
        self.app = app
        self.operators = operators
        self.host = host
        self.keys = keys
        self.intake = Intake(host.config)
        self.echoes_request_id = echoes_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange, method = Exchange(_request_id(Headers(scope=scope)), self.intake.open()), scope["method"]
        # the routes know GET; whoever sends the answer of a HEAD leaves its body out, by the method of its own scope
        scope = {**scope, "method": "GET" if method == "HEAD" else method}
        scope["state"] = {**scope.get("state", {}), "request_id": exchange.request_id}
        try:
            await self._exchange(scope, receive, self._watched(send, exchange), exchange)
        finally:
            exchange.share.close()
            route = getattr(scope.get("route"), "path", "unmatched")
            self.host.responded(route, method, exchange.status or 499)

    async def _exchange(self, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> None:
        """Let the call in and answer it; whatever goes wrong before the response begins becomes a response."""
        refusal: Response
        try:
            keys = self.operators if self.operators is not None and scope["path"].startswith(admin.PREFIX) else self.keys
            scope["state"]["owner"] = keys.check(scope["path"], Headers(scope=scope))
            body = await exchange.share.read(Headers(scope=scope), receive)
            if body is not None:
                await self.app(scope, _replay(body, receive), send)
            return
        except RequestError as error:
            refusal = response_to(error)
        except Exception:  # the outer edge: an error of ours must not take the connection's other calls down
            logger.exception("request %s failed", exchange.request_id)
            refusal = internal_error(exchange.request_id)
        if exchange.status is None:
            await refusal(scope, receive, send)

    def _watched(self, send: Send, exchange: Exchange) -> Send:
        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                exchange.share.close()  # what was asked has been read by now
                if self.echoes_request_id:
                    MutableHeaders(scope=message)["x-request-id"] = exchange.request_id
            await send(message)

        return watched


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body whole, and then what the server says: the caller's leaving."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _request_id(headers: Headers) -> str:
    """The caller's `x-request-id` when it is printable and short, else a new one."""
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
