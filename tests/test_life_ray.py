"""How a service lives and ends: whatever signal comes and to whom, answers are finished and nothing is left behind."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import switching
from tests.http.client import Reply, eventually
from tests.serving import LOCAL, Service, are_gone, descendants, free_port, public_listeners, serving, switch_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

DRAIN_SECONDS = 8
ENDED_SECONDS = DRAIN_SECONDS + 10
STREAM = {"prompt": "import os", "max_tokens": 600, "stream": True, "ignore_eos": True}


def drains_soon(data: Any) -> None:
    data["applications"][0]["args"]["drain_seconds"] = DRAIN_SECONDS


@contextmanager
def streaming(service: Service, tokens: int) -> Iterator[concurrent.futures.Future[Reply]]:
    """A stream that has begun."""
    with concurrent.futures.ThreadPoolExecutor(1) as callers:
        stream = callers.submit(service.post, "/v1/completions", STREAM | {"max_tokens": tokens})
        assert eventually(lambda: sum(service.metric("longserve_requests_running")) == 1)
        yield stream


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Where the service of a test keeps Ray's folder. Short, for there are sockets in it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def using(scratch: Path) -> dict[str, str]:
    return os.environ | {"RAY_TMPDIR": str(scratch)}


def to_group(service: Service, number: int) -> None:
    os.killpg(service.process.pid, number)


def to_process(service: Service, number: int) -> None:
    service.process.send_signal(number)


@pytest.mark.parametrize(
    ("send", "number"), [(to_group, signal.SIGTERM), (to_process, signal.SIGTERM), (to_group, signal.SIGHUP)]
)
def test_a_signal_drains_whoever_gets_it(
    send: Callable[[Service, int], None], number: int, tmp_path: Path, scratch: Path
) -> None:
    with serving(tmp_path / "one.yaml", drains_soon, env=using(scratch)) as service:
        below = descendants(service.process.pid)
        with streaming(service, tokens=600) as stream:
            send(service, number)
            assert eventually(lambda: any("draining" in line for line in service.lines))
            assert eventually(lambda: service.complete("a").status == 503)
            assert stream.result().events[-1] == "[DONE]"
        assert service.process.wait(ENDED_SECONDS) == 0
        assert are_gone(below)
    assert list(scratch.iterdir()) == []


def test_a_stream_longer_than_the_time_to_drain_is_told_so_and_does_not_hold_the_end_up(tmp_path: Path) -> None:
    with serving(tmp_path / "one.yaml", drains_soon) as service:
        below = descendants(service.process.pid)
        with streaming(service, tokens=30_000) as stream:
            to_group(service, signal.SIGTERM)
            assert service.process.wait(ENDED_SECONDS) == 0
            assert "the service is stopping" in stream.result().text
        assert are_gone(below)


def test_a_second_signal_ends_at_once(tmp_path: Path, scratch: Path) -> None:
    with serving(tmp_path / "one.yaml", lambda data: None, env=using(scratch)) as service:  # 30 s to drain
        below = descendants(service.process.pid)
        with streaming(service, tokens=30_000) as stream:
            to_group(service, signal.SIGTERM)
            assert eventually(lambda: any("draining" in line for line in service.lines))
            time.sleep(1)  # sooner it would pass for the same signal, sent on by a wrapper
            to_group(service, signal.SIGTERM)
            assert service.process.wait(15) == 0
            stream.cancel()
            assert stream.exception(timeout=15) is not None or stream.result().events[-1] != "[DONE]"
        assert are_gone(below)
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("state", ["begins", "has Ray"])
def test_a_service_that_starts_ends_at_once(state: str, tmp_path: Path, scratch: Path) -> None:
    file = tmp_path / "one.yaml"
    file.write_text(LOCAL.read_text().replace("port: 8000", f"port: {free_port()}"))
    command = [sys.executable, "-m", "service.cli", "serve", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=using(scratch))
    assert eventually(lambda: bool(descendants(process.pid)) and (state == "begins" or list(scratch.glob("*/ray/*"))), 60)
    below = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == ""
    assert process.returncode == 0
    assert are_gone(below) and list(scratch.iterdir()) == []


def below_running(service: Service, program: str) -> int:
    """The process below a service that runs a program of Ray's."""
    below = descendants(service.process.pid)
    (found,) = [pid for pid in below if Path(Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0]).name == program]
    return found


