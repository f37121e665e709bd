"""Prompt lookup: what is guessed, when, and that no answer shows it."""

from __future__ import annotations

import asyncio
import random
from array import array
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.config import LookupConfig
from service.engine.allowlist import Lane
from service.engine.lookup import MOST_PASSED, Lookup, find
from service.engine.request import Constraint, Delta, ModelFailed, Request
from tests.engine.world import (
    Watcher,
    complete,
    completion,
    disturb,
    is_empty,
    make_backends,
    make_model,
    prompt,
    running,
    tokens_of,
    until,
)

EVERY: dict[str, dict[str, Any]] = {
    "dense": {},
    "sliding_window": {"window": 30, "sinks": 2},
    "chunked": {"chunk": 24},
    "bigbird": {"block": 8},
    "topk": {"block": 8, "blocks": 2, "window": 24},
    "distinct": {"block": 8, "kept": 16, "window": 24, "sinks": 2},
    "performer": {"features": 16},
    "linear": {},
    "layered": {"layers": {"0": {"sliding_window": {"window": 30}}, "1": {"performer": {"features": 16, "local_chunk": 64}}}},
}
KEEN = {"tokens": 6, "ngram": 1}


@pytest.fixture
def keen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row costs next to nothing, so that as much is guessed as may be."""
    monkeypatch.setattr(Lane, "row_price", lambda *_: 1e-9)


def said(deltas: list[Delta]) -> dict[int, tuple[Any, ...]]:
    """All that each sample says."""
    found: dict[int, tuple[Any, ...]] = {}
    for delta in deltas:
        text, tokens, logprobs, _ = found.get(delta.index, ("", [], [], None))
        logprobs = logprobs + list(delta.logprobs or ())
        found[delta.index] = (text + delta.text, tokens + list(delta.tokens), logprobs, delta.finish_reason)
    return found


async def answers(requests: list[Request], tokens: int) -> list[dict[int, tuple[Any, ...]]]:
    """What each says, all asked for at once, with up to so many tokens guessed."""
    model = make_model()
    backends = make_backends(model, **EVERY)
    async with running(model, backends, prompt_lookup=KEEN | {"tokens": tokens}) as engine:
        told = [replace(each, timings=type(each.timings)()) for each in requests]
        found = [said(each) for each in await asyncio.gather(*(complete(engine, each) for each in told))]
        assert is_empty(engine)
    guessed, accepted = (sum(getattr(t.timings, f"{kind}_tokens") for t in told) for kind in ("guessed", "accepted"))
    assert accepted < guessed if tokens else guessed == accepted == 0
    return found


def some(seed: int) -> list[Request]:
    """Requests of all kinds under every backend, their prompts with much that comes again."""
    draw, found = random.Random(seed), []
    for name in EVERY:
        words = [prompt(draw.randint(1, 9), draw.randint(0, 99)) for _ in range(4)]
        text = [token for _ in range(draw.randint(3, 40)) for token in draw.choice(words)]
        options: dict[str, Any] = {"max_tokens": draw.choice((1, 2, 7, 40, 70))}
        for option, values in (
            ("temperature", (0.0, 0.3, 1.0)),
            ("seed", (3,)),
            ("logprobs", (None, 0, 2)),
            ("top_k", (0, 3)),
            ("presence_penalty", (0.0, 0.5)),
            ("repetition_penalty", (1.0, 1.3)),
            ("stop", ((), ("a",), ("\n", "zz"))),
            ("ignore_eos", (True, False)),
            ("logit_bias", ((), ((65, 4.0), (256, 3.0)))),
            ("echo", (False, True)),
        ):
            options[option] = draw.choice(values)
        options["min_tokens"] = draw.choice((0, min(5, options["max_tokens"])))
        found.append(completion(text, name, n=draw.choice((1, 2)), **options))
    return found


@pytest.mark.usefixtures("keen")
@pytest.mark.parametrize("seed", range(6))
async def test_an_answer_is_the_same_with_guesses_and_without(seed: int) -> None:
    requests = some(seed)
    assert await answers(requests, 6) == await answers(requests, 0)


@pytest.mark.usefixtures("keen")
@pytest.mark.parametrize("name", EVERY)
async def test_a_long_answer_that_repeats_itself_takes_fewer_steps_and_is_the_same(name: str) -> None:
    model, found = make_model(), []
    for tokens in (0, 6):
        watcher = Watcher()
        backends, lookup = make_backends(model, name, **{name: EVERY[name]}), KEEN | {"tokens": tokens}
        async with running(model, backends, watcher, prompt_lookup=lookup) as engine:
            request = completion([7, 8, 9] * 20, name, max_tokens=200, logit_bias=((7, 60.0), (8, 60.0)))
            found.append((await tokens_of(engine, request), sum(step.kind == "decode" for step in watcher.steps)))
            assert is_empty(engine)
    assert found[0][0] == found[1][0]
    assert found[1][1] < found[0][1] / 2


@pytest.mark.usefixtures("keen")
async def test_an_answer_keeps_to_its_form_with_guesses_as_without() -> None:
    model, found = make_model(), []
    form = Constraint("regex", "(ab|cd){3,40}x?", "guided_regex")
    for tokens in (0, 6):
        async with running(model, prompt_lookup=KEEN | {"tokens": tokens}) as engine:
            requests = [
                completion("abcdabcdababcd" * 4, temperature=t, seed=5, max_tokens=m, grammar=engine.grammar(form))
                for t in (0.0, 1.0)
                for m in (5, 60)
            ]
            found.append([said(each) for each in await asyncio.gather(*(complete(engine, each) for each in requests))])
            assert any(request.timings.guessed_tokens for request in requests) == (tokens > 0)
    assert found[0] == found[1]


@pytest.mark.usefixtures("keen")
async def test_a_caller_may_ask_for_fewer_guesses_and_for_none() -> None:
    async with running(prompt_lookup=KEEN) as engine:
        for wish, most in ((None, 6), (2, 2), (0, 0), (50, 6)):
            watcher = Watcher()
            engine._delivery._observer = watcher
            request = completion([7, 8] * 30, max_tokens=60, logit_bias=((7, 90.0),), lookup_tokens=wish)
            await complete(engine, request)
            assert max(step.guessed for step in watcher.steps) == most
            assert request.timings.guessed_tokens == sum(step.guessed for step in watcher.steps)
            assert (request.timings.accepted_tokens > 0) == (most > 0)


@pytest.mark.usefixtures("keen")
async def test_a_step_with_guesses_that_fails_harms_no_other_request() -> None:
    def trouble(tokens: Any, positions: Any) -> None:
        if is_armed and (tokens == 99).any():
            raise RuntimeError("trouble")

    is_armed, model = False, make_model()
    calm = [completion([7, 8] * 30, max_tokens=60), completion(prompt(40), "performer", max_tokens=60)]
    async with running(disturb(model, trouble), prompt_lookup=KEEN) as engine:
        wanted = [await tokens_of(engine, request) for request in calm]
        is_armed = True
        guilty = completion([7, 8, 99] * 20, max_tokens=60)
        again = [Request(each.id, each.kind, each.tokens, each.backend, each.sampling) for each in calm]
        found = await asyncio.gather(*(tokens_of(engine, each) for each in (*again, guilty)), return_exceptions=True)
        assert found[:2] == wanted and isinstance(found[2], ModelFailed)
        await until(lambda: is_empty(engine))


@pytest.mark.usefixtures("keen")
async def test_a_guess_that_is_cut_short_by_its_caller_gives_its_bytes_back() -> None:
    async with running(prompt_lookup=KEEN) as engine:
        answer = engine.submit(completion([7, 8] * 30, max_tokens=500, logit_bias=((7, 90.0),)))
        async for _ in answer:
            break
        await answer.aclose()
        await until(lambda: is_empty(engine))


def test_guesses_end_where_they_do_not_pay_and_are_tried_again() -> None:
    lookup, text, tried, asked = Lookup(), array("i", [1, 2, 3] * 400), [], []

    def price() -> float:
        asked.append(1)
        return 0.3

    for length in range(100, 500):
        guess = lookup.guess(lambda a, b: text[a:b], length, 2, 5, price)
        if guess:
            tried.append(length)
            lookup.learn(len(guess), 0)
    assert tried[0] == 100 and 3 < len(tried) <= 20  # a wrong one in twenty steps
    assert len(asked) <= 400 / MOST_PASSED + 2 * len(tried)
    for length in range(500, 800):
        if guess := lookup.guess(lambda a, b: text[a:b], length, 2, 5, lambda: 0.3):
            lookup.learn(len(guess), len(guess))
    assert lookup.chance > 0.8


def test_text_that_never_repeats_is_searched_seldom_and_no_price_is_asked_for() -> None:
    lookup, text, searched = Lookup(), array("i", range(1000)), []

    def tokens(start: int, end: int) -> array[int]:
        if start == 0:
            searched.append(end)
        return text[start:end]

    def price() -> float:
        raise AssertionError("nothing is to be weighed")

    for length in range(100, 1000):
        assert not lookup.guess(tokens, length, 3, 5, price)
    assert len(searched) <= 900 / MOST_PASSED + MOST_PASSED
    text += text[500:550]  # what comes again then is found all the same
    assert any(lookup.guess(tokens, 1000 + more, 3, 5, lambda: 0.1) for more in range(3, 3 + MOST_PASSED + 1))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 4))
def test_the_latest_earlier_occurrence_is_found(text: list[int], ngram: int) -> None:
    found = find(array("i", text), ngram) if len(text) > ngram else None
    last = text[-ngram:]
    ends = [end for end in range(ngram, len(text)) if text[end - ngram : end] == last]
    assert found == (ends[-1] if ends else None)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 3), st.integers(0, 9))
def test_a_guess_goes_on_as_the_text_went_on_before(text: list[int], ngram: int, most: int) -> None:
    guess = Lookup().guess(lambda a, b: array("i", text[a:b]), len(text), ngram, most, lambda: 1e-9).tolist()
    assert len(guess) in (0, most)
    if guess:
        whole = text + guess
        backs = [back for back in range(1, len(text)) if whole[len(text) - ngram :] == whole[len(text) - ngram - back : -back]]
        assert backs


async def test_nothing_is_guessed_where_mates_change_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.engine.engine.row_multiple", lambda model: None)
    async with running(prompt_lookup=KEEN) as engine:
        request = completion([7, 8] * 30, max_tokens=40)
        await complete(engine, request)
        assert request.timings.guessed_tokens == 0


def test_bad_settings_are_refused() -> None:
    for wrong in ({"tokens": -1}, {"tokens": 33}, {"ngram": 0}, {"token": 1}):
        with pytest.raises(ValueError):
            LookupConfig.model_validate(wrong)
