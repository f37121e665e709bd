"""A call goes to the replica whose work is done soonest; here replicas are what they tell, and one proxy sends."""

from __future__ import annotations

import asyncio
import pickle
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve._private.common import StreamingHTTPRequest
from ray.serve.request_router import RequestRouter

from service.engine.ahead import Ahead, together
from service.http import tickets
from service.http.tickets import Tickets
from service.router import LeastWork, body_bytes, by_work, headers_of
from service.routing import MOST_NAMED, TOLD_SECONDS, UNHEARD_SECONDS, Homes, Sent, Told, tell

LONG: Told = {"outstanding_seconds": 8.0, "token_seconds": 1e-3}
SHORT: Told = {"outstanding_seconds": 0.5, "token_seconds": 1e-3}


def first(told: dict[str, Any], sent: dict[str, Sent]) -> str:
    replicas: Any = [SimpleNamespace(replica_id=name, routing_stats=each) for name, each in told.items()]
    return str(by_work(replicas, sent)[0].replica_id)


def test_one_long_prompt_outweighs_many_short_ones() -> None:
    sent = {"a": Sent(), "b": Sent()}
    sent["a"].add("long", 8000)
    for call in range(5):
        sent["b"].add(f"short {call}", 10)
    assert first({"a": LONG, "b": SHORT}, sent) == "b"


def of_calls(**prefills: float) -> Told:
    """What a replica tells of calls of so many seconds each, which draw one token."""
    return tell({ticket: Ahead(seconds, 0.5) for ticket, seconds in prefills.items()}, 1e-3, keeps_prefixes=True)


def test_what_was_sent_counts_by_its_length_until_it_is_named_and_then_as_it_is_told() -> None:
    now, sent = [0.0], Sent(clock=lambda: now[0])
    sent.add("mine", 2000)
    assert sent.seconds({}) == 0.0  # of a replica that has told nothing yet, not even what a token takes
    assert sent.seconds(of_calls(other=1.0)) == pytest.approx(1.0 + 0.5 + 2.0)
    assert sent.seconds(of_calls(other=1.0, mine=3.0)) == pytest.approx(1.0 + 3.0 + 0.5)
    now[0] = 1.01 * UNHEARD_SECONDS
    assert sent.seconds(of_calls(other=1.0)) == pytest.approx(1.0 + 0.5)  # it is done there, and its caller reads slowly


def test_what_has_ended_is_taken_off_as_it_was_told_however_late_the_next_telling_comes() -> None:
    now, sent = [0.0], Sent(clock=lambda: now[0])
    sent.add("mine", 2000)
    sent.remove("mine")
    for now[0] in (0.0, 100.0):
        assert sent.seconds(of_calls(mine=7.0)) == 0.0
        assert sent.seconds(of_calls(mine=7.0, other=1.0)) == pytest.approx(1.5)
    assert sent.knows_any
    assert sent.seconds(of_calls(other=1.0)) == pytest.approx(1.5) and not sent.knows_any


def test_a_replica_with_very_many_calls_names_the_longest_and_tells_the_sum_of_all() -> None:
    told = of_calls(**{str(number): number + 1.0 for number in range(3 * MOST_NAMED)})
    sent = Sent()
    assert sorted(map(int, told["calls"])) == list(range(2 * MOST_NAMED, 3 * MOST_NAMED))
    assert sent.seconds(told) == pytest.approx(sum(range(1, 3 * MOST_NAMED + 1)) + 0.5)
    for ticket in told["calls"]:
        sent.add(ticket, 1)
        sent.remove(ticket)
    assert sent.seconds(told) == pytest.approx(sum(range(1, 2 * MOST_NAMED + 1)) + 0.5)


def test_what_is_underway_no_more_has_ended() -> None:
    tickets, sent = Tickets(), Sent()
    mine, other = tickets.issue(), tickets.issue()
    sent.add(mine, 1000)
    sent.add(other, 10)
    tickets.end(mine)
    tickets.end(mine)
    sent.keep(tickets)
    assert list(sent.calls) == [other] and sent.seconds(SHORT) == pytest.approx(0.5 + 0.01)
    assert sent.seconds(of_calls(**{mine: 3.0, other: 1.0})) == pytest.approx(1.5)


def test_a_burst_between_two_tellings_is_shared_out() -> None:
    told = dict.fromkeys("abcd", SHORT)
    sent = {name: Sent() for name in told}
    for call in range(40):
        sent[first(told, sent)].add(str(call), 100)
    assert {len(each.calls) for each in sent.values()} == {10}


def call(ticket: str) -> Any:
    """A call by HTTP of 400 bytes, as Serve's router has it."""
    headers = [(tickets.HEADER, ticket.encode()), (b"content-length", b"400")]
    packed = pickle.dumps(StreamingHTTPRequest({"headers": headers}, proxy_actor_name="a"))
    return SimpleNamespace(args=(packed,), routing_context=SimpleNamespace(should_backoff=False))


