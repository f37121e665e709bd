"""The command line where it is on its own: when nobody reads what it prints, and what it makes of what Serve tells."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service import apply, cli, cluster
from service.config import IMPORT_PATH, ApplicationSection, ServeFile


def test_a_service_drains_although_nobody_reads_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    drained: list[float] = []
    monkeypatch.setattr(cluster, "drain", lambda file, seconds: drained.append(seconds) or [])
    monkeypatch.setattr(cluster, "hang_up", lambda known: ["a proxy that has not hung up"])
    end, unread = os.pipe()
    os.close(end)
    monkeypatch.setattr(sys, "stdout", os.fdopen(unread, "w"))
    file = ServeFile(applications=[ApplicationSection()])
    cli._drain(file, [])
    assert drained == [30.0]
    print("more", flush=True)  # as the interpreter flushes at its end


def test_a_call_after_the_end_starts_no_ray_of_its_own(tmp_path: Path) -> None:
    code = "from service import cluster\nimport ray\nray.put(1)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"RAY_TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=60
    )
    assert "Ray has not been started" in done.stderr
    assert list(tmp_path.iterdir()) == []


def deployed(**args: object) -> dict[str, dict[str, object]]:
    """What Serve tells of a service that somebody has deployed with these `args` written out."""
    return {"longserve": {"import_path": IMPORT_PATH, "route_prefix": "/", "args": args}}


ADDRESS = {"host": "127.0.0.1", "port": 8000}


def test_a_default_that_was_not_written_out_at_the_deployment_is_no_difference() -> None:
    for told, restarting in ((deployed(dtype="auto"), []), (deployed(threads=2), ["applications.0.args.threads"])):
        changes = apply._changes(ServeFile(applications=[ApplicationSection()]), ADDRESS, told)
        assert [change.key for change in changes if change.restarts] == restarting


def test_a_default_that_the_switch_left_out_is_no_difference() -> None:
    for was, changed in (("dense", []), ("performer", ["default"])):
        backends: dict[str, Any] = {"dense": {}, "performer": {}}
        there, file = ({"attention": {"default": name, "backends": backends}} for name in (was, "dense"))
        told = {"longserve": deployed()["longserve"] | {"deployments": [{"name": "longserve", "user_config": there}]}}
        wanted = ApplicationSection.model_validate({"deployments": [{"name": "longserve", "user_config": file}]})
        changes = apply._changes(ServeFile(applications=[wanted]), ADDRESS, told)
        keys = [change.key.partition("attention.") for change in changes]
        assert [key for _, found, key in keys if found] == changed


def test_an_applied_file_leaves_the_args_as_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve restarts every replica when the args differ as data, were they the same in meaning."""
    sent: list[Any] = []
    monkeypatch.setattr(cluster, "_client", lambda: SimpleNamespace(deploy_apps=sent.append))
    cluster.deploy(ServeFile(applications=[ApplicationSection()]), deployed(dtype="auto"))
    assert [each.args for each in sent[0].applications] == [{"dtype": "auto"}]


def test_a_replica_without_a_process_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    starting = {"replica_id": "a", "state": SimpleNamespace(value="STARTING")}  # Serve leaves out what it does not know
    found = {"status": SimpleNamespace(value="DEPLOYING"), "deployments": {"longserve": {"replicas": [starting]}}}
    monkeypatch.setattr(cluster, "_details", lambda: {"applications": {"longserve": found}})
    monkeypatch.setattr(cluster, "ask_replicas", lambda *_: [])
    told = cluster.report(ServeFile(applications=[ApplicationSection()]))
    assert told["longserve"]["replicas"] == [{"pid": None, "state": "STARTING"}]
