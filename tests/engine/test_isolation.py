"""Whatever raises on the way of one request, it alone fails: others answer as if it were not there, and all bytes return."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from attention import PoolExhausted, StatePool
from service.engine import delivery as delivery_module
from service.engine import loop as loop_module
from service.engine import runner as runner_module
from service.engine.admission import Ledger
from service.engine.answer import Answer
from service.engine.delivery import Delivery
from service.engine.engine import Engine
from service.engine.job import Job, Sequence
from service.engine.request import ModelFailed, Request, RequestError
from service.engine.scheduler import Scheduler
from service.engine.text import TextStream
from service.engine.work import Work
from tests.engine import world
from tests.engine.world import complete, completion, embed, embedding, is_empty, prompt, running, tokens_of, until

LENGTH = 777  # tokens that only the guilty request may have together
GUILTY = completion(prompt(LENGTH - 12), n=2, temperature=1.0, max_tokens=12, echo=True, stop=("guilty",))
GUILTY_EMBEDDING = embedding(prompt(LENGTH))


def is_guilty(thing: Any) -> bool:
    """Whether one of the engine's objects belongs to the guilty request."""
    if isinstance(thing, Work):
        return any(is_guilty(member.sequence) for member in thing.members)
    if isinstance(thing, Sequence):
        return is_guilty(thing.job)
    if isinstance(thing, TextStream):
        return bool(thing._stops)
    if isinstance(thing, Answer):
        return thing._cancel is not None and any(is_guilty(cell.cell_contents) for cell in thing._cancel.__closure__ or ())
    request = thing.request if isinstance(thing, Job) else thing
    return isinstance(request, Request) and len(request.tokens) + request.sampling.max_tokens * request.n >= LENGTH


Place = tuple[Any, str, Callable[..., bool]]


def own(*things: Any) -> bool:
    return any(is_guilty(thing) for thing in things)


PLACES: list[Place] = [
    (Job, "urgency", own),
    (Scheduler, "_has_room", own),
    (Scheduler, "_enter", own),
    (Ledger, "hold", own),
    (Sequence, "next_end", own),
    (Scheduler, "has_other_work", own),
    (StatePool, "allocate", lambda pool, tokens: tokens == LENGTH),
    (StatePool, "copy", lambda pool, slot: pool._slots[slot].max_tokens == LENGTH),
    (Sequence, "number", own),
    (Sequence, "tokens", own),
    (Job, "spell", own),
    (Job, "join", own),
    (TextStream, "prompt", own),
    (TextStream, "push", own),
    (TextStream, "flush", own),
    (Answer, "put", own),
    (delivery_module, "_emit", own),
    (Delivery, "_settle_prompt", own),
    (world.Watcher, "finished", lambda watcher, *rest: True),
    (world.Watcher, "stepped", lambda watcher, *rest: True),
    (delivery_module, "_told", lambda *rest: True),
]
PLACES_OF_EMBEDDINGS: list[Place] = [
    (runner_module.Runner, "_pool", lambda runner, work, *rest: is_guilty(work)),
    (Answer, "put", own),
]
CASES = [*((place, GUILTY) for place in PLACES), *((place, GUILTY_EMBEDDING) for place in PLACES_OF_EMBEDDINGS)]


def sabotage(monkeypatch: pytest.MonkeyPatch, place: Place, error: Exception, *, before: bool = True) -> list[int]:
    """Let a function raise whenever it works for the guilty request. Returns a list that grows by one each time."""
    owner, name, concerns = place
    honest, raised = getattr(owner, name), []

    def broken(*args: Any, **kwargs: Any) -> Any:
        hits = concerns(*args)
        answer = None if hits and before else honest(*args, **kwargs)
        if hits:
            raised.append(1)
            raise error
        return answer

    monkeypatch.setattr(owner, name, broken)
    return raised


def others() -> list[Request]:
    return [
        completion(prompt(20), max_tokens=40),
        completion(prompt(90, seed=1), temperature=1.0, seed=3, max_tokens=40, echo=True),
        completion(prompt(30, seed=2), "performer", n=2, max_tokens=40),
        completion(prompt(300, seed=3), "sliding_window", max_tokens=40),
    ]


def again(request: Request) -> Request:
    return Request(request.id, request.kind, request.tokens, request.backend, request.sampling, request.n)


async def text_of(engine: Engine, request: Request) -> dict[int, str]:
    texts: dict[int, str] = {}
    for delta in await complete(engine, request):
        texts[delta.index] = texts.get(delta.index, "") + delta.text
    return texts


@contextmanager
def unharmed(engine: Engine) -> Iterator[None]:
    """The loop has not ended, and holds nothing, when the block is through."""
    yield
    assert is_empty(engine)
    assert not engine.snapshot().draining and not engine._loop.is_dead


def named(value: Place | Request) -> str:
    return value.kind if isinstance(value, Request) else f"{value[0].__name__.rpartition('.')[2]}.{value[1]}"


