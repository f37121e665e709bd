"""Shadow quality: what is found is what torch finds on whole logits, and nobody's answer, wait or byte depends on it."""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections.abc import Generator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import attention
from attention import Segments, result
from service.config import ShadowConfig
from service.engine import shadow
from service.engine.admission import Ledger, Loan
from service.engine.allowlist import Lane
from service.engine.divergence import Divergence, diverging, kl, reading_bytes
from service.engine.engine import Backends, Engine
from service.engine.meter import StorageCounter
from service.engine.observer import Shadowed
from service.engine.request import Request
from service.engine.shadow import ServedAnswer
from tests.engine.world import (
    Watcher,
    complete,
    completion,
    embed,
    embedding,
    make_backends,
    make_model,
    prompt,
    running,
    tokens_of,
    told,
    until,
)

ALL: dict[str, Any] = {"share": 1}


def lanes_of(engine: Engine) -> dict[str, Lane]:
    return dict(engine._admission.lanes)


def plain_logits(engine: Engine, lane: Lane, tokens: Sequence[int]) -> Tensor:
    """Next-token logits of a whole text in one call: float64 (T, V)."""
    model, segments = engine._model, Segments((len(tokens),))
    layers = attention.layers_of(lane.backend, model.config.num_hidden_layers)
    with torch.inference_mode():
        hidden = model.hidden(
            torch.tensor(tokens),
            segments.positions(),
            lambda layer, q, k, v: layers[layer].attend(q, k, v, segments, causal=True),
        )
        return model.logits(hidden).double()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("served", ["sliding_window", "performer"])
async def test_in_parts_it_is_what_torch_finds_on_whole_logits(length: int, served: str) -> None:
    tokens = array("i", prompt(length))
    places = [place for place in (0, 7, 62, 63, 64, 65, 128, 198, 199) if place < length]
    async with running(chunk_tokens=64) as engine:
        lanes = lanes_of(engine)
        found = result(diverging(engine._runner, lanes["dense"], lanes[served], tokens, places, len(tokens)))
        theirs, ours = (plain_logits(engine, lanes[name], tokens)[places] for name in ("dense", served))
        lanes_hold = [lane.bytes_in_use for lane in lanes.values()]
    wanted = torch.nn.functional.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert torch.tensor(found.nats, dtype=torch.float64).allclose(wanted, rtol=1e-3, atol=1e-7)  # float32 in other chunks
    assert found.agreed == int((theirs.argmax(-1) == ours.argmax(-1)).sum())
    assert max(found.nats) > 1e-4 or length < 200  # else two that are alike were compared
    assert lanes_hold == [0, 0, 0]


def test_kl_is_the_definition_and_ids_that_are_no_tokens_count_nothing() -> None:
    p, q = torch.randn(5, 11), torch.randn(5, 11)
    weights, others = p.double().softmax(-1), q.double().softmax(-1)
    assert kl(p, q).allclose((weights * (weights / others).log()).sum(-1), rtol=1e-12)
    padded = [torch.cat((x, torch.full((5, 3), -torch.inf)), 1) for x in (p, q)]
    assert kl(*padded).allclose(kl(p, q), rtol=1e-12)
    assert kl(p, p).tolist() == [0.0] * 5
    assert kl(p.index_fill(1, torch.tensor(3), torch.nan), q).isnan().all()  # never hidden


@pytest.mark.parametrize("backend", ["dense", "sliding_window", "performer"])
async def test_a_backend_held_to_itself_is_off_by_nothing(backend: str) -> None:
    async with running(chunk_tokens=64) as engine:
        lane = lanes_of(engine)[backend]
        found = result(diverging(engine._runner, lane, lane, array("i", prompt(150)), range(100, 150), 150))
    assert found == Divergence((0.0,) * 50, 50)


