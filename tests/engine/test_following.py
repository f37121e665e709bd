"""Decode steps that follow at once on the model thread, held to steps that each wait until the one before is handed out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from service.config import LookupConfig
from service.engine.delivery import Delivery
from service.engine.grammar import Grammar
from service.engine.request import Constraint, Request
from service.engine.work import Work
from tests.engine.world import BACKENDS, EOS, completion, disturb, is_empty, make_model, prompt, running, told, until

FOLLOWS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "seed": 7},
    "filtered": {"temperature": 0.8, "seed": 7, "top_k": 20, "top_p": 0.9},
    "likely": {"temperature": 1.0, "seed": 7, "min_p": 0.05},
    "logprobs": {"logprobs": 3},
    "echo": {"echo": True, "logprobs": 1},
    "ended": {"temperature": 1.0, "seed": 1, "ignore_eos": False},
    "stopped": {"temperature": 1.0, "seed": 5, "stop": ("a", "e", "q")},
    "stopped by a token": {"temperature": 1.0, "seed": 5, "stop_token_ids": tuple(range(20))},
}
WAITS: dict[str, dict[str, Any]] = {
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 1.5},
    "repetition": {"repetition_penalty": 1.3},
    "bias": {"logit_bias": ((65, 50.0),)},
    "late": {"temperature": 2.0, "seed": 4, "ignore_eos": False, "min_tokens": 30},
}
ALL = FOLLOWS | WAITS


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """The steps that followed one."""
    found, honest = list[Work](), Work.following

    def noted(work: Work, *args: Any) -> Work | None:
        following = honest(work, *args)
        found.extend([] if following is None else [following])
        return following

    monkeypatch.setattr(Work, "following", noted)
    return found


def asking(settings: dict[str, Any], n: int = 1, backend: str | None = None) -> Request:
    return completion(prompt(40, seed=len(settings)), backend, n, **({"max_tokens": 60} | settings))


async def step_by_step(monkeypatch: pytest.MonkeyPatch, requests: Callable[[], list[Request]]) -> list[Any]:
    with monkeypatch.context() as patched:
        patched.setattr(Work, "following", lambda *_: None)
        async with running() as engine:
            return [await told(engine, request) for request in requests()]


@pytest.mark.parametrize("n", [1, 3])
async def test_an_answer_is_that_of_steps_that_wait(monkeypatch: pytest.MonkeyPatch, followed: list[Work], n: int) -> None:
    def requests() -> dict[str, Request]:
        asked = {(name, backend): asking(settings, n, backend) for name, settings in ALL.items() for backend in BACKENDS}
        return {" under ".join(key): request for key, request in asked.items()}

    expected = await step_by_step(monkeypatch, lambda: list(requests().values()))
    assert not followed
    async with running() as engine:
        for (name, request), answer in zip(requests().items(), expected, strict=True):
            followed.clear()
            assert await told(engine, request) == answer, name
            assert bool(followed) == (name.split(" under ")[0] in FOLLOWS), name
        await until(lambda: is_empty(engine))


async def test_in_company_with_one_that_waits_nobody_goes_ahead(monkeypatch: pytest.MonkeyPatch, followed: list[Work]) -> None:
    def requests() -> list[Request]:
        return [asking(FOLLOWS["drawn"]), asking(WAITS["presence"])]

    expected = await step_by_step(monkeypatch, requests)
    async with running() as engine:
        assert await asyncio.gather(*(told(engine, request) for request in requests())) == expected
    assert all(len(work.members) == 1 and not work.members[0].job.request.sampling.presence_penalty for work in followed)


async def test_a_guess_waits_for_the_whole_text(followed: list[Work]) -> None:
    async with running(prompt_lookup=LookupConfig(tokens=4)) as engine:
        await told(engine, asking({}))
    assert not followed


async def test_a_form_waits_for_its_grammar(followed: list[Work]) -> None:
    async with running() as engine:
        grammar: Grammar = engine.grammar(Constraint("regex", "[a-z]{30}", "regex"))
        ((_, text, *_),) = await told(engine, asking({"grammar": grammar, "temperature": 1.0, "seed": 1}))
    assert len(text) == 30 and text.isalpha()
    assert not followed


async def test_steps_follow_for_ten_slices_and_no_longer(followed: list[Work]) -> None:
    async with running(slice_seconds=1e-9) as engine:
        await told(engine, asking({}))
    assert not followed


async def test_a_slow_event_loop_hands_out_what_ran_ahead_of_it(monkeypatch: pytest.MonkeyPatch, followed: list[Work]) -> None:
    (expected,), honest = await step_by_step(monkeypatch, lambda: [asking({})]), Delivery.settle

    def slow(delivery: Delivery, work: Work, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.005)
        honest(delivery, work, *args, **kwargs)

    monkeypatch.setattr(Delivery, "settle", slow)
    request = asking({})
    async with running() as engine:
        assert await told(engine, request) == expected
    assert len(followed) > 10
    assert request.timings.output_tokens == 60


@pytest.mark.parametrize("n", [1, 4])
async def test_what_ends_by_a_stop_string_while_the_next_steps_run_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, followed: list[Work], n: int
) -> None:
    def requests() -> list[Request]:
        return [asking({"temperature": 1.0, "seed": seed, "stop": ("a", "b", "c", "d")}, n) for seed in range(5)]

    expected, honest, ran_on = await step_by_step(monkeypatch, requests), Delivery.settle, list[bool]()

    def late(delivery: Delivery, work: Work, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.002)  # some steps more are through
        ran_on.append(any(member.sequence.is_done for member in work.members))
        honest(delivery, work, *args, **kwargs)

    monkeypatch.setattr(Delivery, "settle", late)
    async with running() as engine:
        for request, answer in zip(requests(), expected, strict=True):
            assert await told(engine, request) == answer
            await until(lambda: is_empty(engine))
    assert any(ran_on), "no step ran on behind an end"


@pytest.mark.parametrize("together", [1, 3])
async def test_a_step_that_follows_and_fails_is_read_again(
    monkeypatch: pytest.MonkeyPatch, followed: list[Work], together: int
) -> None:
    def requests() -> list[Request]:
        return [completion(prompt(50, seed=i), max_tokens=40, temperature=1.0, seed=i) for i in range(together)]

    expected, model, failed = await step_by_step(monkeypatch, requests), make_model(), list[int]()

    def trouble(tokens: Tensor, positions: Tensor) -> None:
        if followed and len(tokens) < 20 and positions.max() >= 70 and not failed:
            failed.append(1)
            raise RuntimeError("by mishap")

    async with running(disturb(model, trouble)) as engine:
        answers = await asyncio.gather(*(told(engine, request) for request in requests()), return_exceptions=True)
        assert failed
        if together == 1:
            assert isinstance(answers[0], Exception)
        else:
            assert answers == expected
        await until(lambda: is_empty(engine))


async def test_whoever_comes_leaves_or_is_late_is_seen_between_two_steps(followed: list[Work]) -> None:
    async with running() as engine:
        stream = engine.submit(completion(max_tokens=1900))
        await anext(stream)
        assert len(await told(engine, completion(prompt(20), max_tokens=5))) == 1
        late = completion(prompt(20), "performer", deadline=time.monotonic() + 0.05, max_tokens=1900)
        with pytest.raises(Exception, match="deadline"):
            await told(engine, late)
        assert engine.snapshot().running == 1
        await stream.aclose()
        await until(lambda: is_empty(engine))
    assert followed


async def test_the_end_of_text_is_the_last_that_is_read(followed: list[Work]) -> None:
    """No step follows on a token that ends the answer."""
    async with running() as engine:
        for seed in range(20):
            await told(engine, asking({"temperature": 1.5, "seed": seed, "ignore_eos": False, "max_tokens": 200}))
    assert followed
    assert all(member.drawn != EOS for work in followed for member in work.members)
