"""Marks of a prompt's beginning: two calls have one in common where they begin alike, and only where the caller is the same."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from service.http.beginning import STEP_BYTES, marks, read_beginning

TEXT = "".join(f"line {number}\n" for number in range(3000))


def body(prompt: Any, field: str = "prompt", **others: Any) -> bytes:
    return json.dumps({"model": "m", **others, field: prompt, "max_tokens": 5}).encode()


def common(one: list[bytes], other: list[bytes]) -> int:
    return sum(a == b for a, b in zip(one, other, strict=False))


@given(st.integers(0, 20_000), st.integers(0, 5000))
def test_beginnings_that_are_alike_have_the_same_marks_up_to_where_they_part(shared: int, rest: int) -> None:
    one, other = (marks("", body(TEXT[:shared] + char * rest)) for char in "xy")
    exact = len(json.dumps(TEXT[:shared])) - 1  # as JSON has it, without the closing quote
    assert common(one, other) == exact // STEP_BYTES or rest == 0
    assert len(one) == len(other)


def test_what_stands_before_the_prompt_in_a_body_and_what_follows_it_change_nothing() -> None:
    plain, other = marks("", body(TEXT)), marks("", body(TEXT, temperature=0.5, stream=True))
    assert common(plain, other) >= len(plain) - 1 > 10


def test_a_conversation_and_a_pinned_prefix_have_marks_too() -> None:
    talk = [{"role": "system", "content": TEXT}, {"role": "user", "content": "?"}]
    longer = [*talk, {"role": "assistant", "content": "!"}]
    assert common(marks("", body(talk, "messages")), marks("", body(longer, "messages"))) > 10
    assert marks("", body(TEXT)) == marks("", json.dumps({"prompt": TEXT, "max_tokens": 5}).encode())


def test_another_key_has_no_mark_in_common() -> None:
    assert common(marks("Bearer a", body(TEXT)), marks("Bearer b", body(TEXT))) == 0


def test_short_prompts_and_bodies_without_one_have_none() -> None:
    assert marks("", body("short")) == marks("", b"") == marks("", b"\xff" * 9000) == marks("", body(TEXT, "input")) == []


async def _received(path: str, messages: list[dict[str, Any]], method: str = "POST") -> tuple[list[bytes], list[Any]]:
    left = list(messages)

    async def receive() -> Any:
        return left.pop(0)

    found, again = await read_beginning({"type": "http", "method": method, "path": path, "headers": []}, receive)
    return found, [await again() for _ in messages]


async def test_what_was_read_of_a_call_is_given_on_as_it_came() -> None:
    whole = body(TEXT)
    messages = [
        {"type": "http.request", "body": whole[:9000], "more_body": True},
        {"type": "http.request", "body": whole[9000:], "more_body": False},
    ]
    found, seen = await _received("/v1/completions", messages)
    assert seen == messages and found == marks("", whole[:9000]) != []
    for path, method in (("/v1/embeddings", "POST"), ("/v1/completions", "GET")):
        assert await _received(path, messages, method) == ([], messages)


async def test_a_caller_who_leaves_before_the_body_is_told_on() -> None:
    assert await _received("/v1/completions", [{"type": "http.disconnect"}]) == ([], [{"type": "http.disconnect"}])


async def test_a_body_that_does_not_come_keeps_nobody(monkeypatch: Any) -> None:
    import asyncio

    monkeypatch.setattr("service.http.beginning.WAIT_SECONDS", 0.01)
    come = asyncio.Event()

    async def receive() -> Any:
        await come.wait()
        return {"type": "http.request", "body": b"{}"}

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    found, again = await read_beginning(scope, receive)
    come.set()
    assert found == [] and await again() == {"type": "http.request", "body": b"{}"}