def test_when_rays_store_dies_what_runs_is_answered_and_the_service_ends(tmp_path: Path, scratch: Path) -> None:
    """Ray itself would go on for a while and then end all of its processes in one moment."""
    with serving(tmp_path / "one.yaml", drains_soon, env=using(scratch)) as service:
        below = descendants(service.process.pid)
        with streaming(service, tokens=600) as stream:
            os.kill(below_running(service, "gcs_server"), signal.SIGKILL)
            assert eventually(lambda: any("draining" in line for line in service.lines))
            assert stream.result().events[-1] == "[DONE]"
        assert service.process.wait(ENDED_SECONDS + 20) == 1  # Ray looks for its store a while longer
        assert any("Ray's store" in line for line in service.lines)
        assert are_gone(below)


def test_when_rays_raylet_dies_the_service_ends(tmp_path: Path, scratch: Path) -> None:
    """Ray's processes end with it, a moment later: nothing would be served, and a signal would find nobody to drain."""
    with serving(tmp_path / "one.yaml", drains_soon, env=using(scratch)) as service:
        below = descendants(service.process.pid)
        os.kill(below_running(service, "raylet"), signal.SIGKILL)
        assert service.process.wait(ENDED_SECONDS) == 1
        assert any("Ray's raylet" in line for line in service.lines)
        assert are_gone(below)


@pytest.mark.parametrize("who", ["parent", "child"])
def test_who_is_killed_leaves_no_orphans(who: str, tmp_path: Path) -> None:
    with serving(tmp_path / "one.yaml", drains_soon) as service:
        below = descendants(service.process.pid)
        (child,) = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()
        os.kill(service.process.pid if who == "parent" else int(child), signal.SIGKILL)
        assert service.process.wait(10) == (-signal.SIGKILL if who == "parent" else 128 + signal.SIGKILL)
        assert eventually(lambda: are_gone(below))


def test_only_this_machine_and_this_user_reach_a_local_service(tmp_path: Path, scratch: Path) -> None:
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file():
        token.chmod(0o644)  # as Ray makes it
    with serving(tmp_path / "one.yaml", lambda data: None, env=using(scratch)) as service:
        assert public_listeners({service.process.pid, *descendants(service.process.pid)}) == []
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        (folder,) = scratch.iterdir()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_switch_that_failed_neither_stays_nor_keeps_a_replica_from_starting(tmp_path: Path) -> None:
    with serving(tmp_path / "one.yaml", lambda data: None) as service:
        good, asked = service.file.read_text(), service.status()[1][0]["asked"]
        bad = service.rewrite(lambda data: switch_of(data).update(default="longformer", backends={"longformer": {}}))
        refused = service.apply(bad)
        assert refused.returncode == 2
        assert "no causal form" in refused.stderr
        assert service.status()[1][0]["asked"] == asked  # no replica has heard of it

        refused = apply_unrehearsed(bad)
        assert refused.returncode == 1
        assert "no causal form" in refused.stdout
        code, (replica,) = service.status()
        assert (code, replica["degraded"], replica["asked"]) == (0, None, replica["attention"])

        deploy_past_the_command(service, bad)
        assert eventually(lambda: service.status()[0] == 1)
        (replica,) = service.status()[1]
        assert "no causal form" in replica["degraded"]
        os.kill(replica["pid"], signal.SIGKILL)
        assert eventually(lambda: restarted(service, replica["pid"]), 60)
        reply = service.complete("import os")
        assert (reply.status, reply.json["longserve"]["backend"]) == (200, "dense")
        code, (successor,) = service.status()
        assert (code, successor["attention"]) == (1, replica["attention"])
        assert "no causal form" in successor["degraded"]

        service.file.write_text(good)
        assert service.apply().returncode == 0
        assert service.status()[0] == 0


def apply_unrehearsed(path: Path) -> subprocess.CompletedProcess[str]:
    """`longserve apply` behind a rehearsal that found no fault: only the switch itself does."""
    code = (
        "import sys; from service import cli, cluster\n"
        "cluster.rehearse = lambda *_: None; sys.exit(cli.main(['apply', sys.argv[1]]))"
    )
    return subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)


def serving_under(service: Service, default: str) -> set[int]:
    """The processes of the replicas that run and serve under a default; none while the service cannot be asked."""
    try:
        return {each["pid"] for each in service.status()[1] if each.get("attention", {}).get("default") == default}
    except json.JSONDecodeError:
        return set()


def deploy_past_the_command(service: Service, path: Path) -> None:
    """Apply a file as Ray's own tools do, which ask no replica how it went."""
    code = (
        "import sys; from pathlib import Path; from service import cluster, config\n"
        "with cluster.connected(sys.argv[2]): cluster.deploy(config.read(Path(sys.argv[1])))"
    )
    address = service.get("/info").json["replica"]["ray_address"]
    subprocess.run([sys.executable, "-c", code, str(path), address], check=True, capture_output=True, timeout=60)


