"""A real `longserve serve` as a child of the test: its config file, its commands, its processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.http.client import Client, eventually

LOCAL = Path(__file__).parent.parent / "deploy" / "local.yaml"
START_SECONDS = 240  # 30 is the promise on two idle cores; a test machine is shared
LONG_SECONDS = 120.0  # a dense prefill of a long text takes some 10 s on an idle core
LISTENS = "0A"  # the state of a listening socket in /proc/net/tcp
LOOPBACK = (  # as the kernel writes 127.0.0.1, ::ffff:127.0.0.1 and ::1
    "0100007F",
    "0000000000000000FFFF00000100007F",
    "00000000000000000000000001000000",
)


@dataclass(frozen=True, kw_only=True)
class Service(Client):
    """A running `longserve serve` and its config file."""

    file: Path
    process: subprocess.Popen[str]
    lines: list[str]  # what it has printed

    def cli(self, *arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "service.cli", *arguments],
            capture_output=True,
            text=True,
            timeout=LONG_SECONDS * 2,
            **kwargs,
        )

    def apply(self, path: Path | None = None) -> subprocess.CompletedProcess[str]:
        return self.cli("apply", str(path or self.file))

    def status(self) -> tuple[int, list[dict[str, Any]]]:
        """The exit status of `longserve status` and what it tells of each replica."""
        done = self.cli("status", str(self.file))
        return done.returncode, json.loads(done.stdout)["longserve"]["replicas"]

    def rewrite(self, change: Any, path: Path | None = None) -> Path:
        """The config file after `change(its data)`, in place or under another path."""
        data = yaml.safe_load(self.file.read_text())
        change(data)
        (path or self.file).write_text(yaml.safe_dump(data, sort_keys=False))
        return path or self.file

    def pids(self) -> set[int]:
        """The replicas' processes, as Serve knows them."""
        return {each["pid"] for each in self.status()[1]}

    def metric(self, name: str, **labels: str) -> list[float]:
        """A metric's value in each replica."""
        families = text_string_to_metric_families(self.metrics())
        return [s.value for f in families for s in f.samples if s.name == name and labels.items() <= s.labels.items()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def switch_of(data: Any) -> Any:
    return data["applications"][0]["deployments"][0]["user_config"]["attention"]


def descendants(pid: int) -> set[int]:
    """All processes below a process."""
    found: set[int] = set()
    pending = [pid]
    while pending:
        for path in Path(f"/proc/{pending.pop()}/task").glob("*/children"):
            with suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
                new = {int(each) for each in path.read_text().split()} - found
                found |= new
                pending += new
    return found


def are_gone(pids: set[int]) -> bool:
    """Whether none of these processes runs. One that has ended and that nobody has asked for yet does not."""
    return not any(state(pid) not in ("", "Z") for pid in pids)


def state(pid: int) -> str:
    """A process's state as a letter; empty when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def public_listeners(pids: set[int]) -> list[str]:
    """Listening TCP sockets of these processes that other machines can reach, as the kernel writes address and port."""
    mine = {socket for pid in pids for socket in sockets(pid)}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    heard = [row for row in rows if row[3] == LISTENS and row[9] in mine]
    assert heard, "none of these processes listens at all"
    return [row[1] for row in heard if row[1].partition(":")[0] not in LOOPBACK]


def sockets(pid: int) -> list[str]:
    """Inodes of a process's sockets."""
    found = []
    for path in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            target = os.readlink(path)
        except FileNotFoundError:  # closed meanwhile
            continue
        if target.startswith("socket:["):
            found.append(target[len("socket:[") : -1])
    return found


@contextmanager
def serving(file: Path, change: Callable[[Any], None], **kwargs: Any) -> Iterator[Service]:
    """`longserve serve` on a free port under deploy/local.yaml after `change(its data)`, which is written to `file`.

    `kwargs` go to its Popen. Ended at the end, if it has not ended by then.
    """
    data, port = yaml.safe_load(LOCAL.read_text()), free_port()
    data["http_options"]["port"] = port
    change(data)
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    command = [sys.executable, "-m", "service.cli", "serve", str(file)]
    options: dict[str, Any] = {"start_new_session": True} | kwargs
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()))
    reader.start()
    try:
        started = eventually(lambda: any("curl" in line for line in lines) or process.poll() is not None, START_SECONDS)
        assert started and process.poll() is None
        yield Service(f"http://127.0.0.1:{port}", None, LONG_SECONDS, file=file, process=process, lines=lines)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
        reader.join()
        print("".join(lines))  # pytest shows it where the test fails
