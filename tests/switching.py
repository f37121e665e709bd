"""Switches under an even load: what fails, who waits, what stays.

`.venv/bin/python -m tests.switching` serves `deploy/local.yaml` with two replicas and prints the figures: each switch by a
`longserve apply` of its own, 20 requests a second, every fourth a stream, latencies from the time a request was due.
"""

from __future__ import annotations

import concurrent.futures
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.http.client import Reply
from tests.serving import Service, serving, switch_of

RATE = 20.0  # requests a second
CALLERS = 64  # far more than are under way at once: a late answer delays no request
DEFAULTS = ("performer", "sliding_window", "dense")
REST_SECONDS = 3.0  # in which replicas that have nothing to do give free memory back


@dataclass(frozen=True)
class Asked:
    """One request: whether its answer came whole, and how long after it was due."""

    is_stream: bool
    status: int
    is_whole: bool
    seconds: float


def ask(service: Service, due: float, is_stream: bool) -> Asked:
    time.sleep(max(0.0, due - time.monotonic()))
    reply = service.complete("import os", max_tokens=8, ignore_eos=True, stream=is_stream)
    return Asked(is_stream, reply.status, reply.status == 200 and is_whole(reply, is_stream), time.monotonic() - due)


def is_whole(reply: Reply, is_stream: bool) -> bool:
    """Whether an answer came to its end; deltas that a reader was too slow for come as one."""
    if not is_stream:
        return bool(reply.json["choices"][0]["finish_reason"] == "length")
    *deltas, last = reply.events
    return last == "[DONE]" and bool(deltas) and deltas[-1]["choices"][0]["finish_reason"] == "length"


@contextmanager
def load(service: Service) -> Iterator[list[Asked]]:
    """Requests at an even rate for as long as the block lasts; all of their answers are in the list behind it."""
    ended, answers = threading.Event(), []
    with concurrent.futures.ThreadPoolExecutor(CALLERS) as callers:
        start, asked = time.monotonic(), []

        def send() -> None:
            while not ended.wait(1 / RATE / 2):
                while start + len(asked) / RATE < time.monotonic() + 0.1:
                    asked.append(callers.submit(ask, service, start + len(asked) / RATE, len(asked) % 4 == 0))

        sender = threading.Thread(target=send)
        sender.start()
        try:
            yield answers
        finally:
            ended.set()
            sender.join()
            answers += [future.result() for future in asked]


def two_replicas(data: Any) -> None:
    data["applications"][0]["deployments"][0]["num_replicas"] = 2


def files(service: Service, times: int) -> list[Path]:
    """So many config files, each of another default than the one before."""
    return [
        service.rewrite(
            lambda data, at=at: switch_of(data).update(default=DEFAULTS[at % len(DEFAULTS)]), service.file.with_stem(f"{at}")
        )
        for at in range(times)
    ]


def throw(paths: Sequence[Path]) -> None:
    """Apply files one after the other, from one process that need not start for each."""
    code = "import sys; from service.cli import main\nsys.exit(max(main(['apply', each]) for each in sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr


def resting_bytes(service: Service) -> float:
    """What the replicas take once they have rested and given free memory back."""
    time.sleep(REST_SECONDS)
    return sum(service.metric("longserve_process_resident_memory_bytes"))


def main(switches: int = 20) -> None:
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "two.yaml", two_replicas) as service:
        pids, paths = service.pids(), files(service, switches)
        with load(service):
            throw(paths[:3])
        with load(service) as calm:
            time.sleep(20)
        before, seconds = resting_bytes(service), []
        with load(service) as stormy:
            for path in paths:
                start = time.monotonic()
                done = service.apply(path)
                seconds.append(time.monotonic() - start)
                assert done.returncode == 0, done.stderr
        after = resting_bytes(service)
        tell("without switches", calm)
        tell(f"{switches} switches", stormy)
        for kind, name in ((False, "an answer"), (True, "a stream")):
            middle = statistics.median(each.seconds for each in calm if each.is_stream is kind)
            worst = max(each.seconds for each in stormy if each.is_stream is kind)
            print(f"worst added to {name}: {1e3 * (worst - middle):.0f} ms over the median without switches")
        print(f"apply: median {statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s")
        print(f"memory: {before / 2**20:.0f} -> {after / 2**20:.0f} MiB, {100 * (after / before - 1):+.1f} %")
        print(f"processes {'unchanged' if service.pids() == pids else 'CHANGED'}; {len(os.sched_getaffinity(0))} CPUs")


def tell(name: str, asked: Sequence[Asked]) -> None:
    bad = sum(each.status != 200 or not each.is_whole for each in asked)
    by: Callable[[int], float] = lambda share: 1e3 * statistics.quantiles((e.seconds for e in asked), n=100)[share - 1]  # noqa: E731
    worst = 1e3 * max(each.seconds for each in asked)
    print(f"{name}: {len(asked)} asked, {bad} failed, p50 {by(50):.0f} p99 {by(99):.0f} worst {worst:.0f} ms")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
