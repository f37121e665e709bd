"""Replicas on paper: held to queueing theory where that knows the answer, to plain sense where it does not."""

from __future__ import annotations

from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.capacity.fleet import WARM_UP, Fleet, Layout, Level, Proxies
from service.capacity.mix import Lengths, Mix
from service.capacity.paper import Visit
from service.capacity.site import Site, Surroundings
from service.engine.ahead import Ahead
from service.engine.work import Work
from service.router import by_work
from service.routing import Sent, tell
from tests.capacity.sites import BUDGET, CHUNK, make_site

SITE = make_site()
ONE = Layout(replicas=1)
MIX = Mix.parse("300:20@0.7,1200:40@0.3")
SHORTER = Mix.parse("200:20@0.7,900:40@0.3")
LEVEL = Level(1.0, 1.0, 0.95)


def calls(site: Site, layout: Layout, mix: Mix, rate: float, count: int, seed: int = 0, **kwargs: Any) -> list[Visit]:
    fleet = Fleet(site, layout, mix, rate, seed, **kwargs)
    fleet.run(count)
    return fleet.calls


def first_token(found: list[Visit]) -> float:
    """The mean of calls that are answered, the first ones left out."""
    return mean(call.first_token_seconds for call in found[int(WARM_UP * len(found)) :] if call.refused is None)


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_one_at_a_time_with_equal_work_waits_as_pollaczek_and_khinchine_say(load: float) -> None:
    """M/D/1: the mean wait is rho / (2 mu (1 - rho)). 4,000 calls have it to some percent at these loads."""
    site, mix = make_site(packs=False, max_waiting_requests=100_000, slice_seconds=1.0), Mix.parse("100:1")
    service = site.lanes["dense"].prefill_seconds(100)
    wait = first_token(calls(site, ONE, mix, load / service, 4_000)) - service
    assert wait == pytest.approx(load * service / (2 * (1 - load)), rel=0.1)


def test_a_call_that_is_alone_takes_what_is_predicted() -> None:
    lane, lengths = SITE.lanes["dense"], Lengths(1000, 30)
    (call,) = calls(SITE, ONE, Mix(((lengths, 1.0),)), 1.0, 1)
    decode = sum(lane.decode_seconds(1000 + place) for place in range(1, 30))
    assert call.first_token_seconds == pytest.approx(lane.prefill_seconds(1000))
    assert call.token_seconds * 29 == pytest.approx(decode, rel=1e-3)


@pytest.mark.parametrize("rate", [5.0, 30.0, 60.0])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize(("budget", "patience"), [(BUDGET, 4.0), (3_000_000, 0.5), (3_000_000, 100.0)])
def test_many_steps_and_slices_in_one_event_are_what_they_are_one_by_one(
    rate: float, share: float, budget: int, patience: float
) -> None:
    """Streams alone, prompts beside streams, and prompts beside prompts that wait or have begun, for time or for bytes.

    Not for any seed: a step's time is the mean of some, and who is more urgent by less than that may change.
    """
    site, layout = make_site(budget, decode_share=share, patience=patience), Layout(2, machines=2)
    fast, slow = (calls(site, layout, MIX, rate, 60, seed=1, leap=leap) for leap in (32, 1))
    for one, other in zip(fast, slow, strict=True):
        assert one.refused == other.refused
        assert one.first == pytest.approx(other.first, rel=1e-3)
        assert one.ended == pytest.approx(other.ended, rel=1e-3)


def test_a_prompt_beside_streams_and_one_beside_prompts_take_few_events() -> None:
    """Else a thousand replicas take half an hour."""
    for mix in (Mix.parse("1900:1@0.5,16:200@0.5"), Mix.parse("1900:1,1200:1")):
        events = [steps(Fleet(SITE, ONE, mix, 3.0, seed=1, leap=leap)) for leap in (32, 1)]
        assert events[0] * 5 < events[1]


def steps(fleet: Fleet) -> int:
    """How many steps, slices of them or leaps over many a run of some calls takes."""
    (replica,), count = fleet._replicas, 0
    choose = replica._scheduler.next

    def counted(now: float) -> Work | None:
        nonlocal count
        count += 1
        return choose(now)

    replica._scheduler.next = counted  # type: ignore[method-assign]
    fleet.run(30)
    return count


@settings(max_examples=5, deadline=None)
@given(st.floats(1, 200), st.integers(0, 5), st.integers(1, 4), st.sampled_from([4, 256]))
def test_every_call_ends_once_and_nothing_is_held_behind_it(rate: float, seed: int, replicas: int, queue: int) -> None:
    site = make_site(budget=3_000_000, max_waiting_requests=queue)
    fleet = Fleet(site, Layout(replicas), MIX, rate, seed)
    outcome = fleet.run(100)
    assert outcome.sent == 100 and outcome.answered + sum(outcome.refusals.values()) == outcome.judged == 90
    for call in fleet.calls:
        assert call.ended is not None and (call.first is None) == (call.refused is not None)
        assert call.due <= (call.first or call.ended) <= call.ended
    for replica in fleet._replicas:
        assert (replica._ledger.in_use, replica._scheduler.jobs, replica._calls) == (0, [], {})


