"""What is too long is cut where, and only where, the caller says, and the answer tells how much was left out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.http.length import Side, cut
from tests.http.client import Client

SIDES: tuple[Side, ...] = ("left", "right", "middle")


def slowly(tokens: list[int], most: int, side: Side, leading: int) -> list[int]:
    """Takes one token out at a time."""
    kept = list(tokens)
    while len(kept) > most:
        kept_first = min(leading, most)
        place = {"left": kept_first, "right": len(kept) - 1, "middle": max((most + 1) // 2, kept_first)}[side]
        del kept[place]
    return kept


@given(st.lists(st.integers(0, 99), max_size=40), st.integers(1, 45), st.sampled_from(SIDES), st.integers(0, 3))
def test_what_is_cut_is_as_long_as_it_may_be_and_in_order(tokens: list[int], most: int, side: Side, leading: int) -> None:
    kept = list(cut(tokens, most, side, leading))
    assert kept == slowly(tokens, most, side, leading)
    assert len(kept) == min(len(tokens), most)
    assert kept[: min(leading, most)] == tokens[: min(leading, most)]


def test_left_keeps_the_end_right_the_beginning_and_middle_both() -> None:
    assert cut(range(10), 4, "left", 0) == [6, 7, 8, 9]
    assert cut(range(10), 4, "left", 1) == [0, 7, 8, 9]
    assert cut(range(10), 4, "right", 1) == [0, 1, 2, 3]
    assert cut(range(10), 5, "middle", 1) == [0, 1, 2, 8, 9]


@pytest.mark.parametrize("side", SIDES)
def test_a_prompt_that_is_cut_is_answered_as_what_is_left_of_it(service: Client, side: Side) -> None:
    context = service.replica.card.max_length
    tokens = [7 + place % 90 for place in range(context + 500)]
    asked: dict[str, Any] = {"max_tokens": 3, "temperature": 0, "ignore_eos": True}
    reply = service.complete(tokens, **asked, truncate=side)
    assert reply.json["longserve"]["dropped_tokens"] == 503
    assert reply.headers["x-longserve-dropped-tokens"] == "503"
    assert reply.json["usage"]["prompt_tokens"] == context - 3
    left = list(cut(tokens, context - 3, side, 0))
    assert reply.json["choices"] == service.complete(left, **asked).json["choices"]


def test_a_text_that_is_cut_on_the_left_keeps_its_begin_token(service: Client) -> None:
    context, text = service.replica.card.max_length, "x = [1, 2]\n" * 12_000
    tokens = service.replica.tokenizer.encode(text, add_special_tokens=True)
    assert len(tokens) > context
    (plan,) = service.post("/v1/plan", {"prompt": text, "truncate": "left", "max_tokens": 10}).json["data"]
    assert plan["prompt_tokens"] == context - 10
    assert plan["dropped_tokens"] == len(tokens) - plan["prompt_tokens"]
    scored = {"echo": True, "logprobs": 0, "max_tokens": 0, "truncate": "left", "attention": "sliding_window"}
    choice = service.complete(text, **scored).json["choices"][0]
    assert choice["logprobs"]["token_logprobs"][0] is not None, "the text stands behind the begin token"
    assert text.endswith(choice["text"])


def test_what_fits_is_not_cut(service: Client) -> None:
    for side in SIDES:
        reply = service.complete("import os", truncate=side)
        assert reply.json["longserve"]["dropped_tokens"] == 0
        assert reply.json["usage"]["prompt_tokens"] == service.complete("import os").json["usage"]["prompt_tokens"]


def test_an_embedding_and_a_conversation_are_cut_too(service: Client) -> None:
    context, long = service.replica.card.max_length, "x = [1, 2]\n" * 12_000
    asked = {"attention": "sliding_window", "truncate": "middle"}
    embedded = service.post("/v1/embeddings", {"input": [long, "a"], **asked}).json
    whole = len(service.replica.tokenizer.encode(long, add_special_tokens=True))
    assert embedded["longserve"]["dropped_tokens"] == whole - context
    chat = service.chat(long, **asked).json
    assert chat["usage"]["prompt_tokens"] == context - 4
    assert chat["longserve"]["dropped_tokens"] == whole - (context - 4)
    (plan,) = service.post("/v1/plan", {"messages": [{"role": "user", "content": long}], "truncate": "left"}).json["data"]
    assert (plan["prompt_tokens"], plan["total_tokens"]) == (context - 1024, context)


def test_without_the_wish_nothing_is_cut(service: Client) -> None:
    reply = service.complete([7] * (service.replica.card.max_length + 1))
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