async def test_what_sees_as_much_as_the_reference_is_off_by_rounding() -> None:
    model, watcher = make_model(), Watcher()
    backends = make_backends(model, dense={}, sliding_window={"window": 2048})
    async with running(model, backends, watcher, shadow=ALL) as engine:
        await complete(engine, completion(prompt(300), "sliding_window", max_tokens=20))
        await until(lambda: watcher.shadows)
    (found,) = watcher.shadows
    assert (found.result, found.backend, found.prompt_tokens, len(found.nats), found.agreed) == (
        "scored",
        "sliding_window",
        300,
        20,
        20,
    )
    assert max(found.nats) < 1e-6


@pytest.mark.parametrize(("answer", "most"), [(1, 1), (1, 8), (2, 1), (8, 8), (9, 8), (100, 8), (1000, 64)])
def test_places_are_of_the_answer_and_spread_over_it(answer: int, most: int) -> None:
    served = ServedAnswer("id", None, array("i", range(50 + answer - 1)), 50, 50 + answer)  # type: ignore[arg-type]
    places = served.places(most)
    assert places == sorted(set(places)) and len(places) == min(most, answer)
    assert places[0] == 49 and (
        places[-1] == 49 + answer - 1 or most == 1
    )  # behind the prompt's last; before the answer's last


async def storm(engine: Engine) -> list[Any]:
    """Answers of all backends, greedy and drawn, one after the other and side by side, with log-probabilities."""

    def asked(number: int) -> Request:
        backend = ("sliding_window", "performer", "dense")[number % 3]
        drawn = {"temperature": 0.8, "seed": number} if number % 2 else {}
        return completion(prompt(20 + 90 * number, number), backend, n=1 + number % 2, max_tokens=6, logprobs=2, **drawn)

    first = [await told(engine, asked(number)) for number in range(4)]
    await asyncio.sleep(0.05)  # a pass has begun
    return first + await asyncio.gather(*(told(engine, asked(number)) for number in range(9)))


async def test_answers_are_the_same_bit_for_bit_with_and_without() -> None:
    answers, watcher = [], Watcher()
    for config in ({"share": 0}, ALL):
        async with running(watcher=watcher, chunk_tokens=64, shadow=config) as engine:
            answers.append(sorted(map(str, await storm(engine))))
            if config["share"]:
                await until(lambda: len(watcher.shadows) == 9)
    assert answers[0] == answers[1]
    assert {each.result for each in watcher.shadows} == {"scored"}


async def test_only_whole_answers_of_other_backends_than_the_reference_are_kept() -> None:
    watcher = Watcher()
    async with running(watcher=watcher, shadow=ALL) as engine:
        await complete(engine, completion(backend="dense"))
        await embed(engine, embedding(backend="performer"))
        await complete(engine, completion(backend="performer", max_tokens=0))
        answer = engine.submit(completion(backend="performer", max_tokens=2000))
        await anext(answer)
        await answer.aclose()
        await engine.when_idle()
        assert engine.snapshot().shadow.waiting == 0
        kept = completion(prompt(30), backend="performer", n=3, temperature=1.0)
        await complete(engine, kept)
        await until(lambda: watcher.shadows)
    assert [(each.id, each.result, len(each.nats)) for each in watcher.shadows] == [(kept.id, "scored", 8)]


async def test_off_keeps_nothing_and_runs_nothing() -> None:
    watcher = Watcher()
    async with running(watcher=watcher) as engine:
        await complete(engine, completion(backend="performer"))
        await engine.when_idle()
        assert engine._shadowing is None
        assert engine.snapshot().shadow.waiting == 0
    assert watcher.shadows == []


async def test_about_as_many_are_kept_as_the_share_says() -> None:
    async with running(shadow={"share": 0.25, "kept_bytes": 2**30}) as engine:
        lane = lanes_of(engine)["performer"]
        for _ in range(1000):
            engine._shadow.served(completion(), lane, array("i", [1, 2]), array("i", [3]))
        assert 150 < engine.snapshot().shadow.waiting < 350  # seven standard deviations


