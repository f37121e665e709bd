"""Prompts that begin alike over the wire: the answer says what was not read again, and nobody profits by another's key."""

from __future__ import annotations

import random
import time
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


def pinned(client: Client, key: str, **fields: object) -> Reply:
    return client.post("/v1/prefixes", fields or {"prompt": TOKENS}, {"authorization": f"Bearer {key}"})


def test_a_pin_pays_for_a_text_before_the_first_question_comes(guarded: Client) -> None:
    text = "def squared(number):\n    return number * number\n\n" * 120
    told = pinned(guarded, "anns", prompt=text, attention="dense", ttl_seconds=60)
    assert told.status == 200 and told.json["object"] == "prefix" and told.json["is_kept"]
    assert told.json["tokens"] % 512 == 0 and told.json["bytes"] > 0 and 0 <= told.json["expires_at"] - time.time() <= 61
    asks = guarded.post("/v1/completions", {"prompt": text + "x", "max_tokens": 1}, {"authorization": "Bearer anns"})
    assert asks.json["usage"]["prompt_tokens_details"]["cached_tokens"] == told.json["tokens"]
    one = guarded.get(f"/v1/prefixes/{told.json['id']}", authorization="Bearer anns")
    assert one.json == told.json and told.json in guarded.get("/v1/prefixes", authorization="Bearer anns").json["data"]


def test_a_pins_time_begins_when_its_text_has_been_read(guarded: Client) -> None:
    told = pinned(guarded, "anns", prompt=TOKENS, ttl_seconds=1e-9)
    assert told.status == 200 and told.json["is_kept"], told.text
    assert guarded.get(f"/v1/prefixes/{told.json['id']}", authorization="Bearer anns").status == 404


def test_a_pinned_conversation_serves_the_messages_that_follow(guarded: Client) -> None:
    text = {"role": "user", "content": "x = 1\n" * 600}
    told = pinned(guarded, "anns", messages=[text])
    follows = [text, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "and?"}]
    asks = guarded.post("/v1/chat/completions", {"messages": follows, "max_tokens": 1}, {"authorization": "Bearer anns"})
    assert asks.json["usage"]["prompt_tokens_details"]["cached_tokens"] == told.json["tokens"] > 0


def test_a_pin_is_its_keys_own_and_goes_when_it_is_told_to(guarded: Client) -> None:
    id = pinned(guarded, "bobs").json["id"]
    path, headers = f"/v1/prefixes/{id}", {"authorization": "Bearer evas"}
    for method in ("GET", "DELETE"):
        refused = guarded.send(method, path, headers=headers)
        assert (refused.status, refused.error["code"]) == (404, "prefix_not_found")
    assert guarded.get("/v1/prefixes", **headers).json["data"] == []
    mine = {"authorization": "Bearer bobs"}
    assert guarded.send("DELETE", path, headers=mine).json == {"id": id, "object": "prefix.deleted", "deleted": True}
    assert guarded.send("DELETE", path, headers=mine).status == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "short"}, "prompt"),
        ({"ttl_seconds": 9}, "prompt"),
        ({"prompt": TOKENS, "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ({"prompt": [TOKENS]}, "prompt"),
        ({"prompt": TOKENS, "ttl_seconds": 0}, "ttl_seconds"),
        ({"prompt": TOKENS, "ttl_seconds": 1e9}, "ttl_seconds"),
        ({"prompt": TOKENS, "truncate": "left"}, "truncate"),
        ({"prompt": TOKENS, "attention": "longformer"}, "attention"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages"),
    ],
)
def test_a_pin_that_cannot_be_says_why(guarded: Client, fields: dict[str, object], param: str) -> None:
    reply = pinned(guarded, "evas", **fields)
    assert (reply.status, reply.error["param"]) == (400, param)
    assert guarded.get("/v1/prefixes", authorization="Bearer evas").json["data"] == []
