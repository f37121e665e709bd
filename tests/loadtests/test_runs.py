"""Whole runs against a stub whose laws are known: what comes out is what was put in, and what went wrong is told."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from loadtests import analysis, generator, result
from loadtests.client import Ask, Outcome
from loadtests.generator import Interrupt, Load, Traffic
from loadtests.result import Report
from loadtests.run import main
from loadtests.workload import body
from tests.loadtests.conftest import Run, sweep
from tests.loadtests.stub import MODEL, Stub

LENGTHS = (2000, 4000, 8000)


def quadratic(tokens: int) -> float:
    return 1.5e-8 * tokens * tokens  # 60 to 960 ms


def gate(report: Report, name: str) -> list[bool]:
    return [each.passed for block in report.blocks for each in block.gates if each.name == name]


def asks(count: int, rate: float, name: str = "requests") -> tuple[Ask, ...]:
    raw = body("completions", MODEL, "x" * 40, 1)
    return tuple(Ask(name, place, "completions", raw, 10, place / rate) for place in range(count))


def load(url: str, *traffic: Traffic, max_in_flight: int = 100) -> Load:
    return Load(url, {}, 10.0, max_in_flight, traffic)


def test_a_quadratic_law_gets_the_exponent_two_and_a_linear_one_its_slope(serve: Callable[[Stub], str], measure: Run) -> None:
    stub = Stub(
        seconds={"dense": quadratic, "window": lambda _: 0.12},
        peak_bytes={"dense": lambda n: 10**6 + 1536 * n, "window": lambda _: 10**6},
    )
    fields = sweep(backends=["dense", "window"], lengths={"kind": "list", "tokens": list(LENGTHS)}, seconds=0.1)
    _, report = measure(serve(stub), **fields)
    found = analysis.analyse(report)
    growth = {each.backend: each for each in found.growths}
    assert growth["dense"].latency is not None and growth["dense"].bytes_per_token is not None
    assert growth["dense"].latency.value == pytest.approx(2, abs=0.25)  # 0.01 on a machine with nothing else to do
    assert growth["dense"].bytes_per_token.value == pytest.approx(1536, rel=1e-3)
    assert growth["window"].bytes_per_token is not None and growth["window"].bytes_per_token.value == 0
    (crossing,) = found.crossings
    assert crossing.at.tokens is not None and crossing.at.tokens.value == pytest.approx(2828, rel=0.25)
    rows = {(row.cell.backend, row.cell.tokens): row for row in found.rows}
    assert rows["dense", 4000].reserved_bytes == 10**6 + 1536 * 4000
    assert rows["dense", 4000].measured_peak_bytes == 10**6 + 1536 * 4000  # by the metrics alone


def test_the_server_s_counts_are_held_against_the_client_s(serve: Callable[[Stub], str], measure: Run) -> None:
    _, report = measure(serve(Stub()), **sweep())
    (block,) = report.blocks
    assert block.server is not None and block.server.agrees
    answered = block.streams["requests"].ok + 1  # the warm-up's too
    counts = {check.what: (check.client, check.server) for check in block.server.checks}
    assert counts == {
        "answers 200 of /v1/completions": (answered, answered),
        "input tokens": (100 * answered, 100 * answered),
        "output tokens": (8 * answered, 8 * answered),
    }


def test_a_server_that_counts_more_than_was_sent_makes_the_run_invalid(
    serve: Callable[[Stub], str], measure: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = measure(serve(Stub(miscounts=1)), **sweep())
    assert gate(report, "counted alike by the server") == [False]
    assert status == 3 and "INVALID" in capsys.readouterr().out


def test_a_generator_that_stalls_makes_the_run_invalid(
    serve: Callable[[Stub], str], measure: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    stalled = False

    def stall(*_: Any) -> None:
        nonlocal stalled
        if not stalled:
            time.sleep(0.4)  # what a busy machine does to a generator
            stalled = True

    monkeypatch.setattr("loadtests.progress.Live.heard", stall)
    status, report = measure(serve(Stub()), **sweep(loads=[{"kind": "constant", "rate": 50}], seconds=1.0))
    assert gate(report, "sent on time") == [False]
    assert status == 3
    (block,) = report.blocks
    assert block.streams["requests"].latency.values()[-1] > 0.3  # the wait is in the latency, not forgiven


async def test_no_answer_delays_a_later_send_of_an_open_loop(serve: Callable[[Stub], str]) -> None:
    stub = Stub(seconds={"": lambda _: 0.3})
    sent = await generator.run(load(serve(stub), Traffic("requests", asks(10, 100))), 1, Interrupt(), lambda _: None)
    sends = sorted(record.sent for record in sent.records)
    ends = [record.done for record in sent.records]
    assert [record.outcome for record in sent.records] == [Outcome.OK] * 10
    assert sends[-1] < min(ends)


async def test_a_send_beyond_the_cap_is_counted_as_not_made(serve: Callable[[Stub], str]) -> None:
    stub = Stub(seconds={"": lambda _: 0.5})
    traffic = Traffic("requests", asks(10, 100))
    sent = await generator.run(load(serve(stub), traffic, max_in_flight=4), 1, Interrupt(), lambda _: None)
    assert sorted(record.outcome for record in sent.records) == [Outcome.NOT_SENT] * 6 + [Outcome.OK] * 4
    assert len(stub.bodies) == 4


async def test_a_closed_loop_keeps_its_width_and_sends_at_least_what_it_must(serve: Callable[[Stub], str]) -> None:
    stub = Stub(seconds={"": lambda _: 0.05})
    traffic = Traffic("requests", asks(2, 1), in_flight=3, seconds=0.0, min_requests=7)
    sent = await generator.run(load(serve(stub), traffic), 1, Interrupt(), lambda _: None)
    assert len(sent.records) == 7
    events = sorted([(r.sent, 1) for r in sent.records] + [(r.done, -1) for r in sent.records])
    width = peak = 0
    for _, change in events:
        width += change
        peak = max(peak, width)
    assert peak == 3


async def test_several_processes_send_the_whole_schedule_once(serve: Callable[[Stub], str]) -> None:
    stub = Stub()
    traffic = (Traffic("requests", asks(21, 30)), Traffic("loop", asks(2, 1, "loop"), in_flight=3, seconds=0.3, min_requests=4))
    sent = await generator.run(load(serve(stub), *traffic), 2, Interrupt(), lambda _: None)
    open_loop = [record for record in sent.records if record.stream == "requests"]
    assert sorted(record.index for record in open_loop) == list(range(21))
    assert {record.outcome for record in sent.records} == {Outcome.OK}
    assert len(stub.bodies) == len(sent.records)


def test_a_split_load_is_the_load(serve: Callable[[Stub], str]) -> None:
    whole = load("http://x", Traffic("open", asks(7, 1)), Traffic("closed", asks(2, 1), in_flight=2, min_requests=5))
    parts = generator.split(whole, 3)
    assert sorted(ask.index for part in parts for t in part.traffic if t.name == "open" for ask in t.asks) == list(range(7))
    assert sum(t.in_flight or 0 for part in parts for t in part.traffic) == 2


@pytest.mark.parametrize("api", ["completions", "stream", "embeddings", "chat"])
def test_each_api_is_asked_in_its_own_shape(api: str, serve: Callable[[Stub], str], measure: Run) -> None:
    stub = Stub()
    _, report = measure(serve(stub), **sweep(api=api, output_tokens=3))
    (block,) = report.blocks
    stream = block.streams["requests"]
    assert stream.ok == stream.count > 0
    assert stream.tokens_off == 0
    assert stream.output_tokens == (0 if api == "embeddings" else 3 * stream.ok)
    assert (stream.first_token.count > 0) == (api == "stream")
    assert ("input" in stub.bodies[0], "messages" in stub.bodies[0]) == (api == "embeddings", api == "chat")


def test_backends_are_asked_for_by_the_model_s_name_and_unknown_ones_refused(
    serve: Callable[[Stub], str], measure: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = Stub(seconds={"": lambda _: 0.0, "dense": lambda _: 0.0})
    url = serve(stub)
    measure(url, **sweep(backends=["dense"]))
    assert {each["model"] for each in stub.bodies} == {"stub@dense"}
    assert main(["sweep", "--url", url, "--backends", "dense,spare", "--out", str(tmp_path / "x")]) == 2
    assert "serves no 'stub@spare', it serves: stub, stub@dense" in capsys.readouterr().err


def test_lengths_beyond_the_server_s_limit_are_left_out_and_told(serve: Callable[[Stub], str], measure: Run) -> None:
    fields = sweep(lengths={"kind": "list", "tokens": [100, 5000]})
    _, report = measure(serve(Stub(max_tokens=1000)), **fields)
    assert [block.cell.tokens for block in report.blocks] == [100]
    assert any("5,000" in note and "1,000" in note for note in report.notes)


def test_an_interrupted_run_keeps_what_it_measured_and_can_be_resumed(
    serve: Callable[[Stub], str], measure: Run, tmp_path: Path
) -> None:
    stub = Stub(seconds={"": lambda _: 0.02})
    url, fields = serve(stub), sweep(repeats=4, seconds=0.3, loads=[{"kind": "in_flight", "requests": 2}])

    def interrupt() -> None:
        while len(stub.bodies) < 60:  # in the third block or so
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    status, report = measure(url, **fields)
    watcher.join()
    assert status == 130 and report.interrupted
    whole = [block for block in report.blocks if not block.partial]
    assert 1 <= len(whole) < 4
    (path,) = tmp_path.glob("*/*/report.json")
    assert (path.parent / "report.html").exists()
    main(["sweep", str(tmp_path / "scenario.yaml"), "--url", url, "--resume", str(path)])
    resumed = result.load(path)
    assert not resumed.interrupted and len(resumed.blocks) == 4
    assert [block.started for block in resumed.blocks][: len(whole)] == [block.started for block in whole]


def test_a_run_is_not_resumed_with_another_scenario(
    serve: Callable[[Stub], str], measure: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = serve(Stub())
    measure(url, **sweep())
    (path,) = tmp_path.glob("*/*/report.json")
    assert main(["sweep", str(tmp_path / "scenario.yaml"), "--url", url, "--seed", "9", "--resume", str(path)]) == 2
    assert "another scenario" in capsys.readouterr().err


def test_a_dry_run_sends_nothing_and_tells_how_long(
    serve: Callable[[Stub], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub, path = Stub(), tmp_path / "scenario.yaml"
    path.write_text(yaml.safe_dump({"name": "trial"} | sweep(seconds=30.0, repeats=4)))
    assert main(["sweep", str(path), "--url", serve(stub), "--dry-run", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "4 blocks, about 2 min" in out and "nothing was sent" in out
    assert stub.bodies == [] and not (tmp_path / "out").exists()


def test_records_of_single_requests_are_kept_where_asked_for(
    serve: Callable[[Stub], str], measure: Run, tmp_path: Path
) -> None:
    _, report = measure(serve(Stub()), "--records", **sweep())
    (path,) = tmp_path.glob("*/*/requests.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (block,) = report.blocks
    assert len(rows) == block.streams["requests"].count
    assert {row["outcome"] for row in rows} == {"ok"} and all(row["latency"] >= 0 for row in rows)


def test_the_highest_rate_within_a_level_is_found(serve: Callable[[Stub], str], measure: Run) -> None:
    """The stub answers too late from 40 in a second on."""
    times: list[float] = []

    def seconds(_: int) -> float:
        now = time.monotonic()
        times.append(now)
        return 0.4 if sum(now - each < 1 for each in times[-100:]) > 40 else 0.0

    fields = {
        "kind": "capacity",
        "lengths": {"kind": "fixed", "tokens": 100},
        "first_rate": 20.0,
        "requests": 20,
        "precision": 0.9,
        "max_probes": 3,
        "service_level": {"latency": {"seconds": 0.2}},
    }
    _, report = measure(serve(Stub(seconds={"": seconds})), **fields)
    (search,) = report.searches
    kept = [probe.rate for probe in search.probes if probe.kept]
    assert search.rate == (max(kept) if kept else None)
    assert search.rate is None or search.rate < 80
    assert search.probes[0].rate == 20.0
    assert all(probe.count in (20, 40) for probe in search.probes)


def test_short_requests_are_measured_alone_and_beside_the_others(serve: Callable[[Stub], str], measure: Run) -> None:
    streams = [
        {"name": "short", "lengths": {"kind": "fixed", "tokens": 10}, "arrivals": {"kind": "constant", "rate": 20}},
        {"name": "long", "lengths": {"kind": "fixed", "tokens": 900}, "arrivals": {"kind": "poisson", "rate": 5}},
    ]
    stub = Stub()
    stub.seconds = {"": lambda tokens: 0.3 if tokens > 100 else 0.1 if _long(stub) else 0.01}
    _, report = measure(serve(stub), kind="mixed", probe="short", streams=streams, seconds=1.0)
    (blocking,) = analysis.analyse(report).blockings
    assert blocking.alone.ok == blocking.together.ok == 20
    assert blocking.ratio.value > 3


def _long(stub: Stub) -> bool:
    """Whether the last ten requests hold a long one."""
    return any(len(each["prompt"]) > 1000 for each in stub.bodies[-10:])


def test_growth_of_the_server_s_memory_in_a_soak_is_found(serve: Callable[[Stub], str], measure: Run) -> None:
    began = time.monotonic()
    stub = Stub(resident=lambda: 1e8 + 1e6 * (time.monotonic() - began))
    stream = {"lengths": {"kind": "fixed", "tokens": 10}, "arrivals": {"kind": "poisson", "rate": 20}}
    _, report = measure(serve(stub), kind="soak", stream=stream, seconds=1.5, scrape_seconds=0.1)
    (leak,) = analysis.analyse(report).leaks
    assert leak.bytes_per_hour.value == pytest.approx(3.6e9, rel=0.02)
    assert leak.bytes_per_hour.low > 0


def test_a_trace_is_replayed_with_its_own_times_and_lengths(serve: Callable[[Stub], str], measure: Run, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("at,input_tokens,output_tokens\n5,30,2\n5.1,40,3\n5.2,50,4\n9,60,5\n")
    stub = Stub(max_tokens=53)
    stream = {"lengths": {"kind": "trace"}, "arrivals": {"kind": "replay", "path": str(trace), "time_scale": 0.5}}
    _, report = measure(serve(stub), kind="soak", stream=stream, seconds=0.5, warm_up_requests=0)
    (block,) = report.blocks
    sent = block.streams["requests"]
    assert [(len(each["prompt"]) + 3) // 4 for each in stub.bodies] == [30, 40, 49]
    assert [each["max_tokens"] for each in stub.bodies] == [2, 3, 4]
    assert sent.clipped_share == pytest.approx(1 / 3)
    assert sent.intended_seconds == pytest.approx(0.1)


@pytest.mark.parametrize("text", ["{}", "no JSON", '{"version": 2}'])
def test_a_file_that_is_no_report_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    assert main(["report", str(path)]) == 2
    assert "no report of version 1" in capsys.readouterr().err


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_a_server_that_refuses_a_field_need_not_be_sent_it(
    ignore_eos: bool, serve: Callable[[Stub], str], measure: Run
) -> None:
    stub = Stub()
    measure(serve(stub), **sweep(ignore_eos=ignore_eos))
    assert {"ignore_eos" in sent for sent in stub.bodies} == {ignore_eos}
