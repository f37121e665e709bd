"""A call goes to the replica whose work is done soonest; here replicas are what they tell, and one proxy sends."""

from __future__ import annotations

import pickle
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import StreamingHTTPRequest

from service.router import body_bytes, by_work
from service.routing import Sent

LONG = {"outstanding_seconds": 8.0, "token_seconds": 1e-3, "tellings": 1.0}
SHORT = {"outstanding_seconds": 0.5, "token_seconds": 1e-3, "tellings": 1.0}


def first(told: dict[str, Any], sent: dict[str, Sent]) -> str:
    replicas: Any = [SimpleNamespace(replica_id=name, routing_stats=each) for name, each in told.items()]
    return str(by_work(replicas, sent)[0].replica_id)


def test_one_long_prompt_outweighs_many_short_ones() -> None:
    sent = {"a": Sent(), "b": Sent()}
    sent["a"].add("long", 8000, {})
    for call in range(5):
        sent["b"].add(f"short {call}", 10, {})
    assert first({"a": LONG, "b": SHORT}, sent) == "b"


def test_what_was_sent_since_the_last_telling_counts_until_two_more_have_come() -> None:
    sent = Sent()
    sent.add("call", 2000, SHORT)
    assert sent.seconds(SHORT) == pytest.approx(0.5 + 2.0)
    assert sent.seconds(SHORT | {"tellings": 2.0}) == pytest.approx(0.5 + 2.0)  # it may have crossed the call
    assert sent.seconds(SHORT | {"tellings": 3.0}) == pytest.approx(0.5)
    sent.remove("call")
    assert sent.seconds(SHORT) == 0.5


def test_a_burst_between_two_tellings_is_shared_out() -> None:
    told = dict.fromkeys("abcd", SHORT)
    sent = {name: Sent() for name in told}
    for call in range(40):
        sent[first(told, sent)].add(str(call), 100, SHORT)
    assert {len(each.calls) for each in sent.values()} == {10}


def test_replicas_that_have_told_nothing_yet_get_calls_in_turn() -> None:
    told: dict[str, Any] = {"a": {}, "b": {}}
    sent = {name: Sent() for name in told}
    counts = Counter[str]()
    for call in range(20):
        counts[name := first(told, sent)] += 1
        sent[name].add(str(call), 1, {})
    assert counts == {"a": 10, "b": 10}


def test_an_end_that_is_told_twice_or_of_a_call_unknown_is_no_fault() -> None:
    sent = Sent()
    sent.add("call", 1, {})
    for call in ("call", "call", "other"):
        sent.remove(call)
    assert sent.calls == {}


@pytest.mark.parametrize(
    ("headers", "bytes"), [([(b"content-length", b"4000")], 4000), ([], 0), ([(b"content-length", b"x")], 0)]
)
def test_a_bodys_length_is_what_its_headers_say(headers: Any, bytes: int) -> None:
    call: Any = SimpleNamespace(args=(pickle.dumps(StreamingHTTPRequest({"headers": headers}, proxy_actor_name="a")),))
    assert body_bytes(call) == bytes
