"""What stands between a caller and the engine: the service by uvicorn alone, behind HAProxy, and behind Serve's Python proxy.

Each in turn, in processes of its own on this machine, asked by callers in this process, which take their part of the same CPUs.
The Python proxy also call by call in turn with a deployment of Ray Serve's own that hands each body back.
"""

from __future__ import annotations

import asyncio
import http.client
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from statistics import median
from typing import Any

from service.benchmark.alone import one_token_seconds
from service.benchmark.bare import report
from service.benchmark.served import ask, free_port, serving

ONE_AFTER_ANOTHER = 400  # requests of one token by one caller
CALLERS, SECONDS = 8, 4.0  # of requests of one token at once
HAPROXY_PORTS = ("HAPROXY_STATS", "HAPROXY_METRICS", "FALLBACK_PROXY_HTTP")
PLAIN = """
import sys
from service.config import ServiceConfig, UserConfig
from service.plain import listening_in_thread
with listening_in_thread(ServiceConfig(), UserConfig()) as (url, _):
    print(url, flush=True)
    sys.stdin.read()
"""


BARE = """
import os, sys
os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = ""  # nothing of ours around it
from service import cluster
from service.child import Signals
from service.config import ServeFile
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

@serve.deployment
class Echo:
    async def __call__(self, request: Request) -> Response:
        return Response(await request.body(), media_type="application/json")

port = int(sys.argv[1])
application = {"args": {}, "deployments": [{"name": "longserve"}]}  # of which nothing is started
file = ServeFile.model_validate({"http_options": {"port": port}, "applications": [application]})
with cluster.running(file, 1, Signals()):
    serve.run(Echo.bind(), route_prefix="/")
    print(port, flush=True)
    sys.stdin.read()
"""


@contextmanager
def printing(script: str, *arguments: str) -> Iterator[int]:
    """The port that a script prints at a line's end when it serves there, until its input ends."""
    command = [sys.executable, "-c", script, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        yield int(process.stdout.readline().rpartition(":")[2])
    finally:
        process.stdin.close()
        process.wait(60)


def plain() -> AbstractContextManager[int]:
    """The port of one replica under uvicorn, without Ray."""
    return printing(PLAIN)


def throughput() -> Mapping[str, str]:
    """The environment of deploy/throughput.yaml, on ports that are free."""
    ports = {f"RAY_SERVE_{name}_PORT": str(free_port()) for name in HAPROXY_PORTS}
    return {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"} | ports


def one_by_one(port: int) -> list[float]:
    """Sorted seconds of requests of one token."""
    connection = _connected(port)
    return sorted([ask(connection, 1, 1, "dense") for _ in range(ONE_AFTER_ANOTHER + 50)][50:])


def requests_per_second(port: int) -> float:
    """Requests of one token that some callers get answered, each one after the other."""
    end = time.monotonic() + SECONDS

    def call(_: int) -> int:
        connection, count = _connected(port), 0
        while time.monotonic() < end:
            ask(connection, 1, 1, "dense")
            count += 1
        return count

    with ThreadPoolExecutor(CALLERS) as callers:
        return sum(callers.map(call, range(CALLERS))) / SECONDS


def _connected(port: int) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


WAYS: dict[str, Callable[[], AbstractContextManager[int]]] = {
    "uvicorn alone": plain,
    "HAProxy": lambda: serving(throughput()),
    "Python proxy": serving,
}
"""What may stand in front of a replica: each yields the port of a service of its own."""


def measure_proxies() -> dict[str, Any]:
    alone = asyncio.run(one_token_seconds())
    report("one token, the engine alone", "", f"{alone * 1e3:.2f} ms")
    ways = {name: _measure(name, way, alone) for name, way in WAYS.items()}
    return {"engine_ms": round(alone * 1e3, 3)} | ways | {"beside Ray's": _beside_ray(alone)}


def _beside_ray(alone: float) -> dict[str, float]:
    """One token through the Python proxy, in turn with Ray's own route there."""
    with serving() as ours, printing(BARE, str(free_port())) as theirs:
        connections, pairs = (_connected(ours), _connected(theirs)), list[tuple[float, ...]]()
        for _ in range(ONE_AFTER_ANOTHER + 50):
            pairs.append(tuple(ask(connection, 1, 1, "dense") for connection in connections))
    mine, bare = (median(each) * 1e3 for each in zip(*pairs[50:], strict=True))
    over = mine - alone * 1e3
    report("one token over the engine alone, p50", "beside Ray's", f"{over:.2f} ms; a route of Ray's own {bare:.2f} ms")
    return {"over_p50_ms": round(over, 2), "ray_p50_ms": round(bare, 2)}


def _measure(name: str, way: Callable[[], Any], alone: float) -> dict[str, float]:
    with way() as port:
        seconds, rate = one_by_one(port), requests_per_second(port)
    over = {share: (seconds[int(share / 100 * len(seconds))] - alone) * 1e3 for share in (50, 95)}
    report("one token over the engine alone, p50 and p95", name, f"{over[50]:.2f} and {over[95]:.2f} ms")
    report(f"requests of one token, {CALLERS} callers", name, f"{rate:.0f} a second")
    return {"over_p50_ms": round(over[50], 2), "over_p95_ms": round(over[95], 2), "rate": round(rate)}
