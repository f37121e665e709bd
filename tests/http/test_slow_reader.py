"""A caller that reads slowly: what it has not read yet is joined where it was reserved, not queued on its way."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from service.engine.answer import Answer
from service.engine.request import Delta, Request
from service.http.answers import TextChoice
from service.http.auth import NOBODY
from service.http.streaming import Signal, merged


class Caller:
    """One that never hangs up."""

    state = SimpleNamespace(owner=NOBODY)

    async def receive(self) -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")


async def test_what_a_slow_reader_leaves_is_joined_and_nothing_is_lost() -> None:
    answers = [Answer(lambda: None), Answer(lambda: None)]
    waiting = iter(answers)
    host: Any = SimpleNamespace(engine=SimpleNamespace(submit=lambda _: next(waiting), check_together=lambda _: None))
    requests: list[Any] = [Request("r", "completion", [1]) for _ in answers]
    caller: Any = Caller()
    async with merged(host, requests, caller) as running:
        for turn in range(500):
            for answer in answers:
                answer.put(Delta(0, f"{turn} ", (turn,)))
            await asyncio.sleep(0)
        for answer in answers:
            answer.end()
        items = []
        while isinstance(item := await running.next(), tuple):
            items.append(item)
        assert item is Signal.END
    assert len(items) <= 8  # of 1,000 deltas
    for index in range(2):
        text = "".join(delta.text for place, delta in items if place == index and isinstance(delta, Delta))
        assert text == "".join(f"{turn} " for turn in range(500))


def test_a_streamed_choice_keeps_nothing_of_what_it_has_told() -> None:
    class Tokens:
        def token_bytes(self, token: int) -> bytes:
            return b"a"

    tokenizer: Any = Tokens()
    choices = [TextChoice(0, tokenizer, is_streamed) for is_streamed in (True, False)]
    for choice in choices:
        for _ in range(3):
            assert choice.add(Delta(0, "a", (1,)))["text"] == "a"
        choice.add(Delta(0, "", (), finish_reason="length"))
    assert [choice.whole()["text"] for choice in choices] == ["", "aaa"]
