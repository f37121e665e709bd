"""The wire tells what a server sent, however its bytes fall, and keeps no connection that it should not."""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.wire import MAX_HEAD_BYTES, Answer, CutOff, NotHttp, Unreachable, Wire

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nX-A: b\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\nx-trailer: 1\r\n\r\n"
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\n\r\nhello"
CONTINUED = b"HTTP/1.1 100 Continue\r\n\r\n" + OK
CLOSE = b"connection: close"

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """Sends `pieces` for each request that has come whole, then hangs up where `hangs_up`; keeps the requests."""

    def __init__(self, pieces: Sequence[bytes], hangs_up: bool = False) -> None:
        self.pieces, self.hangs_up = pieces, hangs_up
        self.requests: list[bytes] = []
        self.connections = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.requests.append(head + await reader.readexactly(_length(head)))
                for piece in self.pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
                if self.hangs_up:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def _length(head: bytes) -> int:
    (line,) = (line for line in head.split(b"\r\n") if line.startswith(b"content-length: "))
    return int(line.split(b": ")[1])


async def whole(wire: Wire, body: bytes = b"{}") -> tuple[Answer, bytes]:
    answer = await wire.post("/v1/completions", body)
    parts = []
    try:
        while part := await answer.part():
            parts.append(part)
    finally:
        wire.release(answer)
    return answer, b"".join(parts)


def asked(server: Serve, ask: Callable[[Wire], Awaitable[None]]) -> None:
    """Run `ask` with a wire to the server."""

    async def main() -> None:
        async with await asyncio.start_server(server, "127.0.0.1", 0) as listening:
            wire = Wire(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/base/", {"a": "b"})
            try:
                await ask(wire)
            finally:
                wire.close()

    asyncio.run(asyncio.wait_for(main(), 20))


@given(st.sampled_from([OK, CHUNKED, UNTIL_CLOSE, CONTINUED]), st.lists(st.integers(0, 120), max_size=6))
def test_an_answer_is_the_same_however_its_bytes_fall(sent: bytes, cuts: list[int]) -> None:
    ends = sorted({min(cut, len(sent)) for cut in cuts} | {0, len(sent)})
    pieces = [sent[start:end] for start, end in itertools.pairwise(ends)]

    async def ask(wire: Wire) -> None:
        answer, body = await whole(wire)
        assert (answer.status, body, answer.is_whole) == (200, b"hello", True)
        assert answer.arrived <= answer.ended <= time.monotonic()

    asked(Server(pieces, hangs_up=sent == UNTIL_CLOSE), ask)


def test_a_request_is_what_the_server_is_promised() -> None:
    server = Server([OK])

    async def ask(wire: Wire) -> None:
        await whole(wire, b'{"x": 1}')

    asked(server, ask)
    head, body = server.requests[0].split(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /base/v1/completions HTTP/1.1" and body == b'{"x": 1}'
    assert b"a: b" in lines and any(line.startswith(b"host: 127.0.0.1:") for line in lines)


@pytest.mark.parametrize(
    ("sent", "kind"),
    [
        (b"\x00\x01 no HTTP\r\n\r\n", NotHttp),
        (b"", CutOff),
        (b"HTTP/1.1 200 OK\r\ncontent-le", CutOff),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhello", CutOff),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhe\r\n", CutOff),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nhe\r\n", NotHttp),
        (b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n", NotHttp),
        (b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nxx", NotHttp),
        (b"HTTP/1.1 100 Continue\r\n\r\n", CutOff),
        (b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * (MAX_HEAD_BYTES + 1), NotHttp),
    ],
)
def test_what_is_no_whole_answer_is_named(sent: bytes, kind: type[Exception]) -> None:
    async def ask(wire: Wire) -> None:
        with pytest.raises(kind):
            await whole(wire)

    asked(Server([sent], hangs_up=True), ask)


def test_a_body_without_a_length_that_a_reset_cut_off_is_not_whole() -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(UNTIL_CLOSE)
        await writer.drain()
        await asyncio.sleep(0.05)
        linger = struct.pack("ii", 1, 0)  # closed with a reset
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()

    async def ask(wire: Wire) -> None:
        with pytest.raises(CutOff):
            await whole(wire)

    asked(reset, ask)


def test_no_connection_is_named() -> None:
    async def ask() -> None:
        with pytest.raises(Unreachable):
            await Wire("http://127.0.0.1:1", {}).post("/", b"")

    asyncio.run(ask())


def test_connections_are_used_again_and_never_shared() -> None:
    server = Server([OK])

    async def ask(wire: Wire) -> None:
        for _ in range(3):
            await whole(wire)
        assert server.connections == 1
        await asyncio.gather(whole(wire), whole(wire))
        assert server.connections == 2

    asked(server, ask)


@pytest.mark.parametrize("sent", [OK + b"more", OK + OK, OK.replace(b"X-A: b", CLOSE), OK.replace(b"1.1", b"1.0")])
def test_a_connection_with_something_left_or_that_ends_is_not_used_again(sent: bytes) -> None:
    server = Server([sent])

    async def ask(wire: Wire) -> None:
        for _ in range(2):
            assert (await whole(wire))[1] == b"hello"
        assert server.connections == 2

    asked(server, ask)


def test_a_connection_that_the_server_left_is_not_used_again() -> None:
    server = Server([OK], hangs_up=True)

    async def ask(wire: Wire) -> None:
        for _ in range(3):
            assert (await whole(wire))[1] == b"hello"
            await asyncio.sleep(0.05)
        assert server.connections == 3

    asked(server, ask)


def test_an_answer_that_is_given_up_takes_its_connection_along() -> None:
    server = Server([b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhel"])

    async def ask(wire: Wire) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await whole(wire)
        server.pieces = [OK]
        assert (await whole(wire))[1] == b"hello" and server.connections == 2

    asked(server, ask)
