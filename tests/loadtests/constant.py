"""A server whose latency is known to some ten microseconds: it answers a constant time after a request's last byte came.

The stub of the other tests spends half a millisecond of its own on a request, as much as what is to be measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time

CHOICE = {"index": 0, "finish_reason": "length", "text": "x " * 8}
BODY = json.dumps({"choices": [CHOICE], "usage": {"prompt_tokens": 100, "completion_tokens": 8}}).encode()
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY
AWAKE_SECONDS = 0.0015  # a timer of the loop is late by up to a millisecond: the rest is waited out awake


class Constant(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._received = seconds, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        due = time.monotonic() + self._seconds
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        lengths = (line.partition(b":")[2] for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
        if end and len(body) >= int(next(lengths)):
            self._received = b""
            asyncio.get_running_loop().call_later(self._seconds - AWAKE_SECONDS, self._answer, due)

    def _answer(self, due: float) -> None:
        if time.monotonic() < due:
            asyncio.get_running_loop().call_soon(self._answer, due)
        else:
            self._transport.write(ANSWER)


async def serve(seconds: float) -> None:
    """Serve on a free port of loopback, and print the URL."""
    server = await asyncio.get_running_loop().create_server(lambda: Constant(seconds), "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, required=True)
    asyncio.run(serve(parser.parse_args().seconds))
