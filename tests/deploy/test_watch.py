"""`make watch`, and the same in containers: the files they name are there, and Prometheus finds the service."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from service.config import ServiceConfig, UserConfig
from service.plain import listening_in_thread
from tests.deploy.conftest import DEPLOY
from tests.deploy.test_prometheus import Prometheus, is_up
from tests.http.client import eventually
from tests.serving import free_port


def start(tmp_path: Path, prometheus: str, service: str, **settings: str) -> subprocess.Popen[str]:
    path = f"{Path(prometheus).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "WATCH_DATA": str(tmp_path), "SERVICE": service, **settings}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([DEPLOY / "watch.sh"], env=environment, **pipes)  # type: ignore[call-overload, no-any-return]


@pytest.mark.slow
def test_watch_scrapes_the_service_and_leaves_nothing_behind(tmp_path: Path, prometheus: str) -> None:
    port = free_port()
    with listening_in_thread(ServiceConfig(threads=1), UserConfig()) as (url, _):
        watch = start(tmp_path, prometheus, url.removeprefix("http://"), PROMETHEUS_PORT=str(port))
        try:
            found = Prometheus(f"http://127.0.0.1:{port}")
            assert eventually(lambda: is_up(found))
            assert found.value("longserve_build_info") == 1
        finally:
            watch.send_signal(signal.SIGTERM)
            told, _ = watch.communicate(timeout=30)
    assert f"Prometheus: http://127.0.0.1:{port}" in told and "Grafana:" in told
    assert watch.returncode == 0
    assert not is_up(found)


def test_watch_without_a_service_says_how_to_start_one(tmp_path: Path, prometheus: str) -> None:
    watch = start(tmp_path, prometheus, f"127.0.0.1:{free_port()}")
    _, told = watch.communicate(timeout=30)
    assert watch.returncode == 1
    assert "make serve" in told


def test_an_installed_prometheus_is_linked(tmp_path: Path, prometheus: str) -> None:
    subprocess.run([DEPLOY / "prometheus" / "install.sh", tmp_path], check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"prometheus", "promtool"}
    assert subprocess.run([tmp_path / "promtool", "--version"], capture_output=True).returncode == 0


def test_the_containers_mount_what_is_here() -> None:
    for service in yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].values():
        mounted = [volume.split(":")[0] for volume in service["volumes"] if volume.startswith("./")]
        assert mounted and all((DEPLOY / path).is_dir() for path in mounted)
        assert service["network_mode"] == "host"  # what listens, listens on loopback