async def test_what_is_kept_is_bounded_and_the_oldest_goes() -> None:
    watcher = Watcher()
    async with running(watcher=watcher, shadow=ALL | {"kept_bytes": 5000}) as engine:
        lane, requests = lanes_of(engine)["performer"], [completion() for _ in range(20)]
        for request in requests:
            engine._shadow.served(request, lane, array("i", range(100)), array("i", [3]))
            assert engine.snapshot().shadow.kept_bytes <= 5000
        waiting = engine.snapshot().shadow.waiting
        assert 1 < waiting < 20
        assert [(each.id, each.result) for each in watcher.shadows] == [(r.id, "replaced") for r in requests[:-waiting]]
        engine._shadow.served(requests[0], lane, array("i", range(2000)), array("i", [3]))  # alone beyond the bound
        assert engine.snapshot().shadow.kept_bytes == 0


async def test_not_a_part_runs_while_a_request_is_there() -> None:
    began: list[float] = []

    def slow() -> Generator[None, None, int]:
        for _ in range(20):
            began.append(time.monotonic())
            time.sleep(0.005)
            yield
        return 7

    async with running() as engine:
        task = asyncio.create_task(engine.beside(slow(), is_patient=True))
        await until(lambda: len(began) > 2)
        answer = engine.submit(completion(max_tokens=300))
        await anext(answer)  # the part that was running when it came has ended by now
        start = time.monotonic()
        async for _ in answer:
            last = time.monotonic()
        assert await task == 7
    assert [each for each in began if start < each < last] == []
    assert began[-1] > last


async def test_a_request_that_wants_the_bytes_has_them_at_once() -> None:
    watcher = Watcher()
    backends = make_backends(model := make_model(), "performer", dense={}, performer={"features": 32})
    async with running(model, backends, watcher, chunk_tokens=16, memory_budget_bytes=2 << 20, shadow=ALL) as engine:
        await complete(engine, completion(prompt(1500), "performer", max_tokens=4))
        await until(lambda: engine.snapshot().shadow.lent_bytes)
        wanting = completion(prompt(1900), "dense", max_tokens=4)
        plan = engine.plan(wanting)
        assert plan.verdict == "runs"  # a loan is nobody's reservation
        assert plan.needed_bytes > plan.budget_bytes - engine.snapshot().shadow.lent_bytes
        assert len(await tokens_of(engine, wanting)) == 4
        await until(lambda: watcher.shadows)
        assert engine.snapshot().shadow.lent_bytes == 0
        assert [each.result for each in watcher.shadows] == ["gave_way"]


async def test_an_observer_that_fails_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    watcher, told = Watcher(), list[Shadowed]()

    def failing(shadowed: Shadowed) -> None:
        told.append(shadowed)
        raise RuntimeError("no room for numbers")

    monkeypatch.setattr(watcher, "shadowed", failing)
    async with running(watcher=watcher, shadow=ALL) as engine:
        for count in (1, 2):
            assert len(await tokens_of(engine, completion(backend="performer"))) == 8
            await until(lambda count=count: len(told) == count)
    assert [each.result for each in told] == ["scored"] * 2


def raising(*_: object) -> Generator[None, None, Divergence]:
    yield
    raise RuntimeError("no memory for you")


def undefined(*_: object) -> Generator[None, None, Divergence]:
    yield
    return Divergence((0.1, float("nan")), 1)