@pytest.mark.parametrize(("place", "guilty"), CASES, ids=named)
async def test_what_raises_for_one_request_costs_that_request_alone(
    monkeypatch: pytest.MonkeyPatch, place: Place, guilty: Request
) -> None:
    async with running(world.make_model(torch.float64), watcher=world.Watcher(), chunk_tokens=64) as engine:
        alone = [await text_of(engine, each) for each in others()]
        raised = sabotage(monkeypatch, place, PoolExhausted(1, 0) if place[1] == "allocate" else RuntimeError("boom"))
        with unharmed(engine):
            answer = engine.submit(again(guilty))
            together = asyncio.gather(*(text_of(engine, each) for each in others()))
            if place[0] is world.Watcher or place[1] == "_told":
                _ = [item async for item in answer]
            else:
                with pytest.raises(ModelFailed):
                    _ = [item async for item in answer]
            assert await together == alone
            assert raised
            assert len(await tokens_of(engine, completion())) == 8
            await until(lambda: is_empty(engine))


@pytest.mark.parametrize("place", [(Sequence, "free", own), (StatePool, "release", lambda pool, slot: True)], ids=named)
async def test_a_state_that_is_given_back_with_an_error_costs_nobody(monkeypatch: pytest.MonkeyPatch, place: Place) -> None:
    async with running(world.make_model(torch.float64)) as engine:
        alone = [await text_of(engine, each) for each in others()]
        raised = sabotage(monkeypatch, place, RuntimeError("boom"), before=False)
        with unharmed(engine):
            guilty = engine.submit(again(GUILTY))
            assert await asyncio.gather(*(text_of(engine, each) for each in others())) == alone
            await guilty.aclose()
            await until(lambda: is_empty(engine))
        assert raised


async def test_a_split_step_that_cannot_be_rewound_costs_the_request_it_belongs_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def trouble(tokens: torch.Tensor, positions: torch.Tensor) -> None:
        if LENGTH - 5 in positions.tolist():
            raise RuntimeError("boom")

    async with running(world.disturb(world.make_model(torch.float64), trouble)) as engine:
        alone = [await text_of(engine, each) for each in others()]
        sabotage(monkeypatch, (Sequence, "rewind", own), RuntimeError("boom"))
        with unharmed(engine):
            guilty = engine.submit(again(GUILTY))
            together = asyncio.gather(*(text_of(engine, each) for each in others()))
            with pytest.raises(ModelFailed):
                _ = [item async for item in guilty]
            assert await together == alone


async def test_an_error_that_is_nobodys_ends_what_is_in_flight_and_not_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as engine:
        honest, raised = engine._scheduler._streams, []

        def broken() -> Any:
            if engine._scheduler.running and not raised:
                raised.append(1)
                engine._scheduler.suspect = None
                raise RuntimeError("boom")
            return honest()

        monkeypatch.setattr(engine._scheduler, "_streams", broken)
        with unharmed(engine):
            answers = [engine.submit(completion(max_tokens=50)) for _ in range(3)]
            for answer in answers:
                with pytest.raises(ModelFailed):
                    _ = [item async for item in answer]
            assert len(await tokens_of(engine, completion())) == 8


async def test_an_error_while_memory_is_given_back_at_rest_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def broken() -> None:
        calls.append(1)
        raise OSError("boom")

    monkeypatch.setattr(loop_module, "REST_SECONDS", 0.01)
    monkeypatch.setattr(loop_module, "trim", broken)
    async with running() as engine:
        with unharmed(engine):
            await until(lambda: len(calls) > 2)
            assert len(await tokens_of(engine, completion())) == 8


async def test_a_refusal_is_told_even_if_the_observer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch, (world.Watcher, "refused", lambda *rest: True), RuntimeError("boom"))
    async with running(watcher=world.Watcher()) as engine:
        with pytest.raises(RequestError, match="n must be"):
            engine.submit(completion(n=0))


async def test_after_a_fault_and_a_replay_a_seed_gives_the_same_answer_and_no_copy_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def requests() -> list[Request]:
        return [completion(prompt(20, i), n=3, temperature=1.0, seed=i, max_tokens=20) for i in range(3)]

    async with running(world.make_model(torch.float64)) as engine:
        expected = await asyncio.gather(*(text_of(engine, each) for each in requests()))
        honest, kinds = runner_module._branch, []

        def broken(work: Work) -> None:
            honest(work)
            if len(work.members) > 1 and kinds.count(work.kind) < 2:
                kinds.append(work.kind)
                raise RuntimeError("boom")  # tokens are drawn and states copied, and nobody hears of it

        monkeypatch.setattr(runner_module, "_branch", broken)
        with unharmed(engine):
            assert await asyncio.gather(*(text_of(engine, each) for each in requests())) == expected
        assert {"prefill", "decode"} == set(kinds)


async def test_the_first_request_after_a_rest_finds_a_healthy_engine() -> None:
    async with running() as engine:
        await tokens_of(engine, completion())
        await asyncio.sleep(0.5)
        answer = engine.submit(completion())
        assert time.monotonic() - engine.snapshot().last_progress < 0.3
        await answer.aclose()


async def test_embeddings_beside_a_failing_one_are_those_it_has_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(world.make_model(torch.float64)) as engine:
        alone = [await embed(engine, embedding(prompt(50 + i, i))) for i in range(3)]
        sabotage(
            monkeypatch, (runner_module.Runner, "_pool", lambda runner, work, *rest: is_guilty(work)), RuntimeError("boom")
        )
        answers = await asyncio.gather(
            embed(engine, again(GUILTY_EMBEDDING)),
            *(embed(engine, embedding(prompt(50 + i, i))) for i in range(3)),
            return_exceptions=True,
        )
        assert isinstance(answers[0], ModelFailed)
        assert answers[1:] == alone
