"""python -m tests.loadtests.overhead: what the generator itself adds to a latency that is known.

A server in a process of its own answers after a constant time; what is measured beyond it is the generator's and the
sockets'. A bare socket, written to and waited for by a thread that does nothing else, shows what is the sockets'. Printed for
each rate: the median of the errors, their 95th percentile, the delay of the sends, and what the gates say. Then the exponent
that a quadratic law is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import yaml

from loadtests import generator, measures, result
from loadtests.analysis import analyse
from loadtests.client import Ask
from loadtests.generator import Interrupt, Load, Traffic
from loadtests.run import main as run
from loadtests.workload import body
from tests.loadtests.stub import MODEL, Stub, serving

SECONDS = 0.02
COUNT = 500
RATES = (10, 50, 200, 400)


async def trial(url: str, rate: float, processes: int) -> None:
    """Send at a rate and print how far off the measured latencies are."""
    raw = body("completions", MODEL, "x" * 400, 8)
    asks = tuple(Ask("requests", place, "completions", raw, 100, place / rate) for place in range(COUNT))
    load = Load(url, {}, 10.0, 1000, (Traffic("requests", asks),))
    sent = await generator.run(load, processes, Interrupt(), lambda _: None)
    found = measures.measure("requests", sent.records, None)
    late, delay = (found.latency.values() - SECONDS) * 1e3, found.delay.values() * 1e3
    failed = [gate.name for gate in measures.gates(found, True, sent) if not gate.passed]
    print(
        f"{rate:5.0f} requests/s, {processes} process(es), {found.ok} answered: error median {np.median(late):.2f} ms, "
        f"p95 {np.quantile(late, 0.95):.2f} ms; sends late by median {np.median(delay):.3f} ms, "
        f"p99 {np.quantile(delay, 0.99):.2f} ms" + (f"; INVALID: not {', '.join(failed)}" if failed else "; VALID"),
        flush=True,
    )


def bare(url: str, rate: float) -> None:
    """The same error of a blocking socket."""
    address = urlsplit(url)
    raw = body("completions", MODEL, "x" * 400, 8)
    request = b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw
    late = []
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(100):
            time.sleep(1 / rate - SECONDS)
            sent = time.monotonic()
            connection.sendall(request)
            connection.recv(2**16)
            late.append((time.monotonic() - sent - SECONDS) * 1e3)
    print(
        f"   {rate:.0f} requests/s, a bare socket: error median {np.median(late):.2f} ms, p95 {np.quantile(late, 0.95):.2f} ms"
    )


def exponent() -> None:
    """A sweep of a stub whose latency is quadratic in the length."""
    lengths = {"kind": "list", "tokens": [2000, 4000, 8000]}
    asked = {"name": "quadratic", "kind": "sweep", "lengths": lengths, "loads": [{"kind": "in_flight", "requests": 1}]}
    with serving(Stub(seconds={"": lambda tokens: 1.5e-8 * tokens**2})) as url, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quadratic.yaml"
        path.write_text(yaml.safe_dump(asked | {"seconds": 1.0, "repeats": 3}))
        with contextlib.redirect_stdout(None):
            run(["sweep", str(path), "--url", url, "--out", folder])
        (report,) = Path(folder).glob("*/report.json")
        (growth,) = analyse(result.load(report)).growths
    assert growth.latency is not None, "three lengths were measured"
    print(
        f"a quadratic law gets the exponent {growth.latency.value:.3f} ({growth.latency.low:.3f} to {growth.latency.high:.3f})"
    )


def main() -> None:
    command = [sys.executable, "-m", "tests.loadtests.constant", "--seconds", str(SECONDS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stub:
        assert stub.stdout is not None, "a pipe was asked for"
        url = stub.stdout.readline().strip()
        try:
            bare(url, 10)
            bare(url, 40)
            for rate in RATES:
                asyncio.run(trial(url, rate, 1))
            asyncio.run(trial(url, RATES[-1], 2))
        finally:
            stub.terminate()
    exponent()


if __name__ == "__main__":
    main()
