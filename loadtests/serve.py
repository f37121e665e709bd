"""A service of the run's own: `longserve serve` as a child process on a free port, stopped when the run ends.

It is started from a copy of the given Serve config in which nothing but the port is changed; the copy stays beside the report.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from loadtests.faults import ScenarioError, TargetError

START_SECONDS = 180.0
STOP_SECONDS = 60.0


@contextlib.contextmanager
def serving(config: Path, folder: Path) -> Iterator[str]:
    """The URL of a service of one's own. Its output goes to `folder`/service.log. Raises TargetError when it does not start."""
    data = _read(config)
    port = free_port()
    options = data.setdefault("http_options", {})
    options["host"], options["port"] = "127.0.0.1", port
    copy, log = folder / "serve.yaml", folder / "service.log"
    copy.write_text(yaml.safe_dump(data, sort_keys=False))
    program = Path(sys.executable).with_name("longserve")
    if not program.exists():
        raise TargetError(f"no {program}: --serve starts the service installed beside this Python; measure another by --url")
    route = str(data["applications"][0].get("route_prefix", "/")).rstrip("/")
    with log.open("w") as output:
        child = subprocess.Popen([program, "serve", copy], stdout=output, stderr=output, start_new_session=True)
        try:
            _wait(child, f"http://127.0.0.1:{port}{route}/ready", log)
            yield f"http://127.0.0.1:{port}{route}"
        finally:
            _stop(child)


def _read(config: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(config.read_text())
        applications = data["applications"]
        for application in applications:
            application["args"].setdefault("engine", {})["prefix_share"] = 0  # texts come again, and none may be found read
            model = application["args"].get("model", "embedded")
            if model != "embedded":  # relative to the file it stands in, which the copy is not
                application["args"]["model"] = str((config.parent / model).resolve())
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ScenarioError(f"{config}: no Serve config: {error}") from error
    return dict(data)


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(child: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise TargetError(f"the service ended with status {child.returncode}; its last words: {_tail(log)}")
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=5) as response:
            if response.status == 200:
                return
        time.sleep(0.2)
    raise TargetError(f"the service was not ready within {START_SECONDS:.0f} s; its last words: {_tail(log)}")


def _tail(log: Path) -> str:
    return " / ".join(log.read_text(errors="replace").split("\n")[-6:])[:1000]


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ask as Ctrl-C does, again after a while, then end it and what it started."""
    for number in (signal.SIGINT, signal.SIGINT):
        if child.poll() is None:
            child.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_SECONDS)
            return
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
