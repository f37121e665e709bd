"""python -m tests.loadtests.overhead: what the generator itself adds to a latency that is known.

A stub in a process of its own answers after a constant time; what is measured beyond it is the generator's, the sockets'
and the stub's. Printed for each rate: the median of the errors, their 95th percentile, the delay of the
sends, and what the gates say.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys

import numpy as np

from loadtests import generator, measures
from loadtests.client import Ask
from loadtests.generator import Interrupt, Load, Traffic
from loadtests.workload import body
from tests.loadtests.stub import MODEL

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


def main() -> None:
    command = [sys.executable, "-m", "tests.loadtests.stub", "--seconds", str(SECONDS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stub:
        assert stub.stdout is not None, "a pipe was asked for"
        url = stub.stdout.readline().strip()
        try:
            for rate in RATES:
                asyncio.run(trial(url, rate, 1))
            asyncio.run(trial(url, RATES[-1], 2))
        finally:
            stub.terminate()


if __name__ == "__main__":
    main()
