"""The command line where it is on its own: when nobody reads what it prints, and what it makes of what Serve tells."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service import apply, cli, cluster
from service.config import IMPORT_PATH, ApplicationSection, ServeFile
from tests.serving import LOCAL, free_port


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


def run(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """`longserve ARGUMENTS`."""
    command = [sys.executable, "-m", "service.cli", *arguments]
    environment = os.environ | {"PYTHONPATH": str(LOCAL.parent.parent)} | kwargs.pop("env", {})
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, env=environment, **kwargs)


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A config file whose port is free."""
    path = tmp_path / "local.yaml"
    path.write_text(LOCAL.read_text().replace("port: 8000", f"port: {free_port()}"))
    return str(path)


def test_a_folder_that_is_gone_is_told_before_others_stumble_over_it(tmp_path: Path, file: str) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    refused = run("status", file, preexec_fn=lambda: (os.chdir(gone), gone.rmdir()))
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "the folder that this was started in is gone" in refused.stderr


@pytest.mark.parametrize("place", ["absent", "local.yaml"])
def test_a_place_where_ray_can_have_no_folder_is_told(place: str, tmp_path: Path, file: str) -> None:
    refused = run("serve", file, env={"RAY_TMPDIR": str(tmp_path / place)})
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert str(tmp_path / place) in refused.stderr and "RAY_TMPDIR" in refused.stderr


def test_a_prompt_that_is_no_text_is_told(tmp_path: Path, file: str) -> None:
    prompt = tmp_path / "prompt"
    prompt.write_bytes(b"a\xff")
    refused = run("plan", str(prompt), file)
    assert (refused.returncode, refused.stderr) == (2, f"{prompt}: no UTF-8, invalid start byte at byte 1\n")


def test_an_output_that_takes_nothing_more_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; from service import cli; cli.status = lambda options: print('{}') or 0; sys.exit(cli.main(['status']))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "longserve status: [Errno 28] No space left on device\n")


def test_an_interrupted_command_prints_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(options: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "status", interrupted)
    assert cli.main(["status"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == ""


def test_where_nothing_can_be_printed_serve_ends_as_it_would_else(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "service.cli", "serve", str(tmp_path / "none.yaml")]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "none.yaml: No such file" in done.stderr


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
