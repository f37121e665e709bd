"""Two reports: what became slower is told apart from what chance alone makes of the same laws."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests import compare, result
from loadtests.faults import ScenarioError
from loadtests.result import Report
from loadtests.run import main
from tests.loadtests.samples import report_of

SLOWER = {("dense", 4096): 1.2, ("performer", 512): 0.7}


def kept(report: Report, path: Path) -> str:
    result.save(report, path)
    return str(path)


def test_the_slower_cell_is_a_regression_and_nothing_else_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = report_of("sweep"), report_of("sweep", slower=SLOWER, chance=2)
    found = {each.name: each for each in compare.compared(before, after)}
    assert {name for name, each in found.items() if each.is_regression(0.05)} == {
        "dense, 4,096 tokens, 1 in flight",
        "dense, 4,096 tokens, 4 in flight",
    }
    assert {name for name, each in found.items() if each.is_gain(0.05)} == {
        "performer, 512 tokens, 1 in flight",
        "performer, 512 tokens, 4 in flight",
    }
    assert all(
        each.ratio.low <= SLOWER.get(_cell(name), 1.0) <= each.ratio.high
        for name, each in found.items()
        if _cell(name) in SLOWER
    )
    assert main(["compare", kept(before, tmp_path / "a.json"), kept(after, tmp_path / "b.json")]) == 1
    assert "2 regressions in 36 cells" in capsys.readouterr().out


def _cell(name: str) -> tuple[str, int]:
    backend, tokens, *_ = name.split(", ")
    return backend, int(tokens.split()[0].replace(",", ""))


def test_the_same_laws_by_other_chances_are_no_regression(tmp_path: Path) -> None:
    paths = [kept(report_of("sweep", chance=chance), tmp_path / f"{chance}.json") for chance in (1, 2)]
    assert main(["compare", *paths]) == 0


def test_a_report_that_is_not_valid_does_not_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [kept(report_of("mixed", failing=failing), tmp_path / f"{failing}.json") for failing in (False, True)]
    assert main(["compare", *paths]) == 3
    assert "is not valid" in capsys.readouterr().out


def test_reports_that_share_no_cell_are_refused() -> None:
    with pytest.raises(ScenarioError, match="share no cell"):
        compare.compared(report_of("mixed"), report_of("soak"))