@pytest.mark.parametrize(
    ("config", "fault", "wanted"),
    [
        ({"max_tokens": 106}, None, "too_long"),
        ({"max_tokens": 107}, None, "scored"),
        ({}, raising, "failed"),
        ({}, undefined, "undefined"),
    ],
)
async def test_what_becomes_of_an_answer_is_told(
    config: dict[str, Any], fault: Any, wanted: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if fault is not None:
        monkeypatch.setattr(shadow, "diverging", fault)
    watcher = Watcher()
    async with running(watcher=watcher, shadow=ALL | config) as engine:
        with caplog.at_level(logging.INFO):
            for expected in (1, 2):  # one that cannot be scored does not keep the next from it
                await complete(engine, completion(prompt(100), "performer", max_tokens=8))
                await until(lambda count=expected: len(watcher.shadows) == count)
        assert engine.snapshot().shadow.lent_bytes == 0
    assert [each.result for each in watcher.shadows] == [wanted] * 2
    assert all(bool(each.nats) == (wanted == "scored") for each in watcher.shadows)
    assert ("could not be scored" in caplog.text) == (wanted == "failed")


async def test_an_answer_that_the_budget_cannot_hold_beside_kept_prefixes_is_left_out() -> None:
    watcher = Watcher()
    async with running(watcher=watcher, chunk_tokens=64, memory_budget_bytes=2 << 20, shadow=ALL, prefix_share=1) as engine:
        await complete(engine, completion(prompt(500), "performer", max_tokens=4))
        await until(lambda: watcher.shadows)
    assert [each.result for each in watcher.shadows] == ["no_memory"]


async def test_a_backend_that_is_gone_and_a_reference_that_is_withdrawn_are_not_scored() -> None:
    model, watcher = make_model(), Watcher()
    async with running(model, make_backends(model), watcher, shadow=ALL) as engine:
        lane = lanes_of(engine)["performer"]
        engine.withdraw("dense", "off")
        await complete(engine, completion(backend="performer"))
        await until(lambda: len(watcher.shadows) == 1)
        await engine.swap(make_backends(model, performer={}, default="performer"))
        engine._shadow.served(completion(), lane, array("i", [1, 2]), array("i", [3]))
        await until(lambda: len(watcher.shadows) == 2)
        await complete(engine, completion(backend="performer"))  # dense is in the list no more: the one that was goes on
        await until(lambda: len(watcher.shadows) == 3)
    assert [each.result for each in watcher.shadows] == ["no_reference", "switched", "no_reference"]


async def test_a_reference_that_nobody_is_served_under_is_built_for_it() -> None:
    model, watcher = make_model(), Watcher()
    async with running(model, make_backends(model, "performer", performer={}), watcher, shadow=ALL) as engine:
        assert engine.backends.names == ("performer",)
        await complete(engine, completion(prompt(50), "performer"))
        await until(lambda: watcher.shadows)
        assert set(engine.snapshot().pool_bytes) == {"performer"}
    assert watcher.shadows[0].result == "scored"
    assert max(watcher.shadows[0].nats) > 0


@pytest.mark.parametrize("name", ["longformer", "native", "layered"])
async def test_a_reference_that_cannot_be_one_is_refused_at_the_start(name: str) -> None:
    model = make_model()
    backends: Backends = make_backends(model)
    with pytest.raises(ValueError, match=name):
        async with running(model, backends, shadow=ALL | {"reference": name}):
            raise AssertionError("it began")


def test_a_reference_that_is_no_backend_is_refused_by_the_config() -> None:
    with pytest.raises(ValueError, match="unknown attention backend 'dens'"):
        ShadowConfig(reference="dens")


@pytest.mark.parametrize("places", [1, 8, 64])
@pytest.mark.parametrize("length", [100, 1900])
async def test_what_a_pass_holds_is_within_what_is_lent(length: int, places: int) -> None:
    async with running(make_model(scale=2, vocabulary=5000), chunk_tokens=64) as engine:
        lanes = lanes_of(engine)
        reference, served = lanes["dense"], lanes["sliding_window"]
        tokens, at = array("i", prompt(length)), range(length - places, length)
        with StorageCounter() as counter:
            result(diverging(engine._runner, reference, served, tokens, at, length))
        width = engine._model.config.hidden_size * 4
        lent = reading_bytes(reference, served, length, places, width)
    assert counter.peak_bytes <= lent <= 1.5 * counter.peak_bytes


def test_a_loan_is_recalled_when_a_reservation_wants_it_and_not_before() -> None:
    ledger, recalled = Ledger(100), list[int]()
    assert ledger.lend(Loan(50, 20, lambda: recalled.append(ledger.lent)))
    assert (ledger.free, ledger.lent) == (100, 50)
    ledger.hold("a", 30)
    assert (recalled, ledger.lent) == ([], 50)
    ledger.hold("a", 31)
    assert (recalled, ledger.lent) == ([0], 0)
    ledger.settle()
    assert not ledger.lend(Loan(50, 20, lambda: None))
    assert ledger.lend(Loan(49, 20, lambda: recalled.append(1)))
    ledger.settle()
    ledger.hold("b", 60)
    assert recalled == [0]
