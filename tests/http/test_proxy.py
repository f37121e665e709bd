"""What stands around Serve's proxy, here around apps that fail as that does: every answer has an end, every error one shape."""

from __future__ import annotations

import asyncio
import json
import socket
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from starlette.types import Message, Receive, Scope, Send

from service.http.errors import STATUS, ReplicaGone, body_of
from service.http.proxy import GONE, Front, hang_up
from service.http.tickets import HEADER, TICKETS
from tests.http.client import Reply

STREAM, JSON, PLAIN = "text/event-stream; charset=utf-8", "application/json", "text/plain"


def start(status: int, content_type: str) -> Message:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type.encode())]}


def body(text: str, more: bool) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


def answer(*messages: Message) -> tuple[Reply, bool]:
    """What a caller gets of an app that sends these messages and returns, and whether that has an end."""
    got: list[Message] = []

    async def app(_: Scope, __: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    async def keep(message: Message) -> None:
        got.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    scope: Any = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    asyncio.run(Front(app)(scope, receive, keep))
    headers = {name.decode(): value.decode() for name, value in got[0]["headers"]}
    text = b"".join(each["body"] for each in got[1:]).decode()
    return Reply(got[0]["status"], headers, text), not got[-1].get("more_body", False)


def test_a_caller_whose_replica_dies_before_it_answers_is_told() -> None:
    reply, has_ended = answer()
    assert (reply.status, reply.error["code"], has_ended) == (STATUS[ReplicaGone][0], "replica_gone", True)


def test_a_stream_whose_replica_dies_ends_with_an_error_and_without_done() -> None:
    reply, has_ended = answer(start(200, STREAM), body('data: {"a": 1}\n\n', True))
    assert (reply.status, reply.events, has_ended) == (200, [{"a": 1}, body_of(GONE)], True)


@pytest.mark.parametrize(
    ("messages", "at"),
    [
        ((start(200, JSON), body('{"a": ', True), body("1}", False)), 2),
        ((start(200, STREAM), body('data: {"a": 1}\n\n', True), body("data: [DONE]\n\n", True), body("", False)), 2),
        ((start(429, PLAIN), body("not now", False)), 0),  # in our shape, so it is passed on at its end
        ((start(200, STREAM), body('data: {"a": 1}\n\n', True)), 2),  # its replica has died
    ],
)
def test_a_call_is_over_before_its_caller_can_know_it(messages: tuple[Message, ...], at: int) -> None:
    """And underway until then."""
    underway = []

    async def app(scope: Scope, _: Receive, send: Send) -> None:
        nonlocal ticket
        ticket = dict(scope["headers"])[HEADER].decode()
        for message in messages:
            await send(message)

    async def look(_: Message) -> None:
        underway.append(ticket in TICKETS)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    ticket = ""
    scope: Any = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [(HEADER, b"a caller's own")]}
    asyncio.run(Front(app)(scope, receive, look))
    assert ticket != "a caller's own" and underway[:at] == [True] * at and not any(underway[at:])


def test_a_call_that_breaks_is_over() -> None:
    async def app(scope: Scope, _: Receive, __: Send) -> None:
        tickets.append(dict(scope["headers"])[HEADER].decode())
        assert tickets[-1] in TICKETS
        raise asyncio.CancelledError

    tickets: list[str] = []
    scope: Any = {"type": "http", "method": "GET", "path": "/v1/models", "headers": []}
    for _ in range(2):
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(Front(app)(scope, None, None))  # type: ignore[arg-type]
    assert len(set(tickets)) == 2 and not any(each in TICKETS for each in tickets)


def test_a_whole_stream_is_passed_on_as_it_is() -> None:
    reply, has_ended = answer(
        start(200, STREAM), body('data: {"a": 1}\n\n', True), body("data: [DONE]\n\n", True), body("", False)
    )
    assert (reply.events, has_ended) == ([{"a": 1}, "[DONE]"], True)


@pytest.mark.parametrize(("more", "has_ended"), [(True, False), (False, True)])
def test_json_gets_nothing_added_so_that_half_of_it_does_not_look_whole(more: bool, has_ended: bool) -> None:
    assert answer(start(200, JSON), body('{"a": 1}', more)) == (Reply(200, {"content-type": JSON}, '{"a": 1}'), has_ended)


@pytest.mark.parametrize(("status", "retries"), [(408, False), (429, True), (500, False), (503, True)])
def test_an_error_of_serves_own_has_our_shape_and_says_when_to_come_again(status: int, retries: bool) -> None:
    reply, has_ended = answer(start(status, PLAIN), body("not ", True), body("now", False))
    assert (reply.status, reply.error["message"], has_ended) == (status, "not now", True)
    assert ("retry-after" in reply.headers) == retries
    assert json.loads(reply.text) == reply.json


def test_a_proxy_that_hangs_up_answers_what_has_come_and_takes_nothing_more() -> None:
    asyncio.run(hung_up())


async def hung_up() -> None:
    """Three callers of a proxy that ends: one waits for an answer, one is idle, one comes too late."""
    began, goes_on = asyncio.Event(), asyncio.Event()

    async def app(_: Scope, __: Receive, send: Send) -> None:
        began.set()
        await goes_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"whole"})

    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="critical"))
    serving = asyncio.create_task(server.serve([listener]))
    started = asyncio.get_running_loop().create_future()
    started.set_result((serving, server))
    proxy = SimpleNamespace(_start_http_server_task=started)

    reader, writer = await asyncio.open_connection(*address)
    idle, _ = await asyncio.open_connection(*address)
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    await began.wait()
    assert not hang_up(proxy)
    assert await idle.read() == b""
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*address)
    assert not hang_up(proxy)
    goes_on.set()
    assert (await reader.read()).endswith(b"whole")
    await serving
    assert hang_up(proxy)