def test_a_call_counts_from_when_it_is_sent_and_for_the_replica_that_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any replica has taken one of a burst, refused or not."""
    underway = Tickets()
    monkeypatch.setattr(tickets, "TICKETS", underway)
    monkeypatch.setattr(RequestRouter, "__init__", lambda self: None)
    router, replicas = LeastWork(), [SimpleNamespace(replica_id=name, routing_stats=SHORT) for name in "abcd"]
    burst = {ticket: call(ticket) for ticket in (underway.issue() for _ in range(40))}

    def send(each: Any) -> str:
        (first, *_) = asyncio.run(router.choose_replicas(replicas, each))  # type: ignore[arg-type]
        return str(first[0].replica_id)

    counts = Counter(send(each) for each in burst.values())
    assert set(counts.values()) == {10}
    one = next(iter(burst))
    send(burst[one])  # it was refused, and is asked about again
    router.on_request_routed(burst[one], "d", None)  # type: ignore[arg-type]
    assert [name for name, sent in router._sent.items() if one in sent.calls] == ["d"]
    assert sum(len(sent.calls) for sent in router._sent.values()) == 40


def test_replicas_that_have_told_nothing_yet_get_calls_in_turn() -> None:
    told: dict[str, Any] = {"a": {}, "b": {}}
    sent = {name: Sent() for name in told}
    counts = Counter[str]()
    for call in range(20):
        counts[name := first(told, sent)] += 1
        sent[name].add(str(call), 1)
    assert counts == {"a": 10, "b": 10}


def test_an_end_that_is_told_twice_or_of_a_call_unknown_is_no_fault() -> None:
    sent = Sent()
    sent.add("call", 1)
    for call in ("call", "call", "other"):
        sent.remove(call)
    assert sent.calls == {} and sent.seconds(SHORT) == 0.5


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 12), st.floats(0, 4), st.integers(1, 5000)), max_size=12),
    st.floats(0, 1),
    st.lists(st.floats(0, 0.99), min_size=20, max_size=20),
    st.floats(3, 19),
)
def test_what_is_known_of_a_replica_is_what_counting_its_calls_has(
    drawn: list[tuple[float, float, int]], first: float, delays: list[float], asked: float
) -> None:
    """However tellings and calls cross: of what is not over, all that is named as it was told, the rest by its length."""
    lives = [(began, began + lasts, tokens) for began, lasts, tokens in drawn]
    heard, now = Told(), [0.0]
    sent = Sent(clock=lambda: now[0])

    def counted(at: float) -> dict[str, Ahead]:
        alive = {str(number): tokens for number, (began, ended, tokens) in enumerate(lives) if began <= at < ended}
        return {ticket: Ahead(2e-3 * tokens, 1.0) for ticket, tokens in alive.items()}

    events: list[tuple[float, Any]] = []
    for number, (began, ended, tokens) in enumerate(lives):
        events += [(began, partial(sent.add, str(number), tokens)), (ended, partial(sent.remove, str(number)))]
    for number, delay in enumerate(delays):
        at = first + number * TOLD_SECONDS
        events.append((at + delay, partial(heard.update, tell(counted(at), 1e-3, keeps_prefixes=True))))
    for now[0], happens in sorted((event for event in events if event[0] <= asked), key=lambda event: event[0]):
        happens()
    now[0] = asked
    named, alive = heard.get("calls", {}), counted(asked)
    unnamed = sum(1e-3 * lives[int(ticket)][2] for ticket in alive if ticket not in named)
    assert sent.seconds(heard) == pytest.approx(together(alive[each] for each in alive if each in named).seconds + unnamed)


def at_home(told: dict[str, Any], home: tuple[str, int], sent: dict[str, Sent] | None = None) -> str:
    replicas: Any = [SimpleNamespace(replica_id=name, routing_stats=each) for name, each in told.items()]
    queues: Any = sent or {name: Sent() for name in told}
    return str(by_work(replicas, queues, home)[0].replica_id)  # type: ignore[arg-type]


def test_a_prompt_goes_where_its_beginning_is_kept_unless_it_waits_there_longer_than_that_saves() -> None:
    """8 steps of 2,048 bytes are some 4,096 tokens, which take 4.1 s."""
    busy = SHORT | {"outstanding_seconds": 4.0, "keeps_prefixes": 1.0}
    idle = SHORT | {"outstanding_seconds": 0.0, "keeps_prefixes": 1.0}
    assert at_home({"a": busy, "b": idle}, ("a", 8)) == "a"
    assert at_home({"a": busy | {"outstanding_seconds": 4.2}, "b": idle}, ("a", 8)) == "b"
    assert at_home({"a": busy, "b": idle}, ("a", 1)) == "b"


def test_where_no_prefixes_are_kept_or_the_replica_is_gone_work_alone_counts() -> None:
    told = {"a": SHORT | {"keeps_prefixes": 0.0}, "b": SHORT | {"outstanding_seconds": 0.1, "keeps_prefixes": 1.0}}
    assert at_home(told, ("a", 8)) == "b" == at_home(told, ("gone", 8))


def test_a_home_is_that_of_the_longest_beginning_that_was_seen_last() -> None:
    homes: Homes[str] = Homes()
    assert homes.find([b"1"]) is None
    homes.note([b"1", b"2", b"3"], "a")
    homes.note([b"1", b"4"], "b")
    assert homes.find([b"1", b"2", b"5"]) == ("a", 2)
    assert homes.find([b"1", b"6"]) == ("b", 1)
    assert homes.find([b"7"]) is homes.find([]) is None


def test_homes_are_bounded_and_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.routing.MOST_HOMES", 2)
    homes: Homes[str] = Homes()
    for mark in (b"1", b"2", b"3"):
        homes.note([mark], "a")
    assert [homes.find([mark]) is not None for mark in (b"1", b"2", b"3")] == [False, True, True]


@pytest.mark.parametrize(
    ("headers", "bytes"),
    [
        ([(b"content-length", b"4000")], 4000),
        ([], 0),
        ([(b"content-length", b"x")], 0),
        ([(b"content-length", b"9" * 5000)], int("9" * 20)),
    ],
)
def test_a_bodys_length_is_what_its_headers_say(headers: Any, bytes: int) -> None:
    call: Any = SimpleNamespace(args=(pickle.dumps(StreamingHTTPRequest({"headers": headers}, proxy_actor_name="a")),))
    assert body_bytes(headers_of(call)) == bytes
