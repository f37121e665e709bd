"""Whoever waits for a long prompt is told how far it is; whoever is turned away, when to come back."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.config import AttentionConfig, EngineConfig, HttpConfig, ServiceConfig, UserConfig
from service.engine.request import QueueFull, Request, UnknownBackend
from service.http.errors import response_to
from service.http.headway import headway
from service.plain import listening_in_thread
from service.timing import Chunk, Timings
from tests.http.client import Client, eventually

COMMENT = re.compile(r": waiting; (\d+) of (\d+) tokens read, about (\d+\.\d) s to the first token")


@pytest.mark.parametrize("kind", ["completion", "conversation"])
def test_a_long_silence_is_broken_by_comments_that_say_how_far_it_is(kind: str) -> None:
    config = ServiceConfig(threads=1, http=HttpConfig(stream_ping_seconds=0.001))
    with listening_in_thread(config, UserConfig(attention=AttentionConfig())) as (url, replica):
        client, options = Client(url, replica), {"stream": True, "stream_options": {"include_usage": True}}
        ask = client.complete if kind == "completion" else client.chat
        reply = ask("import os " * 2000, **options)
    assert reply.events[-1] == "[DONE]"
    found = [tuple(map(float, match)) for match in COMMENT.findall(reply.text)]
    assert len(found) > 3
    read, of, _ = zip(*found, strict=True)
    assert set(of) == {reply.events[-2]["usage"]["prompt_tokens"]}
    assert list(read) == sorted(read) and len(set(read)) > 2


class Forecast:
    """An engine that predicts by a law: the square of the length, in microseconds."""

    def plan(self, request: Request) -> Any:
        if request.backend == "gone":
            raise UnknownBackend("gone", ["dense"])
        return SimpleNamespace(predicted_seconds={"prefill": len(request.tokens) ** 2 / 1e6, "queue": 77.0})


HOST: Any = SimpleNamespace(engine=Forecast())


def reading(tokens: int, read: int, slowness: float, backend: str = "dense") -> Request:
    """A request of which some has been read, so many times more slowly than predicted."""
    timings = Timings(admitted_at=0.0, backend=backend)  # beside a large time what one token took would be rounded away
    if read:
        timings.chunks = [Chunk(0.0, slowness * read**2 / 1e6, read)]
    return Request("a", "completion", [1] * tokens, timings=timings)


@given(st.lists(st.tuples(st.integers(1, 900), st.floats(0, 1), st.floats(0.1, 10)), min_size=1, max_size=3))
def test_the_seconds_left_follow_the_forecast_and_how_it_has_held_so_far(found: list[tuple[int, float, float]]) -> None:
    requests = [reading(tokens, int(tokens * share), slowness) for tokens, share, slowness in found]
    told = headway(requests, HOST)
    wanted = 0.0
    for tokens, share, slowness in found:
        read = int(tokens * share)
        wanted += (slowness if read else 1) * (tokens**2 - read**2) / 1e6
    assert told.seconds == pytest.approx(wanted, abs=1e-9)
    assert told.prompt_tokens == sum(tokens for tokens, _, _ in found)
    assert told.read_tokens == sum(int(tokens * share) for tokens, share, _ in found)


def test_who_waits_in_the_queue_is_told_what_the_queue_takes() -> None:
    waiting = Request("a", "completion", [1] * 50)
    assert headway([waiting], HOST).comment == b": waiting; 0 of 50 tokens read, about 77.0 s to the first token\n\n"


def test_where_nobody_can_foresee_it_no_seconds_are_told() -> None:
    assert headway([reading(50, 10, 1, "gone")], HOST).comment == b": waiting; 10 of 50 tokens read\n\n"
    assert headway([reading(50, 50, 1)], HOST).comment == b": waiting\n\n"


def test_a_full_queue_says_when_to_come_back() -> None:
    config = ServiceConfig(threads=1, engine=EngineConfig(max_sequences=1, max_waiting_requests=1))
    long = {"prompt": "import os", "max_tokens": 30_000, "ignore_eos": True}
    with listening_in_thread(config, UserConfig(attention=AttentionConfig())) as (url, replica):
        client = Client(url, replica)
        with client.half_read(long, read=0):
            assert eventually(lambda: replica.engine.snapshot().running == 1)
            with client.half_read(long, read=0):
                assert eventually(lambda: replica.engine.snapshot().waiting == 1)
                reply = client.complete("a")
    assert (reply.status, reply.error["code"]) == (429, "queue_full")
    seconds = float(reply.headers["x-longserve-eta-seconds"])
    assert seconds > 1
    assert int(reply.headers["retry-after"]) >= seconds > int(reply.headers["retry-after"]) - 1


def test_only_a_full_queue_has_an_eta() -> None:
    assert response_to(QueueFull("full", 0.25)).headers["x-longserve-eta-seconds"] == "0.250"
    assert "x-longserve-eta-seconds" not in response_to(UnknownBackend("a", ["b"])).headers
