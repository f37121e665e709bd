"""Two Ray nodes, a replica on each, deployed by Ray's own command: the service is one, and outlives a node.

Both nodes are on this machine, on addresses of its loopback, started by `ray start` as docs/deploy.md tells, in the environment
of the image. The last test kills a node and starts another in its place, as a cluster's operator does.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.http.client import eventually
from tests.serving import LONG_SECONDS, START_SECONDS, Service, descendants, free_port, switch_of

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif("LONGSERVE_CLUSTER" not in os.environ, reason="two Ray nodes need a quiet machine: LONGSERVE_CLUSTER=1"),
]

BIN = Path(sys.executable).parent
IMAGE = Path(__file__).parent.parent / "deploy" / "Dockerfile"
HEAD, WORKER, SUCCESSOR = "127.0.0.2", "127.0.0.3", "127.0.0.4"  # 127.0.0.1 is a name for any address of the machine to Ray
STARTS = 3
BLOCKS = "will now block"  # what a started node tells last
RESTORED_SECONDS = 180  # 60 is the promise on two idle cores; a test machine is shared
STREAM = {"prompt": "import os", "max_tokens": 400, "stream": True, "ignore_eos": True}
FILE = """
proxy_location: HeadOnly
http_options: {{host: 127.0.0.1, port: {port}}}
applications:
  - name: longserve
    route_prefix: /
    import_path: service.app:build
    args: {{threads: 1, http: {{workers: 1}}}}
    deployments:
      - name: longserve
        num_replicas: 2
        max_replicas_per_node: 1
        max_ongoing_requests: 1000
        health_check_period_s: 2
        user_config: {{attention: {{default: dense, backends: {{dense: {{}}, sliding_window: {{window: 64}}}}}}}}
