"""`deploy/throughput.yaml` behind HAProxy: what `longserve` does with the local profile it does with this one, too."""

from __future__ import annotations

import concurrent.futures
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.benchmark.proxies import throughput
from tests.http.client import eventually
from tests.serving import LOCAL, Service, are_gone, descendants, serving, switch_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    def two(data: Any) -> None:
        data["applications"] = yaml.safe_load((LOCAL.parent / "throughput.yaml").read_text())["applications"]
        data["applications"][0]["args"] = {"threads": 1, "http": {"workers": 1}}
        data["applications"][0]["deployments"][0] |= {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.5}}

    with serving(tmp_path_factory.mktemp("throughput") / "two.yaml", two, env={**os.environ, **throughput()}) as service:
        yield service


def proxies(service: Service) -> list[Path]:
    """HAProxy's processes."""
    found = [Path("/proc") / str(pid) for pid in descendants(service.process.pid)]
    return [each for each in found if (each / "comm").read_text().strip() == "haproxy"]


def test_answers_and_streams_come_through_haproxy(service: Service) -> None:
    assert proxies(service)
    assert service.complete("import os").status == 200
    body = {"prompt": "import os", "max_tokens": 30, "ignore_eos": True, "temperature": 0}
    whole = service.post("/v1/completions", body).json["choices"][0]["text"]
    *events, last = service.post("/v1/completions", {**body, "stream": True}).events
    assert ("".join(event["choices"][0]["text"] for event in events), last) == (whole, "[DONE]")
    assert len(events) > 1
    assert service.get("/nowhere").error["code"] == "not_found"


def test_its_admin_socket_is_this_users_alone(service: Service) -> None:
    (config,) = {
        each for one in proxies(service) for each in (one / "cmdline").read_text().split("\0") if each.endswith(".cfg")
    }
    folders = list(Path(config).resolve().parents)
    assert "admin.sock" in {each.name for each in Path(config).parent.iterdir()}
    assert any(folder.stat().st_mode & 0o077 == 0 for folder in folders)


def test_both_replicas_answer_and_one_scrape_tells_of_both(service: Service) -> None:
    def both_have_answered() -> bool:
        """HAProxy hears of a replica some seconds after Serve."""
        with concurrent.futures.ThreadPoolExecutor(8) as callers:
            asked = [callers.submit(service.complete, "import os", max_tokens=60, ignore_eos=True) for _ in range(16)]
        assert {each.result().status for each in asked} == {200}
        return min(service.metric("longserve_requests_total", outcome="ok", kind="completion", backend="dense")) > 0

    assert eventually(both_have_answered)
    assert len(service.metric("longserve_requests_total", outcome="ok", kind="completion", backend="dense")) == 2


def test_status_and_apply_reach_the_replicas(service: Service) -> None:
    pids = service.pids()
    service.rewrite(lambda data: switch_of(data).update(default="sliding_window"))
    applied = service.apply()
    assert applied.returncode == 0, applied.stderr
    status, told = service.status()
    assert status == 0 and {each["pid"] for each in told} == pids
    assert [each["attention"]["default"] for each in told] == ["sliding_window"] * 2


def test_sigterm_lets_a_stream_end(service: Service) -> None:
    """The last test of the module."""
    below = descendants(service.process.pid)
    with service.half_read({"prompt": "import os", "max_tokens": 300, "stream": True, "ignore_eos": True}, read=500) as line:
        service.process.send_signal(signal.SIGTERM)
        rest = b"".join(iter(lambda: line.recv(65536), b""))
    assert b"data: [DONE]" in rest
    assert service.process.wait(60) == 0 and are_gone(below), "".join(service.lines)
