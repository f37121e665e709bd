"""Long answers: encoded in pieces, beside the event loop, they are the same JSON, and no piece holds Python's lock for long."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.http import answers
from service.http.answers import encoded_in_pieces
from tests.http.client import Client

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4).flatmap(lambda some: st.sampled_from((some, some * 90)))
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(values)
def test_pieces_together_are_the_value(value: Any) -> None:
    assert json.loads(encoded_in_pieces(value)) == value


TOKEN = {"token": "a", "logprob": -1.5, "bytes": [97], "top_logprobs": [{"token": "b", "logprob": -2.5, "bytes": [98]}] * 20}


@pytest.mark.parametrize(
    "value",
    [
        {"data": [{"index": index, "embedding": [0.1] * 384} for index in range(2000)]},
        {"choices": [{"index": 0, "logprobs": {"tokens": ["a"] * 200, "token_logprobs": [-1.5] * 200}}] * 1000},
        {"choices": [{"index": 0, "logprobs": {"content": [TOKEN] * 200}}] * 20},
    ],
)
def test_no_piece_is_much_of_a_long_answer(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, dumps = [], json.dumps
    monkeypatch.setattr(json, "dumps", lambda *args, **kwargs: sizes.append(len(told := dumps(*args, **kwargs))) or told)
    encoded_in_pieces(value)
    assert max(sizes) < 400_000 and sum(sizes) > 2_000_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": list(range(1, 300)), "late_chunks": 16}),
        ("/v1/completions", {"prompt": "a", "n": 3, "max_tokens": 100, "ignore_eos": True, "logprobs": 1}),
    ],
)
def test_a_long_answer_is_encoded_beside_the_event_loop(
    service: Client, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def encoded(value: Any) -> bytes:
        threads.append(threading.current_thread().name)
        return encoded_in_pieces(value)

    monkeypatch.setattr(answers, "encoded_in_pieces", encoded)
    reply = service.post(path, body)
    assert reply.status == 200 and reply.json
    assert len(threads) == 1 and threads[0].startswith("asyncio")


def test_others_have_their_turn_between_two_plans_of_a_call(service: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    order, plan = [], service.replica.engine.plan

    def planned(request: Any) -> Any:
        asyncio.get_running_loop().call_soon(order.append, "others")
        order.append("plan")
        return plan(request)

    monkeypatch.setattr(service.replica.engine, "plan", planned)
    assert service.post("/v1/plan", {"prompt": ["a", "b", "c"]}).status == 200
    assert order == ["plan", "others"] * 3
