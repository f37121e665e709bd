"""How often streams speak: one alone at each token, many together in fewer events than tokens, and all of them everything."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from service.engine.answer import Answer
from service.http import cadence
from service.http.cadence import Cadence
from tests.http.client import Client, eventually

TOKENS = 200


def told(service: Client, **fields: object) -> tuple[str, int]:
    """Text and number of events with tokens of a stream."""
    wish = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0, "stream": True, **fields}
    events = [event for event in service.complete("import os", **wish).events if event != "[DONE]"]
    return "".join(event["choices"][0]["text"] for event in events), len(events)


def test_many_streams_rest_between_events_and_tell_the_same(service: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = told(service)
    monkeypatch.setattr(cadence, "EVENT_SECONDS", 1.0)  # far above what all of them take
    with ThreadPoolExecutor(4) as callers:
        many = list(callers.map(lambda _: told(service), range(4)))
    assert {text for text, _ in many} == {one}
    assert min(count for _, count in many) < TOKENS / 4
    assert not service.replica.cadence.speaking


def test_a_stream_alone_does_not_rest() -> None:
    own = Cadence()
    own.speaking.add(Answer(lambda: None))
    assert own.rest_seconds() == 0
    own.speaking.add(Answer(lambda: None))
    assert own.rest_seconds() == cadence.EVENT_SECONDS


def test_a_stream_whose_caller_has_left_no_longer_counts(service: Client) -> None:
    with service.half_read({"prompt": "import os", "max_tokens": 20_000, "stream": True, "ignore_eos": True}, read=2000):
        assert len(service.replica.cadence.speaking) == 1
    assert eventually(lambda: not service.replica.cadence.speaking)
