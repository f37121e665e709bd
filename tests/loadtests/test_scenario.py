"""Scenarios are what they say: typed, closed, told where they are wrong."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from loadtests import scenario
from loadtests.faults import ScenarioError
from loadtests.run import SCENARIOS, main
from loadtests.scenario import Limit, Sweep

GOOD: dict[str, Any] = {
    "name": "trial",
    "kind": "sweep",
    "lengths": {"kind": "list", "tokens": [512, 1024]},
    "loads": [{"kind": "in_flight", "requests": 1}],
}
FIXED = {"kind": "fixed", "tokens": 64}
STREAMS = [
    {"name": "short", "lengths": FIXED, "arrivals": {"kind": "constant", "rate": 1}},
    {"name": "long", "lengths": FIXED, "arrivals": {"kind": "poisson", "rate": 1}},
]
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"secnds": 3}, "secnds: Extra inputs are not permitted"),
    ({"kind": "swep"}, "'sweep', 'capacity', 'mixed', 'soak'"),
    ({"seconds": "3"}, "seconds"),
    ({"seconds": 0}, "seconds"),
    ({"seconds": float("nan")}, "seconds"),
    ({"repeats": 0}, "repeats"),
    ({"repeats": True}, "repeats"),
    ({"loads": []}, "loads"),
    ({"loads": [{"kind": "poisson", "rate": -1}]}, "loads.0.poisson.rate"),
    ({"loads": [{"kind": "poisson", "rat": 1}]}, "loads.0.poisson.rat"),
    ({"loads": [{"kind": "gamma", "rate": 1}]}, "loads.0.gamma.variation: Field required"),
    ({"lengths": {"kind": "list", "tokens": []}}, "lengths.list.tokens"),
    ({"lengths": {"kind": "fixed", "tokens": 0}}, "lengths.fixed.tokens"),
    ({"lengths": {"kind": "log_normal"}}, "needs either preset, or both ln_mean and ln_sd"),
    ({"lengths": {"kind": "log_normal", "preset": "azure_code", "ln_sd": 1.0}}, "needs either preset"),
    ({"lengths": {"kind": "log_normal", "preset": "azure"}}, "azure_code"),
    ({"service_level": {"attainment": 0.9}}, "needs latency, first_token or both"),
    ({"api": "complete"}, "api"),
    ({"name": "Bad Name"}, "name"),
]


def test_every_shipped_scenario_is_one_of_its_kind() -> None:
    kinds = {path.stem: scenario.read(path).kind for path in SCENARIOS.glob("*.yaml")}
    assert kinds == {kind: kind for kind in ("sweep", "capacity", "mixed", "soak")} | {"referee": "sweep"}


@pytest.mark.parametrize(("change", "told"), WRONG, ids=[str(change) for change, _ in WRONG])
def test_a_wrong_field_is_refused_by_its_name(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ScenarioError, match="here: ") as caught:
        scenario.parse(GOOD | change, "here")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"probe": "shorter"}, "probe must be one of short, long"),
        ({"streams": [STREAMS[0], STREAMS[0]]}, "names must differ"),
        ({"streams": STREAMS[:1]}, "streams"),
        ({"streams": [STREAMS[0], STREAMS[1] | {"lengths": {"kind": "trace"}}]}, "need arrivals of kind replay"),
    ],
)
def test_mixed_traffic_that_does_not_fit_together_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        scenario.parse({"name": "trial", "kind": "mixed", "probe": "short", "streams": STREAMS} | change, "here")
    assert told in str(caught.value)


@pytest.mark.parametrize("text", ["- a list", "a: [1", "", "\xff\xfe"])
def test_a_file_that_is_no_scenario_is_told_in_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_bytes(text.encode("latin-1"))
    assert main(["sweep", str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and "Traceback" not in error


def test_a_scenario_of_another_kind_names_the_command_it_belongs_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    assert main(["soak", str(path)]) == 2
    assert f"python -m loadtests sweep {path}" in capsys.readouterr().err


def test_a_missing_file_is_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(tmp_path / "none.yaml")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_a_fingerprint_changes_with_any_field_and_with_nothing_else() -> None:
    one = scenario.parse(GOOD, "here")
    same = scenario.parse(dict(reversed(GOOD.items())), "here")
    other = scenario.parse(GOOD | {"seed": 2}, "here")
    assert scenario.fingerprint(one) == scenario.fingerprint(same) != scenario.fingerprint(other)
    assert len(scenario.fingerprint(one)) < len(hashlib.sha256().hexdigest())


def test_a_limit_grows_with_the_input() -> None:
    assert Limit(seconds=0.5, seconds_per_token=0.001).at(2000) == 2.5


def test_what_the_command_line_gives_replaces_the_fields_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    read = scenario.read(path, seconds=1.5, backends=("a", "b"), repeats=None)
    assert isinstance(read, Sweep) and (read.seconds, read.backends, read.repeats) == (1.5, ("a", "b"), 1)
