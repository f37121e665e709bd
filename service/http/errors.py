"""Errors on the wire: one table from typed error to status, one shape (OpenAI's) for every one of them.

A caller's fault is a 4xx that says what is wrong and what is allowed. What nobody foresaw is a 500 without its details.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Match, Route

from service.engine.request import (
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    ModelFailed,
    OutOfMemory,
    PrefixNotKept,
    QueueFull,
    RequestError,
    Withdrawn,
    quoted,
)


class ModelNotFound(InvalidRequest):
    """No such model here."""

    code = "model_not_found"


class PrefixNotFound(InvalidRequest):
    """No such pin of this key's at the replica that answers."""

    code = "prefix_not_found"


class ChatNotOffered(InvalidRequest):
    """The model has no chat template, or none that is safe."""

    code = "chat_not_offered"


class TemplateRefused(InvalidRequest):
    """The model's chat template does not take these messages."""

    code = "chat_template_refused"


class WrongMediaType(InvalidRequest):
    """The body is not declared to be JSON."""

    code = "unsupported_media_type"


class WrongEncoding(InvalidRequest):
    """The body is packed."""

    code = "unsupported_content_encoding"


class BodyTooSlow(RequestError):
    """The body took longer than `http.body_timeout_seconds`."""

    code = "body_timeout"


class BodyTooLarge(InvalidRequest):
    """The body passes `http.max_body_bytes`."""

    code = "body_too_large"


class Unauthorized(RequestError):
    """No key, or a key that is not ours."""

    code = "invalid_api_key"


class RateLimited(QueueFull):
    """The key has used up what it may for now; others have not."""

    code = "rate_limit_exceeded"


class SwitchFailed(RequestError):
    """Not every replica came to serve the switch that was asked for; the former one is in force."""

    code = "switch_failed"


class NotReady(RequestError):
    """The replica has not been warmed up."""

    code = "not_ready"


class ClientGone(RequestError):
    """The caller hung up; nobody reads this answer, but the metrics do."""

    code = "client_gone"


class InternalError(RequestError):
    """A fault of ours."""

    code = "internal_error"


class ReplicaGone(RequestError):
    """The replica that was answering has died; the same call may be sent again."""

    code = "replica_gone"


STATUS: dict[type[RequestError], tuple[int, str]] = {
    InvalidRequest: (400, "invalid_request_error"),
    Unauthorized: (401, "authentication_error"),
    ModelNotFound: (404, "invalid_request_error"),
    PrefixNotFound: (404, "invalid_request_error"),
    BodyTooSlow: (408, "timeout_error"),
    DeadlineExceeded: (408, "timeout_error"),
    BodyTooLarge: (413, "invalid_request_error"),
    WrongEncoding: (415, "invalid_request_error"),
    WrongMediaType: (415, "invalid_request_error"),
    QueueFull: (429, "rate_limit_error"),
    ClientGone: (499, "client_error"),
    InternalError: (500, "server_error"),
    ModelFailed: (500, "server_error"),
    SwitchFailed: (500, "server_error"),
    ReplicaGone: (502, "server_error"),
    Draining: (503, "server_error"),
    NotReady: (503, "server_error"),
    OutOfMemory: (503, "server_error"),
    PrefixNotKept: (503, "server_error"),
    Withdrawn: (503, "server_error"),
}
"""Status and OpenAI's error type; an error not listed takes its nearest ancestor's."""

RETRY_AFTER_SECONDS = {Draining: 5.0, NotReady: 2.0, OutOfMemory: 5.0, PrefixNotKept: 5.0, Withdrawn: 60.0}
"""When to come back, for errors that do not compute it: a restarted or recovered replica is there by then."""


ETA_HEADER = "x-longserve-eta-seconds"
"""Of a full queue: predicted seconds until the work in front is done, where `Retry-After` has whole ones."""


def status_of(error: RequestError) -> tuple[int, str]:
    """Status and error type of a typed error."""
    return _status_of_class(type(error))


def codes(status: int) -> dict[str, str]:
    """The codes of the errors that answer with a status, each with its meaning."""
    found = [cls for cls in _descendants(RequestError) if _status_of_class(cls)[0] == status]
    return {cls.code: (cls.__doc__ or "").partition("\n")[0] for cls in found}


