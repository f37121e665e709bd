"""Keys with names and limits, from a file that may change; and pages of other origins, which may not call unless told."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from service.config import AttentionConfig, ConfigError, HttpConfig, KeyConfig, ServiceConfig, UserConfig, api_keys, read_keys
from service.engine.request import NeverFits
from service.http import auth
from service.http.auth import Caller, Meter
from service.http.errors import RateLimited
from service.plain import listening_in_thread
from tests.http.client import Client, Reply, eventually

CLOCK = itertools.count(10**9)  # seconds since 1970, as a file system may tell them


def written(path: Path, *entries: dict[str, Any]) -> Path:
    """A key file; its time of change is another than before."""
    path.write_text(yaml.safe_dump({"keys": list(entries)}))
    return touched(path)


def touched(path: Path) -> Path:
    now = next(CLOCK)
    os.utime(path, (now, now))
    return path


ANN = {"name": "ann", "key": "anns"}
BOB = {"name": "bob", "sha256": hashlib.sha256(b"bobs").hexdigest()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "keys.yaml", ANN, BOB)


@pytest.fixture
def guarded(file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setattr(auth, "LOOK_SECONDS", 0.0)
    config = ServiceConfig(threads=1, http=HttpConfig(api_keys_file=str(file)))
    with listening_in_thread(config, UserConfig(attention=AttentionConfig())) as (url, replica):
        yield Client(url, replica)


def asked(client: Client, key: str, **fields: Any) -> Reply:
    body = {"prompt": "import os", "max_tokens": 2, **fields}
    return client.post("/v1/completions", body, {"authorization": f"Bearer {key}"})


def test_keys_of_a_file_let_their_owners_in_by_key_or_digest(guarded: Client) -> None:
    assert [asked(guarded, key).status for key in ("anns", "bobs", "evas", BOB["sha256"])] == [200, 200, 401, 401]
    assert guarded.get("/info").status == 401
    info = guarded.get("/info", authorization="Bearer anns")
    assert "anns" not in info.text and "keys.yaml" not in info.text


def test_a_changed_file_is_in_force_at_once_and_a_broken_one_changes_nothing(guarded: Client, file: Path) -> None:
    written(file, BOB, {"name": "eva", "key": "evas"})
    assert [asked(guarded, key).status for key in ("anns", "bobs", "evas")] == [401, 200, 200]
    for broken in ("keys: [", "keys: 3", "other: []", "keys: [{name: a}]", "keys: [{name: a, key: b, color: red}]"):
        file.write_text(broken)
        touched(file)
        assert [asked(guarded, key).status for key in ("anns", "bobs", "evas")] == [401, 200, 200], broken
    file.unlink()
    assert [asked(guarded, key).status for key in ("anns", "bobs")] == [401, 200]
    written(file)
    assert [asked(guarded, key).status for key in ("anns", "bobs", "")] == [401, 401, 401]


def test_the_requests_of_one_key_are_limited_and_no_others(guarded: Client, file: Path) -> None:
    written(file, {**ANN, "requests_per_minute": 2}, BOB)
    assert [asked(guarded, "anns").status for _ in range(4)] == [200, 200, 429, 429]
    refused = asked(guarded, "anns")
    assert (refused.error["code"], refused.error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert 0 < float(refused.headers["x-longserve-eta-seconds"]) <= int(refused.headers["retry-after"]) <= 30
    assert "'ann'" in refused.error["message"] and "2 requests" in refused.error["message"]
    assert asked(guarded, "bobs").status == 200
    assert guarded.get("/v1/models", authorization="Bearer anns").status == 200, "what computes nothing is not counted"
    written(file, {**ANN, "requests_per_minute": 2}, {**BOB, "requests_per_minute": 9})
    assert asked(guarded, "anns").status == 429, "who stays as he was keeps his debt"
    written(file, ANN, BOB)
    assert asked(guarded, "anns").status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_the_tokens_of_one_key_are_limited_as_they_are_used(guarded: Client, file: Path, stream: bool) -> None:
    written(file, {**ANN, "tokens_per_minute": 60}, BOB)
    long = {"prompt": [7] * 40, "max_tokens": 30, "ignore_eos": True, "stream": stream}
    assert asked(guarded, "anns", **long).status == 200
    refused = asked(guarded, "anns", stream=stream)
    assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
    assert 9 < float(refused.headers["x-longserve-eta-seconds"]) <= 11, "70 used of 60: until 1 is there 11 s"
    assert asked(guarded, "bobs", **long).status == 200


def test_a_key_holds_no_more_than_its_share_of_the_memory(guarded: Client, file: Path) -> None:
    budget = guarded.replica.engine.snapshot().budget_bytes
    body = {"prompt": "import os", "max_tokens": 20_000, "ignore_eos": True}
    (plan,) = guarded.post("/v1/plan", body, {"authorization": "Bearer anns"}).json["data"]
    written(file, {**ANN, "memory_share": 1.5 * plan["needed_bytes"] / budget}, BOB)
    never = asked(guarded, "anns", **body, n=2)
    assert (never.status, never.error["code"]) == (400, "memory_budget_exceeded")
    with guarded.uploaded("/v1/completions", json.dumps(body).encode(), {"authorization": "Bearer anns"}):
        assert eventually(lambda: guarded.replica.engine.snapshot().running == 1)
        refused = asked(guarded, "anns", **body)
        assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
        assert asked(guarded, "bobs").status == 200
    assert eventually(lambda: guarded.replica.engine.snapshot().running == 0)
    assert asked(guarded, "anns").status == 200, "what has ended is given back"


@given(st.integers(1, 1000), st.lists(st.tuples(st.floats(0, 100), st.integers(0, 3000)), max_size=20))
def test_a_meter_has_what_came_less_what_went_and_never_more_than_a_minutes(
    per_minute: int, steps: list[tuple[float, int]]
) -> None:
    now, level = 1000.0, float(per_minute)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now)
        meter = Meter(per_minute)
        for seconds, amount in steps:
            now += seconds
            level = min(per_minute, level + seconds * per_minute / 60)
            wait = meter.seconds_until(1)
            assert wait == pytest.approx(max(0.0, (1 - level) * 60 / per_minute), abs=1e-6)
            meter.take(amount)
            level -= amount


def test_a_share_is_given_back_whatever_happens() -> None:
    caller = Caller(KeyConfig(name="a", memory_share=0.5))
    with pytest.raises(KeyError), caller.holding(40, 100):
        with pytest.raises(RateLimited), caller.holding(20, 100):
            raise AssertionError("never begun")
        with caller.holding(10, 100):
            assert caller.held_bytes == 50
        raise KeyError
    assert caller.held_bytes == 0
    with pytest.raises(NeverFits), caller.holding(51, 100):
        raise AssertionError("never begun")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([{"name": "a"}], "a must have either key or sha256"),
        ([{"name": "a", "key": "b", "sha256": "0" * 64}], "either key or sha256"),
        ([{"name": "a", "key": "b"}, {"name": "a", "key": "c"}], "same name"),
        ([{"name": "a", "key": "b"}, {"name": "c", "key": "b"}], "same key"),
        ([{"name": "a", "key": "secret", "requests_per_minute": 0}], "requests_per_minute"),
        ([{"name": "a", "key": "secret", "memory_share": 1.1}], "memory_share"),
        ([{"name": "a", "sha256": "secret"}], "sha256"),
        ([{"name": "a", "key": "secret", "limit": 1}], "limit"),
    ],
)
def test_a_wrong_key_file_is_refused_by_name_and_shows_no_key(
    entries: list[dict[str, Any]], words: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "keys.yaml", *entries)
    with pytest.raises(ConfigError) as refusal:
        read_keys(path)
    assert words in str(refusal.value) and "api_keys_file" in str(refusal.value)
    assert "secret" not in str(refusal.value)
    with pytest.raises(ConfigError):
        api_keys(HttpConfig(api_keys_file=str(path)))


ORIGIN = {"origin": "https://page.example"}
PREFLIGHT = {**ORIGIN, "access-control-request-method": "POST", "access-control-request-headers": "content-type,x-stainless-os"}


def test_no_page_of_another_origin_may_call_unless_told(service: Client) -> None:
    for reply in (service.get("/health", **ORIGIN), service.send("OPTIONS", "/v1/completions", headers=PREFLIGHT)):
        assert not [name for name in reply.headers if name.startswith("access-control-")]


def test_the_pages_that_are_named_may_call_and_read_the_receipt() -> None:
    config = ServiceConfig(threads=1, http=HttpConfig(cors_origins=("https://page.example",)))
    with listening_in_thread(config, UserConfig(attention=AttentionConfig())) as (url, replica):
        client = Client(url, replica)
        asked = client.send("OPTIONS", "/v1/completions", headers=PREFLIGHT)
        assert asked.status == 200
        assert asked.headers["access-control-allow-origin"] == "https://page.example"
        assert "x-stainless-os" in asked.headers["access-control-allow-headers"]
        for stream in (False, True):
            reply = client.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "stream": stream}, ORIGIN)
            assert reply.headers["access-control-allow-origin"] == "https://page.example"
            exposed = reply.headers["access-control-expose-headers"].lower()
            assert all(name in exposed for name in ("x-longserve-backend", "server-timing", "x-request-id", "retry-after"))
        other = client.get("/health", origin="https://other.example")
        assert "access-control-allow-origin" not in other.headers
        assert client.send("OPTIONS", "/v1/completions", headers={**PREFLIGHT, "origin": "https://other.example"}).status == 400
        assert "access-control-allow-credentials" not in asked.headers
