"""What bodies of 16 MiB cost a stream beside them: `python -m tests.http.benchmark [SECONDS [NAME ...]]`.

The service runs in a process of its own. One client reads a stream and notes the longest time between two tokens: alone, beside
two processes that only burn as much processor, and beside two callers who send one kind of body again and again. The second row
is what the scheduler of a machine of two cores costs; what a body costs beyond it is the service's.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from statistics import median
from urllib.parse import urlsplit

SERVICE = """
import sys
from service.config import HttpConfig, ServiceConfig, UserConfig
from service.plain import listening_in_thread
with listening_in_thread(ServiceConfig(threads=1), UserConfig()) as (url, _):
    print(url, flush=True)
    sys.stdin.read()
"""
MIB16 = 16 * 2**20
CALLERS = 2


def filled(unit: bytes, head: bytes = b'{"prompt":[', tail: bytes = b"]}", between: bytes = b",") -> bytes:
    """A body of 16 MiB made of one unit."""
    count = (MIB16 - len(head) - len(tail)) // (len(unit) + len(between))
    return head + between.join([unit] * count) + tail


def bodies() -> Iterator[tuple[str, str, bytes]]:
    """(name, path, body)."""
    text = filled(b"def f(x): return x\\n", b'{"prompt":"', b'"}', b"")
    yield "text that cannot fit", "/v1/completions", text
    yield (
        "text that may fit",
        "/v1/completions",
        json.dumps({"prompt": ["x = [1, 2]\n" * 110_000] * 12, "max_tokens": 1}).encode(),
    )
    yield "text to count", "/tokenize", text
    yield "token ids", "/v1/completions", filled(b"4095")
    yield "64 lists of ids", "/v1/completions", filled(b"[" + filled(b"7", b"", b"")[: 2 * 131_000 - 1] + b"]")
    yield "ids to text", "/detokenize", filled(b"7", b'{"tokens":[')
    yield "tiny strings", "/v1/completions", filled(b'"a"')
    yield "tiny lists", "/v1/completions", filled(b"[1]")
    yield "tiny objects", "/v1/completions", filled(b'{"a":1}')
    yield "many fields", "/v1/completions", b"{" + b",".join(b'"%d":0' % each for each in range(MIB16 // 12)) + b"}"
    yield "deep nesting", "/v1/completions", b'{"prompt":' + b"[" * (MIB16 // 2 - 20)
    yield "unknown field", "/v1/completions", filled(b"[1]", b'{"prompt":"a","max_tokens":1,"x":[')
    echo = {"prompt": [7] * 30_000, "echo": True, "logprobs": 20, "max_tokens": 1, "attention": "dense"}
    yield "long answer", "/v1/completions", json.dumps(echo).encode()
    yield "garbage", "/v1/completions", bytes(range(256)) * (MIB16 // 256)


@contextmanager
def service() -> Iterator[str]:
    """The URL of a service in a process of its own."""
    with subprocess.Popen([sys.executable, "-c", SERVICE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


def connection(url: str) -> http.client.HTTPConnection:
    host = urlsplit(url)
    return http.client.HTTPConnection(str(host.hostname), host.port, timeout=600)


def gaps(url: str, seconds: float) -> list[float]:
    """Seconds between the tokens of a stream that is read for so long."""
    line = connection(url)
    body = {"prompt": "import os", "max_tokens": 30_000, "stream": True, "ignore_eos": True}
    line.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    answer, times = line.getresponse(), []
    while not times or times[-1] - times[0] < seconds:
        if answer.readline().startswith(b"data"):
            times.append(time.perf_counter())
    answer.close()
    line.close()
    return [later - earlier for earlier, later in pairwise(times)]


@contextmanager
def callers(url: str, path: str, body: bytes, statuses: dict[int, int]) -> Iterator[None]:
    """Callers who send a body again and again."""
    over = threading.Event()

    def call() -> None:
        while not over.is_set():
            line = connection(url)
            try:
                line.request("POST", path, body, {"content-type": "application/json"})
                answer = line.getresponse()
                answer.read()
                statuses[answer.status] = statuses.get(answer.status, 0) + 1
            except OSError:
                statuses[0] = statuses.get(0, 0) + 1
            line.close()

    threads = [threading.Thread(target=call) for _ in range(CALLERS)]
    for each in threads:
        each.start()
    try:
        yield
    finally:
        over.set()
        for each in threads:
            each.join()


@contextmanager
def burners() -> Iterator[None]:
    """Processes that burn as much processor as the callers' work could."""
    found = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(CALLERS)]
    try:
        yield
    finally:
        for each in found:
            each.kill()
            each.wait()


def row(name: str, found: list[float], statuses: dict[int, int] | None = None) -> None:
    ordered = sorted(found)
    numbers = f"{median(found) * 1e3:9.1f} {ordered[int(len(ordered) * 0.99)] * 1e3:9.1f} {ordered[-1] * 1e3:9.1f}"
    print(f"{name:22} {len(found):7} {numbers}  {statuses or ''}", flush=True)


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 8.0
    print(f"{'beside the stream':22} {'tokens':>7} {'median':>9} {'p99':>9} {'max, ms':>9}  statuses of the bodies")
    with service() as url:
        row("nothing", gaps(url, seconds))
        with burners():
            row("two burning processes", gaps(url, seconds))
        for name, path, body in bodies():
            if sys.argv[2:] and name not in sys.argv[2:]:
                continue
            statuses: dict[int, int] = {}
            with callers(url, path, body, statuses):
                found = gaps(url, seconds)
            row(name, found, statuses)
        row("nothing", gaps(url, seconds))


if __name__ == "__main__":
    main()
