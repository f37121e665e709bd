"""Prompts that begin alike over the wire: the answer says what was not read again, and nobody profits by another's key."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from service.config import AttentionConfig, HttpConfig, ServiceConfig, UserConfig
from service.plain import listening_in_thread
from tests.http.client import Client, Reply

TOKENS = random.Random(0).choices(range(300, 4000), k=1300)  # two whole chunks, and a third that is not


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    file: Path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    file.write_text(yaml.safe_dump({"keys": [{"name": name, "key": f"{name}s"} for name in ("ann", "bob", "eva")]}))
    config = ServiceConfig(threads=1, http=HttpConfig(api_keys_file=str(file)))
    with listening_in_thread(config, UserConfig(attention=AttentionConfig())) as (url, replica):
        yield Client(url, replica)


def asked(client: Client, key: str, path: str = "/v1/completions", **fields: object) -> Reply:
    body = {"prompt": TOKENS, "max_tokens": 3, "temperature": 0, "ignore_eos": True, **fields}
    return client.post(path, body, {"authorization": f"Bearer {key}"})


def test_the_answer_and_the_plan_say_how_many_tokens_are_not_read_again(guarded: Client) -> None:
    first = asked(guarded, "anns")
    plan = asked(guarded, "anns", "/v1/plan").json["data"][0]
    second, streamed = asked(guarded, "anns"), asked(guarded, "anns", stream=True, stream_options={"include_usage": True})
    told = [reply.json["usage"]["prompt_tokens_details"]["cached_tokens"] for reply in (first, second)]
    assert told == [0, 1024] and plan["cached_tokens"] == 1024
    assert second.json["choices"] == first.json["choices"]
    assert second.headers["x-longserve-cached-tokens"] == str(second.json["longserve"]["cached_tokens"]) == "1024"
    last = streamed.events[-2]
    assert last["usage"] == second.json["usage"] and last["longserve"]["cached_tokens"] == 1024


def test_what_one_key_has_asked_is_not_told_to_another_by_time_plan_or_usage(guarded: Client) -> None:
    assert asked(guarded, "bobs").status == 200
    assert asked(guarded, "evas", "/v1/plan").json["data"][0]["cached_tokens"] == 0
    assert asked(guarded, "evas").json["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert asked(guarded, "evas").json["usage"]["prompt_tokens_details"]["cached_tokens"] == 1024


def test_the_metrics_count_hits_misses_tokens_and_bytes(guarded: Client) -> None:
    asked(guarded, "anns")
    asked(guarded, "anns")
    lines = guarded.get("/metrics", authorization="Bearer anns", **{"cache-control": "no-cache"}).text.splitlines()
    for name, label in (
        ("prefix_bytes", 'backend="dense"'),
        ("prefix_lookups_total", 'result="hit"'),
        ("prefix_lookups_total", 'result="miss"'),
        ("prompt_tokens_cached_total", 'backend="dense"'),
    ):
        (value,) = [line.rpartition(" ")[2] for line in lines if line.startswith(f"longserve_{name}{{") and label in line]
        assert float(value) > 0