@settings(max_examples=4, deadline=None)
@given(st.floats(2, 12), st.integers(0, 5))
def test_more_replicas_are_never_worse(rate: float, seed: int) -> None:
    """But for what a router that is told once a second may get wrong."""
    waits = [first_token(calls(SITE, Layout(number, number), MIX, rate, 100, seed)) for number in (1, 4, 16)]
    assert waits[1] <= waits[0] * 1.05 and waits[2] <= waits[1] * 1.05


@settings(max_examples=4, deadline=None)
@given(st.floats(1, 10), st.integers(0, 5), st.sampled_from([1.5, 2.0]))
def test_longer_prompts_and_answers_are_never_better(rate: float, seed: int, factor: float) -> None:
    longer = Mix(tuple((Lengths(int(n.prompt * factor), int(n.answer * factor)), weight) for n, weight in SHORTER.weights))
    assert first_token(calls(SITE, ONE, longer, rate, 60, seed)) >= first_token(calls(SITE, ONE, SHORTER, rate, 60, seed))


def test_the_same_seed_has_the_same_calls_come_to_the_same_ends_and_another_has_not() -> None:
    one, same, other = (Fleet(SITE, Layout(3), MIX, 20, seed).run(200, LEVEL) for seed in (0, 0, 1))
    assert one == same
    assert one.first_token_seconds != other.first_token_seconds


def test_at_any_rate_the_same_calls_come_in_the_same_order() -> None:
    slow, fast = (calls(SITE, ONE, MIX, rate, 50) for rate in (1.0, 10.0))
    assert [call.lengths for call in slow] == [call.lengths for call in fast]
    assert [call.due - 1 for call in slow] == pytest.approx([10 * (call.due - 1) for call in fast])


def test_http_and_neighbours_cost_what_they_were_measured_to() -> None:
    lengths = Mix.parse("100:1")
    (alone,) = calls(SITE, ONE, lengths, 1.0, 1)
    (behind,) = calls(make_site(around=Surroundings(call_seconds=0.5)), ONE, lengths, 0.001, 1)
    assert behind.first_token_seconds == pytest.approx(alone.first_token_seconds + 0.5, rel=1e-2)
    crowded = make_site(around=Surroundings(crowding=1.5), max_waiting_requests=10_000)
    apart, beside = (first_token(calls(crowded, Layout(2, machines, cpus=2), lengths, 150, 600)) for machines in (2, 1))
    assert beside > 1.1 * apart


def test_a_run_that_cannot_keep_the_level_any_more_is_cut_short() -> None:
    outcome = Fleet(SITE, ONE, MIX, 1000, 0).run(2000, Level(0.2, 1.0, 0.95))
    assert outcome.is_cut and outcome.sent < 2000


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 500), st.sampled_from(["send", "end", "tell"])),
        max_size=40,
    ),
    st.lists(st.sampled_from([0.0, 0.1, 0.5, 2.0]), min_size=4, max_size=4),
)
def test_proxies_on_paper_choose_as_routers_do(changes: list[tuple[int, int, int, str]], work: list[float]) -> None:
    told: list[Any] = [{"outstanding_seconds": each, "token_seconds": 1e-3} for each in work]
    now = [0.0]
    proxies = Proxies(3, told, "0", lambda: now[0])
    routers = [{index: Sent(clock=lambda: now[0]) for index in range(4)} for _ in range(3)]
    for index in range(4):
        proxies.hear(index)
    for number, (at, index, tokens, change) in enumerate(changes):
        now[0], sent = 0.1 * number, routers[at][index]
        if change == "send":
            proxies.send(at, index, str(number), tokens)
            sent.add(str(number), tokens)
        elif change == "tell":
            ahead = {call: Ahead(tokens / 100) for each in routers for call in each[index].calls}
            told[index] = tell(ahead | {"": Ahead(0.1)}, 1e-3, keeps_prefixes=False)
            proxies.hear(index)
        elif sent.calls:
            call = next(iter(sent.calls))
            proxies.end(at, index, call)
            sent.remove(call)
    for index in range(4):  # time may have passed since the last word of it
        proxies.hear(index)
    replicas: Any = [SimpleNamespace(replica_id=index, routing_stats=each) for index, each in enumerate(told)]
    for at, known in enumerate(routers):
        best, chosen = by_work(replicas, known)[0].replica_id, proxies.choose(at)  # type: ignore[arg-type]
        assert known[chosen].rank(told[chosen]) == known[best].rank(told[best])


def test_a_chunk_gives_way_to_streams_as_in_an_engine() -> None:
    """A long prompt beside a stream: the stream goes on behind each slice, and does not wait for the prompt's end."""
    stream, prompt = Lengths(16, 200), Lengths(1900, 1)
    mix = Mix(((stream, 1.0), (prompt, 1.0)))
    seed = next(seed for seed in range(50) if mix.draw(2, seed) == [stream, prompt])
    long_seconds = SITE.lanes["dense"].prefill_seconds(1900)
    first, second = calls(SITE, ONE, mix, 1e3, 2, seed)
    assert first.first is not None and first.ended is not None and second.first is not None
    alone = SITE.lanes["dense"].decode_seconds(100) * 199
    assert first.ended - first.first < alone + 1.1 * long_seconds
    assert second.first_token_seconds > long_seconds + 0.5 * min(alone, long_seconds), "the prompt had all of the time"
    assert CHUNK < 1900
