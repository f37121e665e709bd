"""The metric table by itself: merging, closed labels, and what a scrape weighs."""

from __future__ import annotations

import itertools
import json
import logging
import pickle

import pytest

from attention import names
from service.engine.observer import Step
from service.engine.request import Request
from service.metrics import LENGTHS, Metrics, length_class, render
from service.timing import Timings

MOST_LINES = 6000  # a scrape every few seconds must stay cheap: one line costs some 7 microseconds


def request(backend: str = "dense", tokens: int = 100) -> Request:
    times = Timings(queued_at=1.0, admitted_at=2.0, prefilled_at=4.0, first_token_at=4.5, finished_at=8.0, backend=backend)
    times.output_tokens, times.token_times = 3, [4.5, 5.5, 7.5]
    return Request("id", "completion", [1] * tokens, backend, timings=times)


def samples(metrics: Metrics) -> dict[str, float]:
    """Name and labels of every sample of one replica, as the text format has them."""
    lines = render({"r": metrics.export()}).decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_a_requests_phases_are_told_apart() -> None:
    metrics = Metrics()
    metrics.finished(request(), "stop")
    found = samples(metrics)
    labels = '{backend="dense",kind="completion",replica="r"}'
    assert found[f"longserve_request_queue_seconds_sum{labels}"] == 1.0
    assert found['longserve_prefill_seconds_sum{backend="dense",length="512",replica="r"}'] == 2.0
    assert found['longserve_decode_seconds_sum{backend="dense",replica="r"}'] == 4.0
    assert found['longserve_time_to_first_token_seconds_sum{backend="dense",replica="r"}'] == 3.5
    assert found['longserve_inter_token_seconds_sum{backend="dense",replica="r"}'] == 3.0
    assert found['longserve_inter_token_seconds_count{backend="dense",replica="r"}'] == 2
    assert found[f"longserve_request_duration_seconds_sum{labels}"] == 7.0


def test_what_replicas_export_can_be_sent_and_adds_up() -> None:
    exports = {}
    for replica, count in (("a", 2), ("b", 3)):
        metrics = Metrics()
        for _ in range(count):
            metrics.refused(request(), "queue_full")
        exports[replica] = pickle.loads(pickle.dumps(metrics.export()))
    text = render(exports).decode()
    assert text.count("# TYPE longserve_rejected_total counter") == 1
    assert 'longserve_rejected_total{reason="queue_full",replica="a"} 2.0' in text
    assert 'longserve_rejected_total{reason="queue_full",replica="b"} 3.0' in text


@pytest.mark.parametrize(("reason", "outcome"), [("queue_full", "rejected"), ("context_length_exceeded", "client_error")])
def test_a_refusal_is_the_hours_fault_or_the_callers(reason: str, outcome: str) -> None:
    metrics = Metrics()
    metrics.refused(request("a caller's word"), reason)
    found = samples(metrics)
    assert found[f'longserve_requests_total{{backend="none",kind="completion",outcome="{outcome}",replica="r"}}'] == 1
    assert not any("caller's" in name for name in found)


@pytest.mark.parametrize("edge", LENGTHS)
def test_a_length_class_holds_its_own_edge(edge: int) -> None:
    assert length_class(edge) == str(edge)
    assert length_class(edge + 1) != str(edge)


def test_a_length_past_all_classes_has_one_of_its_own() -> None:
    assert length_class(LENGTHS[-1] + 1) == "over"


def test_a_measured_peak_is_held_against_its_prediction() -> None:
    metrics = Metrics()
    metrics.stepped(Step("decode", "dense", 4, 4, 0.1, 0.2, predicted_bytes=1000, measured_bytes=1500))
    metrics.stepped(Step("decode", "dense", 4, 4, 0.1, 0.2, predicted_bytes=1000, measured_bytes=None))
    found = samples(metrics)
    assert found['longserve_memory_prediction_ratio_sum{backend="dense",replica="r"}'] == 1.5
    assert found['longserve_time_prediction_ratio_count{backend="dense",replica="r"}'] == 2
    assert found['longserve_memory_samples_total{backend="dense",method="skipped",replica="r"}'] == 1


def test_with_every_backend_and_length_a_scrape_stays_small() -> None:
    metrics = Metrics()
    for backend, tokens in itertools.product(names(), (*LENGTHS, LENGTHS[-1] + 1)):
        metrics.finished(request(backend, tokens), "stop")
        for kind in ("prefill", "decode", "embed"):
            metrics.stepped(Step(kind, backend, 1, 1, 0.1, 0.1, 1, 1))
    assert len(render({"r": metrics.export()}).splitlines()) < MOST_LINES


def test_a_finished_request_is_one_json_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("longserve.request")
    with caplog.at_level(logging.INFO, logger.name):
        logging.getLogger("longserve").propagate = True
        Metrics().finished(request(), "length")
    line = json.loads(caplog.records[-1].getMessage())
    assert (line["id"], line["outcome"], line["backend"], line["prefill_seconds"]) == ("id", "length", "dense", 2.0)
