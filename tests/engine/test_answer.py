"""What an answer holds while nobody reads it: Python objects, held to what admission has reserved for them."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import pytest

from service.engine.answer import Answer
from service.engine.request import Delta, ModelFailed
from tests.engine import world
from tests.engine.world import completion, prompt, running, tokens_of, until

COMPUTING = [
    tracemalloc.Filter(False, f"*/{each}") for each in ("attention/*", "service/model/*", "engine/runner.py", "torch/*")
]


def _held(snapshot: tracemalloc.Snapshot) -> int:
    """Bytes of what is traced but tensors, whose wrappers look allocated to tracemalloc after their end."""
    return sum(trace.size for trace in snapshot.filter_traces(COMPUTING).traces)


@pytest.mark.parametrize(
    "wish",
    [
        {"max_tokens": 400},
        {"max_tokens": 200, "n": 3, "temperature": 1.0},
        {"max_tokens": 100, "logprobs": 5},
        {"max_tokens": 100, "n": 2, "logprobs": 0, "temperature": 1.0},
        {"max_tokens": 1, "echo": True, "n": 4, "temperature": 1.0},
        {"max_tokens": 0, "echo": True, "logprobs": 3},
    ],
    ids=str,
)
async def test_an_answer_that_nobody_reads_holds_no_more_than_was_reserved(wish: dict[str, Any]) -> None:
    tokens = prompt(1400 if wish.get("echo") else 10)
    async with running(memory_sample_share=0) as engine:
        for _ in range(2):  # the second finds all caches filled, and no step of it is measured
            request = completion(tokens, **wish)
            plan = engine.plan(request)
            gc.collect()
            tracemalloc.start()
            answer = engine.submit(request)
            await until(lambda: world.is_empty(engine), 300)
            gc.collect()
            held = _held(tracemalloc.take_snapshot())
            tracemalloc.stop()
            _ = [item async for item in answer]
    reserved = plan.terms["answer"] + plan.terms["logprobs"]
    assert held <= reserved + 16 * 1024, (held, reserved)  # beside it: the request's own objects


def delta(text: str, index: int = 0, **rest: Any) -> Delta:
    return Delta(index, text, tuple(text.encode()), **rest)


async def test_a_reader_that_keeps_up_gets_every_delta_and_a_late_one_gets_them_joined() -> None:
    answer = Answer(lambda: None)
    answer.put(delta("a"))
    assert (await anext(answer)).text == "a"  # type: ignore[union-attr]
    for item in (delta("b"), delta("x", 1), delta("c", finish_reason="length"), delta("y", 1, finish_reason="stop")):
        answer.put(item)
    answer.end(ModelFailed("failed"))
    found = [await anext(answer) for _ in range(2)]
    assert [(d.index, d.text, bytes(list(d.tokens)), d.finish_reason) for d in found if isinstance(d, Delta)] == [
        (0, "bc", b"bc", "length"),
        (1, "xy", b"xy", "stop"),
    ]
    with pytest.raises(ModelFailed):
        await anext(answer)
    with pytest.raises(StopAsyncIteration):
        await anext(answer)


async def test_what_a_late_reader_gets_is_what_a_quick_one_gets() -> None:
    wish = {"max_tokens": 60, "temperature": 1.0, "seed": 5, "logprobs": 2, "echo": True}
    async with running() as engine:
        quick = [item async for item in engine.submit(completion(prompt(30), **wish))]
        late = engine.submit(completion(prompt(30), **wish))
        await until(lambda: world.is_empty(engine))
        (whole,) = [item async for item in late]
    assert isinstance(whole, Delta) and len(quick) > 10
    assert whole.text == "".join(each.text for each in quick if isinstance(each, Delta))
    assert list(whole.tokens) == [token for each in quick if isinstance(each, Delta) for token in each.tokens]
    assert list(whole.logprobs or ()) == [told for each in quick if isinstance(each, Delta) for told in each.logprobs or ()]
    assert whole.finish_reason == "length"


async def test_a_caller_that_closes_while_it_waits_is_released() -> None:
    async with running() as engine:
        answer = engine.submit(completion(max_tokens=1000))
        await answer.aclose()
        assert [item async for item in answer] == []
        assert len(await tokens_of(engine, completion())) == 8
        await until(lambda: world.is_empty(engine))
