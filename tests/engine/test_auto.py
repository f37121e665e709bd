"""How `auto` picks: the operator's order, a limit of seconds, bytes that are left, and what steps have really taken."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from service.config import AutoConfig
from service.engine import forecast
from service.engine.engine import Engine
from service.engine.forecast import Drift
from service.engine.request import NeverFits, Request, UnknownBackend
from tests.engine import world
from tests.engine.world import complete, completion, prompt, running

ORDER = ("dense", "sliding_window", "performer")
BUDGET = 64 * 2**20


@asynccontextmanager
async def picking(default: str = "auto", budget: int = BUDGET, **rules: Any) -> AsyncIterator[Engine]:
    """An engine under these rules."""
    model = world.make_model()
    backends = replace(world.make_backends(model, default), auto=AutoConfig(**rules))
    async with running(model, backends, memory_budget_bytes=budget, memory_sample_share=0) as engine:
        yield engine


def asked(backend: str | None = None, max_seconds: float | None = None, prefer: Sequence[str] = ()) -> Request:
    return replace(completion(prompt(1500), backend), max_seconds=max_seconds, prefer=tuple(prefer))


def seconds(engine: Engine, name: str) -> float:
    return sum(engine.plan(asked(name)).predicted_seconds.values())


def by_speed(engine: Engine) -> list[str]:
    return sorted(ORDER, key=lambda name: seconds(engine, name))


async def test_without_an_order_the_fastest_is_picked() -> None:
    async with picking() as engine:
        plan = engine.plan(asked())
        assert plan.backend == by_speed(engine)[0]
        assert plan.why.startswith("auto: fastest, predicted ")


@pytest.mark.parametrize("order", [ORDER, ORDER[::-1], ("sliding_window",)])
async def test_the_first_of_the_order_is_picked_however_slow(order: tuple[str, ...]) -> None:
    async with picking(prefer=order) as engine:
        plan = engine.plan(asked())
        assert plan.backend == order[0]
        assert plan.why.startswith("auto: preferred, predicted ")


async def test_whoever_takes_longer_than_the_limit_is_passed_over() -> None:
    async with picking() as engine:
        fast, *_, slow = by_speed(engine)
        limit = (seconds(engine, slow) + seconds(engine, fast)) / 2
        for allowed, wanted in ((limit, fast), (100.0, slow)):
            rules = AutoConfig(prefer=(slow, fast), max_seconds=allowed)
            await engine.swap(replace(engine.backends, auto=rules))
            assert engine.plan(asked()).backend == wanted
            assert f"preferred within {allowed:g} s" in engine.plan(asked()).why


async def test_a_callers_hints_replace_the_operators_rules_one_by_one() -> None:
    async with picking(default="dense", prefer=ORDER, max_seconds=100) as engine:
        fast, *_, slow = by_speed(engine)
        assert engine.plan(asked("auto")).backend == ORDER[0]
        assert engine.plan(asked("auto", prefer=(slow, fast))).backend == slow
        assert engine.plan(asked("auto", max_seconds=1e-9)).backend == fast
        assert engine.plan(asked("auto", 1e-9, (slow,))).backend == slow  # no other is picked
        with pytest.raises(UnknownBackend, match="nowhere"):
            engine.plan(asked("auto", prefer=("dense", "nowhere")))


async def test_where_none_keeps_the_limit_the_fastest_answers_and_says_so() -> None:
    async with picking(prefer=ORDER, max_seconds=1e-9) as engine:
        request = asked()
        fastest = by_speed(engine)[0]
        await complete(engine, request)
        assert request.timings.backend == fastest
        assert "auto: fastest, none within 1e-09 s" in request.timings.why


async def test_who_has_no_bytes_left_is_passed_over_until_they_are_free() -> None:
    async with picking(prefer=ORDER) as engine:
        engine._ledger.hold("another", BUDGET - engine.plan(asked("performer")).needed_bytes)
        plan = engine.plan(asked())
        assert plan.backend == "performer"
        assert plan.why.endswith("; no bytes for dense, sliding_window") or plan.why.endswith("; no bytes for dense")
        engine._ledger.release("another")
        assert engine.plan(asked()).backend == "dense"


async def test_what_nothing_has_bytes_for_now_waits_for_what_the_budget_holds() -> None:
    async with picking(prefer=ORDER) as engine:
        engine._ledger.hold("another", BUDGET)
        plan = engine.plan(asked())
        assert (plan.backend, plan.verdict) == ("dense", "queues")


async def test_the_queue_counts_towards_the_limit() -> None:
    async with picking(default="dense", prefer=ORDER) as engine:
        fast, *_ = by_speed(engine)
        limit = 4 * seconds(engine, "dense")
        assert engine.plan(asked("auto", limit)).backend == "dense"
        answers = [engine.submit(asked("dense")) for _ in range(20)]
        assert engine.plan(asked("auto", limit)).backend == fast
        assert "none within" in engine.plan(asked("auto", limit)).why
        for answer in answers:
            await answer.aclose()


async def test_what_steps_have_taken_corrects_the_pick() -> None:
    async with picking() as engine:
        fastest = engine.plan(asked()).backend
        before = seconds(engine, fastest)
        for kind in ("prefill", "decode"):
            for _ in range(10):
                engine._admission.lanes[fastest].drift.note(kind, 1.0, 9.0)
        assert seconds(engine, fastest) > 5 * before
        assert engine.plan(asked()).backend != fastest


async def test_steps_are_compared_with_their_predictions() -> None:
    async with picking("dense", prefer=ORDER) as engine:
        drift = engine._admission.lanes["dense"].drift
        assert drift("prefill") == drift("decode") == 1
        for _ in range(2):  # the first steps of a size are measured, which takes time of its own
            await complete(engine, completion(prompt(1500), max_tokens=50))
        assert drift("prefill") != 1 and drift("decode") != 1


def test_a_drift_comes_to_what_seconds_of_steps_show_and_one_odd_step_hardly_moves_it() -> None:
    drift = Drift()
    assert drift("decode") == 1.0
    for _ in range(2000):
        drift.note("decode", 0.005, 0.01)
    assert drift("decode") == pytest.approx(2.0, rel=1e-3)
    drift.note("decode", 0.001, 0.01)
    assert drift("decode") == pytest.approx(2.0, rel=0.02)
    assert drift("prefill") == 1.0


def test_what_was_measured_long_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    drift, now = Drift(), 100.0
    monkeypatch.setattr(forecast.time, "monotonic", lambda: now)
    for _ in range(20):
        drift.note("prefill", 1.0, 4.0)
    assert drift("prefill") == pytest.approx(4.0, rel=1e-3)
    now += forecast.HALF_LIFE_SECONDS
    assert drift("prefill") == pytest.approx(2.0, rel=1e-3)
    now += 20 * forecast.HALF_LIFE_SECONDS
    assert drift("prefill") == pytest.approx(1.0, abs=1e-3)


async def test_what_cannot_fit_spills_where_configured_unless_the_caller_names_a_backend() -> None:
    async with picking("dense") as engine:
        dense, other = (engine.plan(asked(name)).needed_bytes for name in ("dense", "performer"))
    assert other < dense
    budget = (dense + other) // 2
    async with picking("dense", budget, prefer=("dense", "performer"), spill=True) as engine:
        request = asked()
        await complete(engine, request)
        assert request.timings.backend == "performer"
        assert request.timings.why == f"spilled: dense needs {dense} bytes, the budget is {budget}"
        with pytest.raises(NeverFits):
            engine.submit(asked("dense"))
        short = completion(prompt(50))
        assert (engine.plan(short).backend, engine.plan(short).why) == ("dense", "default")
    async with picking("dense", budget) as engine:
        with pytest.raises(NeverFits):
            engine.submit(asked())


async def test_what_no_backend_can_hold_is_refused_under_the_default() -> None:
    async with picking("dense", 100_000, spill=True) as engine:
        with pytest.raises(NeverFits, match="under dense"):
            engine.submit(asked())


async def test_a_share_of_the_callers_has_the_candidate_and_keeps_it_when_the_share_grows() -> None:
    async with picking("dense") as engine:
        had: set[str] = set()
        for share in (0.0, 0.1, 0.3, 1.0):
            await engine.swap(replace(engine.backends, weights={"performer": share}))
            picks = {str(caller): engine.plan(replace(asked(), caller=str(caller))) for caller in range(400)}
            has = {caller for caller, plan in picks.items() if plan.backend == "performer"}
            assert had <= has
            assert len(has) == pytest.approx(400 * share, abs=40)  # four standard deviations, at most
            assert all(picks[caller].why == f"candidate: {share:g} of the calls" for caller in has)
            had = has
        assert engine.plan(replace(asked("sliding_window"), caller="1")).backend == "sliding_window"


async def test_two_candidates_share_what_they_are_given() -> None:
    async with picking("dense") as engine:
        await engine.swap(replace(engine.backends, weights={"performer": 0.25, "sliding_window": 0.25}))
        picks = [engine.plan(replace(asked(), caller=str(caller))).backend for caller in range(400)]
        assert [picks.count(name) for name in ORDER] == pytest.approx([200, 100, 100], abs=40)


async def test_a_candidate_that_is_withdrawn_leaves_its_callers_to_the_default() -> None:
    async with picking("dense") as engine:
        await engine.swap(replace(engine.backends, weights={"performer": 1.0}))
        engine.withdraw("performer", "it lies")
        assert engine.plan(asked()).backend == "dense"
        engine.withdraw("performer", None)
        assert engine.plan(asked()).backend == "performer"
