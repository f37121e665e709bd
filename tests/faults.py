"""What callers see of each fault under half the load that the service takes: `python -m tests.faults [NAME ...]`.

Starts `longserve serve` with two replicas, measures its capacity, sends half of that, open loop, and has one fault after the
other happen to it; then starts it in ways that cannot work. A table tells of each fault what became of the requests sent from
then until all was well again (`tests/load.py`: answered, refused, failed or lost), and after how many seconds that was. Exit
status 1 when a request was lost, a fault was not recovered from, or a start that cannot work was not refused with a reason.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from tests.clock import Clock, make_clock
from tests.load import OUTCOMES, Load
from tests.serving import LOCAL, Service, are_gone, descendants, free_port, serving

LOAD = 0.5  # of the capacity
BEFORE_SECONDS, AFTER_SECONDS = 2.0, 5.0  # of load around a fault and its recovery
RECOVERED_SECONDS = 180.0
TIMEOUT_SECONDS = 120.0  # what has not ended by then is lost
BUDGET_BYTES = 128 << 20  # of a replica; small, so that four times as much is asked for soon
FULL_SECONDS, SEND_SECONDS = 5.0, 10
LONG_TOKENS, LONG_BYTES = 8192, 28 << 20  # a dense request, and what it reserves
SLOW_READERS, HALF_OPEN, SCRAPERS = 16, 200, 16
REPLICA, CONTROLLER, PROXY, STORE = "ray::ServeReplica", "ray::ServeController", "ray::ProxyActor", "gcs_server"


def settings(data: Any) -> None:
    application = data["applications"][0]
    application["args"] |= {"threads": 1, "drain_seconds": 20, "log_level": "info", "log_file": os.devnull}
    application["args"]["engine"]["memory_budget_bytes"] = BUDGET_BYTES
    application["args"]["http"] |= {"workers": 1}
    application["args"]["http"]["line"] |= {"head_timeout_seconds": 5, "send_timeout_seconds": SEND_SECONDS}
    application["deployments"][0] |= {"num_replicas": 2, "health_check_period_s": 2, "health_check_timeout_s": 5}


def processes(service: Service, name: str) -> list[int]:
    """The service's processes of a name, as Ray calls them."""
    found = []
    for pid in sorted(descendants(service.process.pid)):
        with contextlib.suppress(OSError):
            if name in Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0]:
                found.append(pid)
    return found


def address(service: Service) -> tuple[str, int]:
    host, _, port = service.url.removeprefix("http://").partition(":")
    return host, int(port)


def is_whole(service: Service) -> bool:
    """Whether the service answers with two replicas that hold nothing back."""
    try:
        return sum(service.metric("longserve_replicas", state="answered")) == 2 and service.get("/ready").status == 200
    except (OSError, ValueError):
        return False


Fault = Callable[[Load], Awaitable[Callable[[], bool]]]
"""Has it happen; returns whether it is over, to be asked until it is so."""


def signalled(name: str, number: signal.Signals) -> Fault:
    """A process gets a signal; it is over when another one has its place."""

    async def fault(load: Load) -> Callable[[], bool]:
        victim = processes(load.service, name)[0]
        os.kill(victim, number)
        return lambda: victim not in processes(load.service, name) and len(processes(load.service, name)) > 0

    return fault


async def slow_readers(load: Load) -> Callable[[], bool]:
    """Streams whose callers stop reading; the service hangs up on them, and their bytes come back."""
    body = {"prompt": "import os", "max_tokens": 30_000, "stream": True, "ignore_eos": True, "attention": "sliding_window"}
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    lines = [socket.socket() for _ in range(SLOW_READERS)]

    def begin(line: socket.socket) -> None:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # else the kernel reads megabytes in the caller's stead
        line.connect(address(load.service))
        line.sendall(head.encode() + raw)
        assert b" 200 " in line.recv(500)

    await asyncio.gather(*(asyncio.to_thread(begin, line) for line in lines))

    def over() -> bool:  # the lines are open until then: what ends these streams is not their callers' leaving
        return bool(lines) and sum(load.service.metric("longserve_requests_running")) < SLOW_READERS

    return over


async def half_open(load: Load) -> Callable[[], bool]:
    """Connections that begin a request and never end it; the service hangs up on all of them."""
    lines = [socket.create_connection(address(load.service)) for _ in range(HALF_OPEN)]
    for line in lines:
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n")
        line.setblocking(False)

    def hung_up(line: socket.socket) -> bool:
        try:
            return line.recv(65536) is not None
        except BlockingIOError:
            return False
        except OSError:
            return True

    return lambda: all(hung_up(line) for line in lines)


