"""Streamed tokens a second through one replica: the engine alone, and over HTTP by each way that a caller may come.

Many streams at once show what the way takes of the CPUs, one alone how late a token is. The caller is a thread of this process,
which does nothing but read its sockets; it takes its part of the same CPUs. How many tokens came in one event is told, too.
"""

from __future__ import annotations

import asyncio
import json
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from service.benchmark.alone import answered, make_engine, make_request
from service.benchmark.bare import report
from service.benchmark.proxies import WAYS
from service.engine.engine import Engine
from service.model.checkpoint import load
from service.threads import in_passing_thread

STREAMS = (1, 32, 64)
TOKENS = 200  # of each
REPEATS = 5
HEAD = "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{}"
EVENT, LAST = b"data: {", b"\r\n0\r\n\r\n"


@dataclass
class Round:
    """Some streams that were read at once, from the first call to the last byte."""

    tokens: int
    seconds: float
    events: int

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def streamed(port: int, count: int) -> Round:
    """So many streams over HTTP, each on a connection of its own."""
    asked = {"prompt": [7], "max_tokens": TOKENS, "stream": True, "ignore_eos": True, "temperature": 0, "attention": "dense"}
    body = json.dumps(asked)
    call, told = HEAD.format(len(body), body).encode(), {_connected(port): bytearray() for _ in range(count)}
    start = time.perf_counter()
    with selectors.DefaultSelector() as ready:
        for connection in told:
            connection.sendall(call)
            ready.register(connection, selectors.EVENT_READ)
        while ready.get_map():
            for key, _ in ready.select(60):
                got = told[key.fileobj]  # type: ignore[index]
                got += (piece := key.fileobj.recv(2**16))  # type: ignore[union-attr]
                if not piece or got.endswith(LAST):
                    ready.unregister(key.fileobj)
    seconds = time.perf_counter() - start
    for connection, got in told.items():
        connection.close()
        assert b"data: [DONE]\n\n" in got, bytes(got[-500:])
    return Round(count * TOKENS, seconds, sum(got.count(EVENT) for got in told.values()))


def _connected(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


async def alone(engine: Engine, count: int) -> Round:
    """The same by the engine's own streams."""
    start = time.perf_counter()
    await asyncio.gather(*(answered(engine, make_request(1, TOKENS, "dense")) for _ in range(count)))
    return Round(count * TOKENS, time.perf_counter() - start, 0)


async def _measure_alone() -> dict[int, float]:
    engine = make_engine(in_passing_thread(load))
    await engine.start()
    rounds = {count: [await alone(engine, count) for _ in range(REPEATS + 1)] for count in STREAMS}
    await engine.stop()
    return {count: median(each.rate for each in own[1:]) for count, own in rounds.items()}


def measure_streams() -> dict[str, Any]:
    """Tokens a second by way and streams."""
    found: dict[str, Any] = {"engine alone": asyncio.run(_measure_alone())}
    for count, rate in found["engine alone"].items():
        report(f"{count} streams of {TOKENS} tokens", "engine alone", f"{rate:6.0f} tokens a second")
    for name, way in WAYS.items():
        with way() as port:
            found[name] = {count: _measure(name, lambda count=count: streamed(port, count), count) for count in STREAMS}  # type: ignore[misc]
    return found


def _measure(name: str, run: Callable[[], Round], count: int) -> float:
    rounds = [run() for _ in range(REPEATS + 1)][1:]  # the first compiles its kernels
    rate, events = median(each.rate for each in rounds), sum(each.events for each in rounds)
    told = f"{rate:6.0f} tokens a second, {sum(each.tokens for each in rounds) / events:.1f} in an event"
    report(f"{count} streams of {TOKENS} tokens", name, told)
    return round(rate)
