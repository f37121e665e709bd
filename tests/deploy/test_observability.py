"""Rules and dashboard against what is exported: Prometheus and Grafana both pass over a wrong name in silence."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import promql_parser
import pytest
import yaml

from tests.deploy.conftest import DEPLOY

Exported = Mapping[str, frozenset[str]]
OF_THE_SCRAPE = {"job", "instance"}
PARTS = ("expr", "lhs", "rhs", "args", "param", "vector_selector")
RULES = [
    rule
    for name in ("recording.yml", "alerts.yml")
    for group in yaml.safe_load((DEPLOY / "prometheus" / name).read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = [rule["alert"] for rule in RULES if "alert" in rule]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "longserve.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = [each for each in DASHBOARD["templating"]["list"] if each["type"] == "query"]
RANGES = {"$__rate_interval": "1m", "$__range": "1h"}


def parsed(expression: str) -> Any:
    """The tree of an expression, Grafana's ranges filled in. Raises ValueError for what is no PromQL."""
    for name, value in RANGES.items():
        expression = expression.replace(name, value)
    return promql_parser.parse(expression)


def nodes(node: Any) -> Iterator[Any]:
    """All parts of a tree."""
    if isinstance(node, list):
        for each in node:
            yield from nodes(each)
    elif node is not None and not isinstance(node, str):
        yield node
        for part in PARTS:
            yield from nodes(getattr(node, part, None))


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """The name and the labels of each series selected."""
    for node in nodes(parsed(expression)):
        if isinstance(node, promql_parser.VectorSelector):
            yield node.name, {matcher.name for matcher in node.matchers.matchers}


def grouped(expression: str) -> set[str]:
    """The labels that an expression groups or joins by."""
    written = re.findall(r"\b(?:by|on|ignoring|group_left|group_right)\s*\(([^)]*)\)", expression)
    return {label.strip() for labels in written for label in labels.split(",") if label.strip()}


def faults(expression: str, exported: Exported) -> list[str]:
    """What an expression says that the service does not export."""
    found, known = [], set(OF_THE_SCRAPE)
    for name, labels in selectors(expression):
        if name in RECORDED:
            known |= {"backend", "length"}
        elif name == "up":
            continue
        elif name not in exported:
            found.append(f"no metric {name}")
        else:
            known |= exported[name]
            found += [f"{name} has no label {label}" for label in labels - exported[name] - OF_THE_SCRAPE]
    return found + [f"no label {label}" for label in grouped(expression) - known]


def test_a_wrong_metric_and_a_wrong_label_are_found(exported: Exported) -> None:
    assert faults("rate(longserve_nothing_total[5m])", exported) == ["no metric longserve_nothing_total"]
    assert faults('longserve_truth_error{kind="x"}', exported) == ["longserve_truth_error has no label kind"]
    assert faults("sum by (le) (longserve_truth_error)", exported) == ["no label le"]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule.get("record"))
def test_every_rule_asks_for_what_is_exported(rule: Mapping[str, Any], exported: Exported) -> None:
    assert faults(rule["expr"], exported) == []


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_panel_asks_for_what_is_exported_and_names_its_metric(panel: Mapping[str, Any], exported: Exported) -> None:
    for target in panel["targets"]:
        assert faults(target["expr"], exported) == []
        legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        of_series = grouped(target["expr"]) | {
            label for name, _ in selectors(target["expr"]) for label in exported.get(name, ())
        }
        assert legend <= of_series | {"backend", "length"}
    assert "longserve_" in panel["description"]


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda variable: variable["name"])
def test_every_variable_lists_what_is_exported(variable: Mapping[str, Any], exported: Exported) -> None:
    selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
    ((name, _),) = selectors(selector)
    assert faults(selector, exported) == []
    assert label in exported[name] | OF_THE_SCRAPE


def test_every_exported_metric_is_shown_or_is_not_for_a_reason(exported: Exported) -> None:
    told = {name for panel in PANELS for target in panel["targets"] for name, _ in selectors(target["expr"])}
    told |= {name for rule in RULES if rule.get("record") in told for name, _ in selectors(rule["expr"])}
    shown = {_family(name) for name in told}
    left_out = yaml.safe_load((DEPLOY / "grafana" / "not-shown.yml").read_text())
    families = {_family(name) for name in exported if name.startswith("longserve_")}
    assert families - shown - set(left_out) == set()
    assert set(left_out) <= families - shown
    assert all(left_out.values())


def test_an_edge_that_a_rule_names_is_an_edge_of_its_histogram() -> None:
    from service import metrics

    edges = {"time_to_first_token_seconds": metrics.REQUEST_SECONDS, "memory_prediction_ratio": metrics.RATIO}
    edges["time_prediction_ratio"] = metrics.RATIO
    named = [found for rule in RULES for found in re.findall(r'longserve_(\w+)_bucket\{[^}]*le="([^"]+)"', rule["expr"])]
    assert named
    for histogram, edge in named:
        assert edge in [str(float(each)) for each in edges[histogram]]


def test_every_alert_has_a_firing_and_a_silent_case() -> None:
    cases = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yml").read_text())["tests"]
    told = [(check["alertname"], bool(check["exp_alerts"])) for case in cases for check in case["alert_rule_test"]]
    assert sorted(told) == sorted((alert, fires) for alert in ALERTS for fires in (True, False))


def test_alerts_fire_and_stay_silent_as_their_cases_say(promtool: str) -> None:
    for arguments in (("check", "config", "prometheus.yml"), ("test", "rules", "alerts_test.yml")):
        done = subprocess.run([promtool, *arguments], cwd=DEPLOY / "prometheus", capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr


def test_panels_do_not_overlap_and_have_numbers_of_their_own() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        covered = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & covered and at["x"] + at["w"] <= 24, panel["title"]
        cells |= covered
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def _family(name: str) -> str:
    return re.sub(r"_(bucket|sum|count|total)$", "", name)