async def over_budget(load: Load) -> Callable[[], bool]:
    """Four times the bytes that both replicas have for requests, asked for in one moment."""
    for number in range(4 * 2 * BUDGET_BYTES // LONG_BYTES):
        load.start({"prompt": [7 + number] * LONG_TOKENS, "max_tokens": 1, "attention": "dense"})
    return lambda: sum(load.service.metric("longserve_requests_waiting")) < 4


async def full_disk(load: Load) -> Callable[[], bool]:
    """For some seconds no file can grow that those on a request's way write: its log lines, Ray's of it."""
    pids = [pid for name in (REPLICA, PROXY, CONTROLLER) for pid in processes(load.service, name)]
    limits = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids}
    for pid, (_, hard) in limits.items():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    await asyncio.sleep(FULL_SECONDS)
    for pid, limit in limits.items():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)
    return lambda: True


async def clock_jumps(load: Load) -> Callable[[], bool]:
    """The wall clock of every process of the service, Ray's too, goes an hour ahead, then an hour behind, then right again."""
    clock = Clock(load.service.file.with_name("clock"), {})
    for seconds in (3600, -3600, 0):
        clock.set(seconds)
        await asyncio.sleep(FULL_SECONDS)
    return lambda: True


async def scrapers(load: Load) -> Callable[[], bool]:
    """Half of some scrapers leave in the middle of /metrics, half stop reading it; both ask past the page that is kept."""
    head = b"GET /metrics HTTP/1.1\r\nhost: x\r\ncache-control: no-cache\r\n\r\n"
    lines = [socket.socket() for _ in range(SCRAPERS)]

    def begin(line: socket.socket, leaves: bool) -> None:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect(address(load.service))
        line.sendall(head)
        assert b" 200 " in line.recv(500)
        if leaves:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, as of a machine that died
            line.close()

    await asyncio.gather(*(asyncio.to_thread(begin, line, index % 2 == 0) for index, line in enumerate(lines)))
    await asyncio.sleep(SEND_SECONDS + 2)  # hung up on by then
    return lambda: bool(lines)


async def update(load: Load) -> Callable[[], bool]:
    """`longserve apply --restart` of a file that says another model: every replica is replaced, one after the other."""
    before = processes(load.service, REPLICA)
    load.service.rewrite(lambda data: data["applications"][0]["args"].update(max_length=16_384))
    done = await asyncio.to_thread(load.service.cli, "apply", "--restart", str(load.service.file))
    assert done.returncode == 0, done.stderr
    return lambda: not set(before) & set(processes(load.service, REPLICA))


FAULTS: dict[str, Fault] = {
    "replica killed": signalled(REPLICA, signal.SIGKILL),
    "replica stalled": signalled(REPLICA, signal.SIGSTOP),
    "controller killed": signalled(CONTROLLER, signal.SIGKILL),
    "proxy killed": signalled(PROXY, signal.SIGKILL),
    "slow readers": slow_readers,
    "half-open connections": half_open,
    "four times the bytes": over_budget,
    "full disk": full_disk,
    "clock jumps": clock_jumps,
    "scrapers hang": scrapers,
    "rolling update": update,
}


async def under(fault: Fault, load: Load, rate: float) -> float | None:
    """Seconds until all is well again after a fault; None when that takes too long."""
    load.tally, load.words, stopped = Counter(), Counter(), asyncio.Event()
    sending = asyncio.create_task(load.run(rate, stopped))
    await asyncio.sleep(BEFORE_SECONDS)
    began = time.monotonic()
    over, seconds = await fault(load), None
    while seconds is None and time.monotonic() - began < RECOVERED_SECONDS:
        await asyncio.sleep(0.2)
        with contextlib.suppress(OSError, ValueError):
            if await asyncio.to_thread(over) and await asyncio.to_thread(is_whole, load.service):
                seconds = time.monotonic() - began
    await asyncio.sleep(AFTER_SECONDS)
    stopped.set()
    await sending
    return seconds


ENDS = {"SIGTERM": 0, "Ray's store killed": 1}
"""What ends the service, and with which status: a supervisor starts it again after 1."""


