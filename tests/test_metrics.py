"""The metric table by itself: merging, closed labels, and what a scrape weighs."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import pickle
import re
from collections.abc import Callable

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from attention import names
from service import exposition
from service.engine.observer import Shadowed, Step
from service.engine.request import Request
from service.exposition import KEEP_SECONDS, Format, Gathered, Page
from service.logs import JsonLines
from service.metrics import LENGTHS, Metrics, length_class
from service.timing import Timings

MOST_LINES = 850  # of one backend: a scrape every few seconds must stay cheap: one line costs some 7 microseconds


def request(backend: str = "dense", tokens: int = 100, id: str = "id") -> Request:
    times = Timings(queued_at=1.0, admitted_at=2.0, prefilled_at=4.0, first_token_at=4.5, finished_at=8.0, backend=backend)
    times.output_tokens = 3
    times.reserved_bytes, times.state_bytes, times.step_bytes = 5000, 1000, 2000
    times.seen_tokens = min(tokens, 60)
    return Request(id, "completion", [1] * tokens, backend, timings=times)


def page(metrics: Metrics, format: Format = "text") -> str:
    return exposition.page(Gathered([exposition.families(metrics.registry, "r", format)]), format).decode()


def samples(metrics: Metrics) -> dict[str, float]:
    """Name and labels of every sample of one replica, as the text format has them."""
    lines = page(metrics).splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_a_requests_phases_are_told_apart() -> None:
    metrics = Metrics()
    metrics.finished(request(), "stop")
    found = samples(metrics)
    labels = '{backend="dense",length="512",replica="r"}'
    assert found['longserve_request_queue_seconds_sum{backend="dense",replica="r"}'] == 1.0
    assert found[f"longserve_prefill_seconds_sum{labels}"] == 2.0
    assert found['longserve_decode_seconds_sum{backend="dense",replica="r"}'] == 4.0
    assert found[f"longserve_time_to_first_token_seconds_sum{labels}"] == 3.5
    assert found[f"longserve_request_duration_seconds_sum{labels}"] == 7.0


def test_reserved_and_measured_bytes_are_told_apart_and_one_that_was_not_measured_is_not_told() -> None:
    metrics, unmeasured = Metrics(), request(tokens=600)
    unmeasured.timings.step_bytes = None
    metrics.finished(request(tokens=600), "stop")
    metrics.finished(unmeasured, "stop")
    found = samples(metrics)
    labels = '{backend="dense",length="1024",replica="r"}'
    assert (
        found[f"longserve_request_reserved_bytes_count{labels}"],
        found[f"longserve_request_measured_bytes_count{labels}"],
    ) == (2, 1)
    assert found[f"longserve_request_measured_bytes_sum{labels}"] == 3000
    assert found['longserve_prompt_tokens_seen_total{backend="dense",replica="r"}'] == 120
    assert found['longserve_prompt_tokens_total{backend="dense",replica="r"}'] == 1200


@pytest.mark.parametrize(("format", "parse"), [("text", parse_text), ("openmetrics", parse_openmetrics)])
def test_what_replicas_export_can_be_sent_and_lies_side_by_side(format: Format, parse: Callable) -> None:
    exports = []
    for replica, count in (("a", 2), ("b", 3)):
        metrics = Metrics()
        for _ in range(count):
            metrics.refused(request(), "queue_full")
            metrics.finished(request(), "stop")
        exports.append(pickle.loads(pickle.dumps(exposition.families(metrics.registry, replica, format))))
    text = exposition.page(Gathered(exports, missing=1), format).decode()
    families = {family.name: family for family in parse(text)}  # each once, or OpenMetrics' parser complains
    name = "longserve_rejected"
    full = [s for s in families[name].samples if s.name == f"{name}_total" and s.labels["reason"] == "queue_full"]
    assert {s.labels["replica"]: s.value for s in full} == {"a": 2, "b": 3}
    assert {s.labels["state"]: s.value for s in families["longserve_replicas"].samples} == {"answered": 2, "missing": 1}
    assert text.count("# EOF") == (format == "openmetrics")


@pytest.mark.parametrize("format", ["text", "openmetrics"])
def test_every_line_is_the_one_that_the_client_library_writes(format: Format) -> None:
    metrics = Metrics()
    metrics.finished(request(id='a "quoted" id'), "stop")
    metrics.stepped(Step("decode", "dense", 4, 4, 0.1, 0.2, 1, 2**40))
    metrics.build.labels("1", 'back\\slash "quote"', "two\nlines äöü").set(float("nan"))
    metrics.degraded.set(float("inf"))
    metrics.switched.set(1.7e18)
    ours = b"".join(part for family in exposition.families(metrics.registry, "r", format).values() for part in family)
    theirs = exposition.WRITERS[format](metrics.registry).removesuffix(exposition.END).splitlines()
    theirs = [line for line in theirs if b"_created" not in line]  # left out here, and a family of its own in the text format
    varies = (b"longserve_process_", b"# HELP longserve_process_")  # from one reading to the next
    bare = re.sub(rb',replica="r"|\{replica="r"\}|(?<=\{)replica="r",', b"", ours).splitlines()
    assert [line for line in bare if not line.startswith(varies)] == [line for line in theirs if not line.startswith(varies)]


def test_an_exemplar_names_the_request_behind_a_bucket_unless_its_id_is_too_long() -> None:
    metrics = Metrics()
    metrics.finished(request(id="mine"), "stop")
    metrics.finished(request(id="x" * 128, tokens=5000), "stop")
    families = {family.name: family for family in parse_openmetrics(page(metrics, "openmetrics"))}
    for name in ("request_duration_seconds", "prefill_seconds", "time_to_first_token_seconds", "request_measured_bytes"):
        exemplars = [s.exemplar for s in families[f"longserve_{name}"].samples if s.exemplar]
        assert [each.labels for each in exemplars] == [{"request_id": "mine"}]


@pytest.mark.parametrize(
    ("accept", "format"),
    [
        ("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", "openmetrics"),
        ("text/plain", "text"),
        ("", "text"),
    ],
)
def test_the_caller_chooses_the_format(accept: str, format: Format) -> None:
    assert exposition.format_of(accept) == format


async def test_a_page_is_made_once_for_all_who_ask_within_a_second_unless_they_want_it_fresh() -> None:
    made = []

    async def gather(format: Format) -> Gathered:
        made.append(format)
        await asyncio.sleep(0.05)
        return Gathered([])

    kept = Page(gather)
    await asyncio.gather(*(kept.text("text") for _ in range(20)))
    await kept.text("text")
    assert made == ["text"]
    await kept.text("openmetrics")
    assert made == ["text", "openmetrics"]
    await asyncio.gather(*(kept.text("text", is_fresh=True) for _ in range(20)))
    assert made.count("text") == 3  # one for who came first, one for all who came while it was made
    await asyncio.sleep(KEEP_SECONDS)
    await kept.text("text")
    assert made.count("text") == 4


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
    metrics.stepped(Step("decode", "dense", 4, 4, 0.1, 0.2, predicted_bytes=2**20, measured_bytes=3 * 2**19))
    metrics.stepped(Step("decode", "dense", 4, 4, 0.1, 0.2, predicted_bytes=1000, measured_bytes=9000))  # less than is promised
    metrics.stepped(Step("decode", "dense", 4, 4, 0.1, 0.2, predicted_bytes=1000, measured_bytes=None))
    found = samples(metrics)
    assert found['longserve_memory_prediction_ratio_sum{backend="dense",replica="r"}'] == 1.5
    assert found['longserve_memory_prediction_ratio_count{backend="dense",replica="r"}'] == 1
    assert found['longserve_time_prediction_ratio_count{backend="dense",replica="r"}'] == 3
    assert found['longserve_memory_samples_total{backend="dense",method="skipped",replica="r"}'] == 1


def test_the_gaps_between_tokens_are_told_as_they_come() -> None:
    metrics = Metrics()
    metrics.stepped(Step("decode", "dense", 3, 3, 0.1, 0.2, predicted_bytes=1000, measured_bytes=None, token_gaps=(1.0, 2.0)))
    metrics.finished(request(), "stop")
    found = samples(metrics)
    assert found['longserve_inter_token_seconds_sum{backend="dense",replica="r"}'] == 3.0
    assert found['longserve_inter_token_seconds_count{backend="dense",replica="r"}'] == 2


def test_with_every_backend_and_length_a_scrape_stays_small() -> None:
    metrics = Metrics()
    metrics.switched_to([{"name": name, "options": {}} for name in names()], "dense", {}, "float32", "cpu")
    for backend, tokens in itertools.product(names(), (*LENGTHS, LENGTHS[-1] + 1)):
        metrics.finished(request(backend, tokens), "stop")
        for kind in ("prefill", "decode", "embed"):
            metrics.stepped(Step(kind, backend, 1, 1, 0.1, 0.1, 1, 1))
    assert len(page(metrics).splitlines()) < MOST_LINES * len(names())


def test_where_answers_are_scored_again_a_scrape_grows_by_a_sixth_at_most() -> None:
    pages = []
    for results in ((), ("scored", "replaced", "too_long", "gave_way", "failed")):
        metrics = Metrics()
        for backend, tokens in itertools.product(names(), (*LENGTHS, LENGTHS[-1] + 1)):
            for result in results:
                metrics.shadowed(Shadowed("id", backend, tokens, result, (0.1,) if result == "scored" else ()))
        pages.append(len(page(metrics).splitlines()))
    assert pages[1] - pages[0] < MOST_LINES / 6 * len(names())


def test_a_divergence_is_told_place_by_place_and_an_answer_by_what_became_of_it() -> None:
    metrics = Metrics()
    metrics.shadowed(Shadowed("mine", "performer", 600, "scored", (0.25, 0.5), 1))
    metrics.shadowed(Shadowed("other", "performer", 600, "gave_way"))
    found = samples(metrics)
    labels = '{backend="performer",length="1024",replica="r"}'
    assert found[f"longserve_shadow_divergence_nats_sum{labels}"] == 0.75
    assert found[f"longserve_shadow_divergence_nats_count{labels}"] == 2
    assert found[f"longserve_shadow_agreed_total{labels}"] == 1
    for result in ("scored", "gave_way"):
        assert found[f'longserve_shadow_answers_total{{backend="performer",replica="r",result="{result}"}}'] == 1
    families = {family.name: family for family in parse_openmetrics(page(metrics, "openmetrics"))}
    exemplars = [s.exemplar for s in families["longserve_shadow_divergence_nats"].samples if s.exemplar]
    assert [each.labels for each in exemplars] == [{"request_id": "mine"}] * 2


def test_a_candidates_share_is_off_the_defaults_and_goes_with_its_list() -> None:
    metrics, listed = Metrics(), [{"name": name, "options": {}} for name in ("dense", "performer", "linear")]

    def shares() -> dict[str, float]:
        of = "longserve_backend_share_ratio"
        return {name.split('"')[1]: value for name, value in samples(metrics).items() if name.startswith(of)}

    metrics.switched_to(listed, "dense", {"performer": 0.25}, "float32", "cpu")
    assert shares() == {"dense": 0.75, "performer": 0.25, "linear": 0}
    metrics.switched_to(listed[:2], "auto", {"performer": 0.25}, "float32", "cpu")
    assert shares() == {"dense": 0, "performer": 0.25}
    metrics.switched_to(listed[:1], "dense", {"dense": 0.25}, "float32", "cpu")
    assert shares() == {"dense": 1}


def test_counters_begin_at_zero_so_that_a_rate_sees_the_first() -> None:
    metrics = Metrics()
    metrics.switched_to([{"name": "dense", "options": {}}], "dense", {}, "float32", "cpu")
    found = samples(metrics)
    assert found['longserve_requests_total{backend="dense",kind="embedding",outcome="internal",replica="r"}'] == 0
    assert found['longserve_rejected_total{reason="queue_full",replica="r"}'] == 0
    assert found['longserve_backend_switch_total{replica="r",result="failed"}'] == 0


def test_four_histograms_carry_the_length() -> None:
    metrics = Metrics()
    metrics.finished(request(), "stop")
    assert len({name.split("{")[0] for name in samples(metrics) if "_bucket{" in name and "length=" in name}) == 4


def test_a_finished_request_is_one_json_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("longserve.request")
    with caplog.at_level(logging.INFO, logger.name):
        logging.getLogger("longserve").propagate = True
        Metrics().finished(request(), "length")
    line = json.loads(JsonLines().format(caplog.records[-1]))
    assert (line["id"], line["outcome"], line["backend"], line["length"]) == ("id", "length", "dense", "512")
    assert (line["prefill_seconds"], line["total_seconds"]) == (2.0, 7.0)
    assert (line["reserved_bytes"], line["measured_bytes"]) == (5000, 3000)


def test_an_error_is_logged_as_one_line_with_its_cause_and_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("longserve.http")
    logging.getLogger("longserve").propagate = True
    try:
        raise RuntimeError("two\nlines")
    except RuntimeError:
        logger.exception("request %s failed", "id")
    text = JsonLines().format(caplog.records[-1])
    line = json.loads(text)
    assert "\n" not in text
    assert (line["message"], line["error"], line["level"]) == ("request id failed", "RuntimeError: two lines", "error")
    assert line["traceback"].endswith("RuntimeError: two\nlines") and "test_metrics.py" in line["traceback"]