def restarted(service: Service, former: int) -> bool:
    """Whether another process answers in the place of one that was killed."""
    try:
        return service.get("/ready").status == 200 and service.get("/info").json["replica"]["pid"] != former
    except (OSError, json.JSONDecodeError, KeyError):
        return False


def test_replicas_share_the_memory_and_the_cpus_of_their_machine(tmp_path: Path) -> None:
    def of(replicas: int) -> Callable[[Any], None]:
        def change(data: Any) -> None:
            deployment = data["applications"][0]["deployments"][0]
            deployment.update(num_replicas=replicas, ray_actor_options={"num_cpus": 0.5})

        return change

    with serving(tmp_path / "one.yaml", of(1)) as service:
        (alone,) = service.metric("longserve_memory_budget_bytes")
    cpus = os.sched_getaffinity(0)
    with serving(tmp_path / "two.yaml", of(2)) as service:
        budgets, threads = service.metric("longserve_memory_budget_bytes"), service.metric("longserve_torch_threads")
        assert len(budgets) == 2
        assert sum(budgets) <= 1.1 * alone  # other processes come and go
        assert threads == [max(1, len(cpus) // 2)] * 2
        if len(cpus) > 1:
            one, other = (pinned(pid, len(cpus)) for pid in service.pids())
            assert one and other and one.isdisjoint(other)


def pinned(pid: int, cpus: int) -> set[int]:
    """The CPUs that threads of a process are pinned to."""
    found = [os.sched_getaffinity(int(task)) for task in os.listdir(f"/proc/{pid}/task")]
    return {cpu for affinity in found if len(affinity) < cpus for cpu in affinity}


def test_twenty_switches_under_load_fail_no_request_and_keep_processes_and_memory(tmp_path: Path) -> None:
    with serving(tmp_path / "two.yaml", switching.two_replicas) as service:
        pids, paths = service.pids(), switching.files(service, 20)
        with switching.load(service):
            switching.throw(paths[:5])  # the allocator and all caches reach their working size
        before = switching.resting_bytes(service)
        with switching.load(service) as asked:
            switching.throw(paths)
        assert {(each.status, each.is_whole) for each in asked} == {(200, True)}
        assert {each.is_stream for each in asked} == {True, False}
        assert switching.resting_bytes(service) <= 1.02 * before
        assert sum(service.metric("longserve_backend_switch_total", result="ok")) >= 2 * 25
        assert service.pids() == pids

        default = switch_of(yaml.safe_load(paths[-1].read_text()))["default"]
        killed = next(iter(pids))
        os.kill(killed, signal.SIGKILL)
        again = service.apply(paths[-1])  # asks while one of the replicas is dead, or not up again
        assert again.returncode in (0, 1) and "Traceback" not in again.stderr, again.stderr
        assert eventually(lambda: killed not in (up := serving_under(service, default)) and len(up) == 2, 60)

        assert service.cli("apply", "--rollback", str(service.file)).returncode == 0
        former = switch_of(yaml.safe_load(paths[-2].read_text()))["default"]
        assert {each["attention"]["default"] for each in service.status()[1]} == {former}


def test_a_switch_over_http_reaches_all_replicas_and_those_that_are_started_later(tmp_path: Path) -> None:
    def change(data: Any) -> None:
        data["applications"][0]["args"]["http"]["admin_keys_env"] = "OPERATORS"
        data["applications"][0]["deployments"][0]["num_replicas"] = 2

    operator = {"authorization": "Bearer operator"}
    with serving(tmp_path / "two.yaml", change, env=os.environ | {"OPERATORS": "operator"}) as service:
        pids = service.pids()
        wanted = {"default": "performer", "backends": {"dense": {}, "performer": {"features": 64}}}
        reply = service.post("/admin/attention", wanted, operator)
        assert reply.status == 200, reply.text
        assert [each["attention"]["default"] for each in reply.json["replicas"]] == ["performer"] * 2
        assert service.pids() == serving_under(service, "performer") == pids

        refused = service.post("/admin/attention", {"default": "longformer", "backends": {"longformer": {}}}, operator)
        assert (refused.status, refused.error["code"]) == (400, "invalid_request")
        checks = service.post("/admin/truth-check", {}, operator).json["replicas"]
        assert [all(each["passed"] for each in replica["checks"]) for replica in checks] == [True, True]

        victim = min(pids)
        os.kill(victim, signal.SIGKILL)
        assert eventually(lambda: len(serving_under(service, "performer") - {victim}) == 2, 120)
