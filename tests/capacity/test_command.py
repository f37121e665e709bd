"""`longserve capacity` over a replica that runs, and what it says to whoever asks wrongly."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from service import cli
from service.capacity import site
from service.config import AttentionConfig, EngineConfig, ServiceConfig, UserConfig
from service.plain import listening_in_thread
from service.replica import Replica
from tests.serving import LOCAL

ASKED = ["capacity", "--lengths", "100:4", "--calls", "100"]


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[str, Replica]]:
    config = ServiceConfig(threads=1, engine=EngineConfig(memory_budget_bytes=2**26))
    user = UserConfig(attention=AttentionConfig(backends={"dense": {}, "sliding_window": {"window": 64}}))
    with listening_in_thread(config, user) as (url, replica):
        yield url, replica


@pytest.fixture
def url(running: tuple[str, Replica]) -> str:
    return running[0]


def test_a_running_services_replicas_are_predicted_with_its_own_laws(running: tuple[str, Replica]) -> None:
    _, replica = running
    told = site.told(json.loads(json.dumps(replica.info())), ServiceConfig())
    assert told.budget == 2**26 and told.threads == 1
    for name, lane in replica.engine._admission.lanes.items():
        copy = told.lanes[name]
        for length in (1, 700, 5000):
            assert copy.course.seconds(length) == pytest.approx(lane.course.seconds(length))
            assert copy.course.decode_seconds(length) == pytest.approx(lane.course.decode_seconds(length))
            assert copy.state_bytes(length) == lane.state_bytes(length)
            assert copy.course.prefill_bytes(length) == pytest.approx(lane.course.prefill_bytes(length), rel=0.1)


def test_it_prints_a_row_for_each_number_of_replicas(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ASKED, "--replicas", "1,2", "--url", url]) == 0
    level, heads, one, two, note = capsys.readouterr().out.splitlines()
    assert "95%" in level and "calls/s" in heads and "--probe" in note
    assert float(two.split()[2]) > float(one.split()[2]) > 0


def test_for_programs_it_prints_json_the_same_for_the_same_seed(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for seed in ("7", "7", "8"):
        assert cli.main([*ASKED, "--url", url, "--rate", "100", "--seed", seed, "--backend", "sliding_window", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["capacity"][0]["outcome"])
    assert found[0]["judged"] == 90 and found[0]["rate"] == 100
    assert [each["first_token_seconds"] for each in found[:2]] == [found[0]["first_token_seconds"]] * 2
    assert found[2]["first_token_seconds"] != found[0]["first_token_seconds"]


def test_what_http_costs_is_asked_of_the_service(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ASKED, "--url", url + "/v1", "--probe", "--rate", "1", "--json"]) == 0
    around = json.loads(capsys.readouterr().out)["around"]["1"]
    assert 0 < around["call_seconds"] < 1 and 0 <= around["token_seconds"] < 1 and around["crowding"] == 1


def test_without_a_service_the_files_model_is_measured_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ASKED, "--rate", "1", str(LOCAL)]) == 0
    assert "alone on its machine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--lengths", "100"], "PROMPT:ANSWER"),
        (["--pairs", "/nonexistent"], "/nonexistent"),
        (["--lengths", "100:1", "--probe"], "--url"),
    ],
)
def test_who_asks_wrongly_is_told_and_nothing_starts(wrong: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["capacity", *wrong]) == 2
    assert told in capsys.readouterr().err


def test_a_backend_that_is_not_served_and_a_service_that_is_not_there_are_told(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["capacity", "--lengths", "9:9,32700:100", "--url", url]) == 2
    assert "a call of 32700 tokens and 100 to answer is longer" in capsys.readouterr().err
    assert cli.main([*ASKED, "--url", url, "--backend", "performer"]) == 2
    assert "dense, sliding_window" in capsys.readouterr().err
    assert cli.main([*ASKED, "--url", "http://127.0.0.1:9"]) == 1
    assert "nothing answers" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--replicas=0", "--replicas=a", "--share=1.5", "--first-token=-1", "--calls=0"])
def test_a_number_out_of_range_is_refused_before_anything_is_read(option: str) -> None:
    with pytest.raises(SystemExit):
        cli.main([*ASKED, option])
