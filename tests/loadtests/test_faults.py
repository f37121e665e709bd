"""A server's every misbehaviour has its name in the report, and none counts as an answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loadtests.result import Report
from loadtests.run import main
from tests.loadtests.conftest import Run, sweep
from tests.loadtests.stub import Stub

RATE = {"kind": "constant", "rate": 40}
NAMES = {
    "429": "refused",
    "503": "refused",
    "400": "client_error",
    "500": "server_error",
    "garbage": "garbage",
    "empty": "garbage",
    "error_in_200": "garbage",
    "not_http": "garbage",
    "die": "cut_off",
    "cut_off": "cut_off",
    "trickle": "trickled",
    "silent": "timeout",
}


def _patience(fault: str) -> float:
    """Seconds: short where they are waited out, else long enough for a machine that does much besides."""
    return 1.5 if fault in ("silent", "trickle") else 20.0


def outcomes(report: Report) -> dict[str, int]:
    (block,) = report.blocks
    return block.streams["requests"].outcomes


@pytest.mark.parametrize(("fault", "name"), NAMES.items())
def test_each_fault_is_named_and_counts_as_no_answer(
    fault: str, name: str, serve: Callable[[Stub], str], measure: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = Stub(faults=["", "", fault, fault])  # after one answer to the warm-up
    status, report = measure(serve(stub), **sweep(loads=[RATE], timeout_seconds=_patience(fault)))
    assert outcomes(report) == {"ok": 6, name: 2}
    assert name.replace("_", " ") in capsys.readouterr().out
    assert report.failed_requests == (0 if name == "refused" else 2)
    assert status != 0 or name == "refused"
    assert all(gate.passed for block in report.blocks for gate in block.gates if gate.name.startswith("counted alike"))


@pytest.mark.parametrize("fault", ["garbage", "die", "cut_off", "trickle", "400"])
def test_a_stream_that_is_not_whole_counts_as_no_answer(fault: str, serve: Callable[[Stub], str], measure: Run) -> None:
    stub = Stub(faults=["", "", fault])
    _, report = measure(serve(stub), **sweep(loads=[RATE], api="stream", timeout_seconds=_patience(fault)))
    assert outcomes(report) == {"ok": 7, NAMES[fault]: 1}


def test_a_server_that_is_gone_ends_the_run_with_what_was_measured(serve: Callable[[Stub], str], measure: Run) -> None:
    stub = Stub(faults=["", "", "", "vanish"])
    status, report = measure(serve(stub), **sweep(loads=[RATE], repeats=5))
    first, second = report.blocks
    assert status == 130 and report.interrupted
    ended = first.streams["requests"].outcomes
    assert ended["ok"] == 2 and ended["cut_off"] >= 1 and sum(ended.values()) == 8
    assert second.streams["requests"].outcomes == {"unreachable": 8}
    assert "the server stopped answering" in report.notes[-1]


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "ftp://127.0.0.1", "nonsense", "http://"])
def test_an_unreachable_server_is_told_in_one_line(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--url", url, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("loadtests sweep: ") and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize("fault", ["500", "garbage", "die"])
def test_a_server_that_only_fails_has_a_page_that_says_so(
    fault: str, serve: Callable[[Stub], str], measure: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = measure(serve(Stub(always=fault)), **sweep(loads=[RATE]))
    assert outcomes(report) == {NAMES[fault]: 8}
    assert status != 0
    assert "No request was answered" in capsys.readouterr().out


def test_a_server_that_answers_by_another_backend_makes_the_run_invalid(serve: Callable[[Stub], str], measure: Run) -> None:
    stub = Stub(seconds={"": lambda _: 0.0, "dense": lambda _: 0.0}, named="performer")
    status, report = measure(serve(stub), **sweep(backends=["dense"]))
    (block,) = report.blocks
    assert [gate.told for gate in block.gates if not gate.passed and gate.name == "served by the backend asked for"] == [
        "answers name performer"
    ]
    assert status == 3


def test_what_a_receipt_says_is_passed_over_where_it_is_no_number(serve: Callable[[Stub], str], measure: Run) -> None:
    stub = Stub(receipt={"reserved_bytes": 1e999, "prefill_seconds": "soon", "queue_seconds": None})
    _, report = measure(serve(stub), **sweep())
    (block,) = report.blocks
    stream = block.streams["requests"]
    assert stream.ok == stream.count and stream.reserved_bytes is None and stream.server == {}


def test_a_url_with_a_password_is_refused_before_it_stands_in_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "--url", "http://me:secret@127.0.0.1:1", "--out", str(tmp_path)]) == 2
    assert "secret" not in capsys.readouterr().err