def _status_of_class(cls: type[RequestError]) -> tuple[int, str]:
    return next(STATUS[each] for each in cls.__mro__ if each in STATUS)


def _descendants(cls: type[RequestError]) -> Iterator[type[RequestError]]:
    for each in cls.__subclasses__():
        yield each
        yield from _descendants(each)


def body_of(error: RequestError) -> dict[str, Any]:
    """The error as OpenAI's clients expect it; what else we know stands under `details`."""
    _, kind = status_of(error)
    body: dict[str, Any] = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return {"error": body | ({"details": error.details} if error.details else {})}


def response_to(error: RequestError) -> Response:
    """The response that a typed error becomes."""
    status, _ = status_of(error)
    seconds = getattr(error, "retry_after_seconds", RETRY_AFTER_SECONDS.get(type(error)))
    headers = {} if seconds is None else {"retry-after": str(max(1, math.ceil(seconds)))}
    if isinstance(error, QueueFull):
        headers[ETA_HEADER] = f"{error.retry_after_seconds:.3f}"
    if isinstance(error, Draining):
        headers["connection"] = "close"  # whoever sends the next call on this one would find it cut off
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, WrongEncoding):
        headers["accept-encoding"] = "identity"
    return _json(body_of(error), status, headers)


def internal_error(request_id: str) -> Response:
    """The 500 of an error that nobody foresaw; the log has the rest."""
    return response_to(InternalError(f"internal error; the service's log names it under request id {request_id}"))


def install(app: FastAPI) -> None:
    """Make every error of the app speak this shape."""
    app.add_exception_handler(RequestError, _typed)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unforeseen)  # answered, then raised again to `edge`, which logs it


async def _typed(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return response_to(error)


async def _unforeseen(request: HttpRequest, _: Exception) -> Response:
    return internal_error(request.state.request_id)


async def _http(request: HttpRequest, error: Exception) -> Response:
    """404, 405 and their like, raised by the router; and the answer to OPTIONS, which it takes for a wrong method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        return _wrong_method(request)
    message = _no_route(request.url.path) if error.status_code == 404 else str(error.detail)
    return _json(shaped(error.status_code, message), error.status_code, dict(error.headers or {}))


POINTERS = {
    "/v1/responses": "send the conversation to /v1/chat/completions, which keeps no state between calls",
    "/v1/messages": "send the conversation to /v1/chat/completions",
}
"""Routes of others' that callers may look for here, and where to turn instead."""


def _no_route(path: str) -> str:
    pointer = next((told for start, told in POINTERS.items() if f"{path}/".startswith(f"{start}/")), "/docs lists the routes")
    return f"no route {quoted(path)}: {pointer}"


def _wrong_method(request: HttpRequest) -> Response:
    """The router itself would name the methods of the first route of this path alone."""
    routes = [each for each in request.app.routes if isinstance(each, Route)]
    methods = {method for each in routes if each.matches(request.scope)[0] is not Match.NONE for method in each.methods or ()}
    allowed = ", ".join((*sorted(methods | ({"HEAD"} if "GET" in methods else set())), "OPTIONS"))
    if request.method == "OPTIONS":
        return Response(status_code=204, headers={"allow": allowed})
    message = f"{quoted(request.method, 20)} is not allowed on {request.url.path}, allowed: {allowed}"
    return _json(shaped(405, message), 405, {"allow": allowed})


CODES = {404: "not_found", 405: "method_not_allowed", 408: "deadline_exceeded", 429: "queue_full", 500: "internal_error"}
"""The machine's word for a status that no typed error stands behind."""


def shaped(status: int, message: str) -> dict[str, Any]:
    """An error that is known by its status only, in OpenAI's shape."""
    kind = dict(STATUS.values()).get(status, "server_error" if status >= 500 else "invalid_request_error")
    code = CODES.get(status, "unavailable" if status >= 500 else "invalid_request")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _json(body: dict[str, Any], status: int, headers: dict[str, str]) -> Response:
    return Response(json.dumps(body), status, headers, "application/json")