"""


def image_environment() -> dict[str, str]:
    """What the image sets for a Ray that is not started by `longserve serve`."""
    return dict(re.findall(r"(RAY_\w+)=(\S+)", IMAGE.read_text()))


@dataclass
class Cluster:
    """The nodes of a Ray, each a `ray start --block` and what is below it."""

    folder: Path
    port: int = field(default_factory=free_port)
    dashboard: int = field(default_factory=free_port)
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, address: str) -> None:
        """A node on an address of the loopback, with room for one replica. Again, where Ray gave up waiting for itself."""
        for _ in range(STARTS):
            self._launch(address)
            node = self.nodes[address]
            assert eventually(lambda node=node: BLOCKS in self.log(address) or node.poll() is not None, START_SECONDS)
            if node.poll() is None:
                return
            self.kill(address)
        raise AssertionError(self.log(address))

    def _launch(self, address: str) -> None:
        # each port named: Ray gives its agent 15 s to tell one it has chosen itself, which a busy machine may not keep
        ports = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
        options = [f"--{name}-port={free_port()}" for name in ports] + [f"--node-ip-address={address}", "--num-cpus=1"]
        if address != HEAD:
            options += [f"--address={HEAD}:{self.port}"]
        else:
            options += ["--head", f"--port={self.port}", f"--dashboard-port={self.dashboard}", f"--temp-dir={self.folder}"]
            options += [f"--ray-client-server-port={free_port()}"]
        command = [BIN / "ray", "start", "--block", "--object-store-memory=100000000", *options]
        with (self.folder.parent / f"{address}.log").open("wb") as log:
            self.nodes[address] = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def kill(self, address: str) -> None:
        """The node's machine is gone: no process of it says good-bye."""
        node = self.nodes.pop(address)
        for pid in (node.pid, *descendants(node.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait()

    def log(self, address: str) -> str:
        return (self.folder.parent / f"{address}.log").read_text(errors="replace")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = Path("/tmp") / f"longserve-{secrets.token_hex(4)}"  # short: sockets lie in it
    (folder / "ray").mkdir(parents=True)
    cluster = Cluster(folder / "ray")
    environment = image_environment() | {"RAY_AUTH_TOKEN": secrets.token_hex(16), "PYTHONPATH": str(IMAGE.parent.parent)}
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:  # set by whoever has imported service.cluster
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            cluster.start(HEAD)
            yield cluster
        finally:
            for address in list(cluster.nodes):
                cluster.kill(address)
            shutil.rmtree(folder, ignore_errors=True)  # some process may be writing its last line


@pytest.fixture(scope="module")
def service(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Deployed by `serve deploy`: one replica runs on the head, the other waits for a node."""
    port, file = free_port(), tmp_path_factory.mktemp("cluster") / "cluster.yaml"
    file.write_text(FILE.format(port=port))
    deploy = [BIN / "serve", "deploy", str(file), "--address", f"http://127.0.0.1:{cluster.dashboard}"]
    assert eventually(lambda: subprocess.run(deploy, capture_output=True).returncode == 0, START_SECONDS), cluster.log(HEAD)
    found = Service(f"http://127.0.0.1:{port}", None, LONG_SECONDS, file=file, process=None, lines=[])  # type: ignore[arg-type]
    assert eventually(lambda: replicas(found) == 1, START_SECONDS), cluster.log(HEAD)
    yield found


def replicas(service: Service) -> int:
    """How many answer a scrape."""
    try:
        return int(sum(service.metric("longserve_replicas", state="answered")))
    except (OSError, ValueError, http.client.HTTPException):  # the one that was asked died under the question
        return 0


@pytest.fixture(scope="module")
def both(cluster: Cluster, service: Service) -> Service:
    cluster.start(WORKER)
    assert eventually(lambda: replicas(service) == 2, START_SECONDS), cluster.log(WORKER)
    return service


def test_a_replica_that_has_no_node_yet_is_told_by_status(service: Service) -> None:
    status, told = service.status()
    assert status == 1
    assert sorted((each["state"], each["pid"] is None) for each in told) == [("RUNNING", False), ("STARTING", True)]


def test_each_node_has_a_replica_and_one_scrape_tells_of_both(cluster: Cluster, both: Service) -> None:
    pids = both.pids()
    assert [len(pids & descendants(cluster.nodes[node].pid)) for node in (HEAD, WORKER)] == [1, 1]
    assert len(both.metric("longserve_build_info")) == 2
    assert sum(both.metric("longserve_replicas", state="missing")) == 0


def names(service: Service) -> dict[int, str]:
    """The replicas' names by their processes."""
    return {each["pid"]: each["replica"] for each in service.status()[1]}


def test_requests_and_streams_are_answered_by_both_nodes(both: Service) -> None:
    replicas = sorted(names(both).values())

    def answered() -> list[float]:
        return [sum(both.metric("longserve_requests_total", outcome="ok", replica=name)) for name in replicas]

    before = answered()
    with concurrent.futures.ThreadPoolExecutor(4) as callers:
        streams = [callers.submit(both.post, "/v1/completions", STREAM | {"max_tokens": 30}) for _ in range(12)]
        answers = [callers.submit(both.complete, "import os") for _ in range(12)]
    assert {answer.result().status for answer in answers} == {200}
    assert {stream.result().events[-1] for stream in streams} == {"[DONE]"}
    more = [now - then for now, then in zip(answered(), before, strict=True)]
    assert sum(more) == 24 and min(more) > 0


def test_an_apply_reaches_both_nodes_and_restarts_neither(both: Service) -> None:
    pids = both.pids()
    both.rewrite(lambda data: switch_of(data).update(default="sliding_window"))
    applied = both.apply()
    assert applied.returncode == 0, applied.stderr
    status, told = both.status()
    assert status == 0
    assert [each["attention"]["default"] for each in told] == ["sliding_window"] * 2
    assert {each["pid"] for each in told} == pids


@dataclass(frozen=True)
class Call:
    """What became of a request: when it was sent and ended, its status (None: no whole answer), what its caller was told."""

    sent: float
    ended: float
    status: int | None
    text: str


def call(service: Service, body: dict[str, Any]) -> Call:
    sent = time.monotonic()
    try:
        reply = service.post("/v1/completions", body)
        whole = not body.get("stream") or reply.status != 200 or reply.events[-1:] == ["[DONE]"]
        return Call(sent, time.monotonic(), reply.status if whole else None, reply.text)
    except (OSError, http.client.HTTPException) as error:
        return Call(sent, time.monotonic(), None, f"error: {error!r}")


def test_a_killed_node_fails_only_what_it_was_answering(cluster: Cluster, both: Service) -> None:
    """The last test of the module: it ends with another node."""
    calls: list[Call] = []
    stopped = threading.Event()
    (victim,) = [name for pid, name in names(both).items() if pid in descendants(cluster.nodes[WORKER].pid)]

    def ask(body: dict[str, Any]) -> None:
        while not stopped.is_set():
            calls.append(call(both, body))
            time.sleep(0.05)

    with concurrent.futures.ThreadPoolExecutor(4) as callers:
        long = STREAM | {"max_tokens": 4000}  # for seconds: one is not at its end between the look at the metric and the kill
        asked = [callers.submit(ask, body) for body in (long, long, {"prompt": "import os", "max_tokens": 40})]
        try:
            assert eventually(lambda: sum(both.metric("longserve_requests_running", replica=victim)) >= 1)
            killed = time.monotonic()
            cluster.kill(WORKER)
            cluster.start(SUCCESSOR)
            assert eventually(lambda: replicas(both) == 2, RESTORED_SECONDS), cluster.log(SUCCESSOR)
            restored = time.monotonic() - killed
        finally:
            stopped.set()
        for each in asked:
            each.result()
    failed = [each for each in calls if each.status != 200]
    print(f"{len(calls)} requests, {len(failed)} failed, capacity back after {restored:.0f} s")
    assert failed
    assert [each for each in failed if not each.sent <= killed <= each.ended] == []
    assert sum(each.sent > killed for each in calls) >= 10
    assert [each for each in failed if '"replica_gone"' not in each.text] == []
    assert both.status()[0] == 0