async def ended(load: Load, rate: float, name: str) -> float | None:
    """Seconds that the service takes to end, told to or because its Ray has died; None when it does not end in order."""
    load.tally, load.words, stopped = Counter(), Counter(), asyncio.Event()
    process, below = load.service.process, descendants(load.service.process.pid)
    sending = asyncio.create_task(load.run(rate, stopped))
    await asyncio.sleep(BEFORE_SECONDS)
    began = time.monotonic()
    if name == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    else:
        os.kill(processes(load.service, STORE)[0], signal.SIGKILL)
    try:
        code = await asyncio.to_thread(process.wait, RECOVERED_SECONDS)
    except subprocess.TimeoutExpired:
        code = None
    seconds = time.monotonic() - began
    stopped.set()
    await sending
    return seconds if code == ENDS[name] and are_gone(below) else None


def row(name: str, load: Load, seconds: float | None) -> None:
    told = "never" if seconds is None else f"{seconds:.1f}"
    print(f"{name:<24}" + "".join(f"{load.tally[each]:>9}" for each in OUTCOMES) + f"{told:>9}", flush=True)
    for words, number in load.words.most_common(3):
        print(f"    {number} x {words}")


async def run(service: Service, names: Sequence[str], seed: int) -> bool:
    """All faults on one service; whether nothing was lost and all recovered from."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        load = Load(service, session, seed)
        rate = LOAD * await load.capacity()
        print(f"{rate:.1f} requests/s, {LOAD:.0%} of the capacity; seconds are those to recover, or to end")
        print(f"{'fault':<24}" + "".join(f"{each:>9}" for each in OUTCOMES) + f"{'seconds':>9}")
        well = True
        for name in names:
            seconds = await (ended(load, rate, name) if name in ENDS else under(FAULTS[name], load, rate))
            row(name, load, seconds)
            well = well and seconds is not None and not load.tally["lost"]
        return well


def running(names: Sequence[str], seed: int) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        environment = make_clock(Path(folder)).environment if "clock jumps" in names else os.environ
        with serving(Path(folder) / "faults.yaml", settings, env=environment) as service:
            return asyncio.run(run(service, names, seed))


@contextmanager
def corrupt_checkpoint(folder: Path) -> Iterator[Callable[[Any], None]]:
    shutil.copytree(Path(LOCAL).parent.parent / "service" / "model" / "embedded", folder / "corrupt")
    weights = folder / "corrupt" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    yield lambda data: data["applications"][0]["args"].update(model=str(folder / "corrupt"))


@contextmanager
def too_little_memory(folder: Path) -> Iterator[Callable[[Any], None]]:
    yield lambda data: data["applications"][0]["args"]["engine"].update(memory_budget_bytes=1 << 50)


@contextmanager
def port_taken(folder: Path) -> Iterator[Callable[[Any], None]]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield lambda data: data["http_options"].update(port=other.getsockname()[1])


STARTS = {"corrupt checkpoint": corrupt_checkpoint, "too little memory": too_little_memory, "port taken": port_taken}


def refused(name: str) -> bool:
    """Whether a start that cannot work ends by itself with status 1 and a reason in a line."""
    with tempfile.TemporaryDirectory() as folder, STARTS[name](Path(folder)) as change:
        data = yaml.safe_load(LOCAL.read_text())
        data["http_options"]["port"] = free_port()
        change(data)
        file = Path(folder) / "start.yaml"
        file.write_text(yaml.safe_dump(data))
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "service.cli", "serve", str(file)], capture_output=True, text=True, timeout=RECOVERED_SECONDS
        )
    told = done.stderr.strip().splitlines()[-1:]
    print(f"{name:<24}status {done.returncode} after {time.monotonic() - began:.1f} s: {' '.join(told)[:160]}", flush=True)
    return done.returncode == 1 and bool(told) and "Traceback" not in done.stderr


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0] if __doc__ else None)
    every = [*FAULTS, *ENDS, *STARTS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(every))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    names = [name for name in every if name in (options.names or every)]
    if unknown := set(options.names) - set(every):
        parser.error(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    survived = [name for name in names if name in FAULTS]
    services = [survived] * bool(survived) + [[name] for name in names if name in ENDS]
    ran = [running(each, options.seed) for each in services] + [refused(name) for name in names if name in STARTS]
    return 0 if all(ran) else 1


if __name__ == "__main__":
    sys.exit(main())
