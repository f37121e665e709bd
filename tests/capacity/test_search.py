"""The highest rate that keeps a level, and what is named as short above it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from service.capacity import search
from service.capacity.fleet import Layout, Level
from service.capacity.mix import Lengths, Mix
from service.capacity.search import LOOKED_AT, PRECISION, Question, capacity, keeps, trial
from tests.capacity.sites import make_site

MIX = Mix.parse("300:10")
LEVEL = Level(0.5, 0.5, 0.95)
QUESTION = Question(MIX, LEVEL, calls=150)


def test_the_rate_found_keeps_the_level_and_one_a_little_higher_does_not() -> None:
    site = make_site(max_waiting_requests=10_000)
    found = capacity(site, Layout(2), QUESTION)
    assert found.kept is not None and found.broke is not None and found.bound == "time"
    assert found.broke.rate <= found.kept.rate * (1 + PRECISION)
    assert keeps(trial(site, Layout(2), QUESTION, found.kept.rate), LEVEL)
    assert not keeps(trial(site, Layout(2), QUESTION, found.broke.rate), LEVEL)


def test_twice_the_replicas_hold_twice_the_calls_or_somewhat_more() -> None:
    """Of so many calls: with 150 chance moves the rate by a third."""
    site = make_site(max_waiting_requests=10_000)
    one, two = (capacity(site, Layout(n, n), replace(QUESTION, calls=1000 * n)).kept for n in (1, 2))
    assert one is not None and two is not None
    assert 1.9 * one.rate <= two.rate <= 3 * one.rate


def test_a_run_too_short_to_break_a_level_is_told_by_its_growing_queue() -> None:
    """100 calls take less than a second, so that none of them waits for the 60 s that are allowed."""
    site = make_site(max_waiting_requests=10_000)
    found = capacity(site, Layout(1), Question(MIX, Level(60.0, 60.0, 0.95), calls=100))
    assert found.kept is not None and found.kept.utilisation > 0.5
    seconds = site.lanes["dense"].prefill_seconds(300)
    assert found.kept.rate < 1.2 / seconds


def test_a_full_queue_is_told() -> None:
    assert capacity(make_site(max_waiting_requests=1), Layout(1), QUESTION).bound == "queue"


def test_bytes_that_run_out_before_time_does_are_told() -> None:
    """A budget for two calls whose long answers take little of the time."""
    site = make_site(max_waiting_requests=10_000)
    needed = site.lanes["dense"].state_bytes(460) + site.lanes["dense"].course.prefill_bytes(460)
    small = make_site(budget=int(2.6 * needed), max_waiting_requests=10_000)
    found = capacity(small, Layout(1), Question(Mix.parse("60:400"), Level(2.0, 0.5, 0.95), calls=100))
    assert found.bound == "bytes"


def test_few_slots_are_told() -> None:
    found = capacity(
        make_site(max_sequences=1, max_waiting_requests=10_000),
        Layout(1),
        Question(Mix.parse("60:400"), Level(2.0, 0.5, 0.95), calls=100),
    )
    assert found.bound == "sequences"


@pytest.mark.parametrize(("mix", "level"), [("1500:10", Level(0.01, 0.5, 0.95)), ("2040:100", LEVEL)])
def test_a_level_that_no_rate_keeps_has_none(mix: str, level: Level) -> None:
    """Too short a time for one alone, and calls beyond the model's context, which are refused at any rate."""
    found = capacity(make_site(), Layout(1), Question(Mix.parse(mix), level, calls=50))
    assert (found.kept, found.bound) == (None, "length")


def test_what_few_replicas_keep_at_no_rate_many_are_not_tried_with(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(search, "trial", lambda *asked: tried.append(asked[1].replicas) or trial(*asked))
    found = capacity(make_site(), Layout(500), Question(Mix.parse("1500:10"), Level(0.01, 0.5, 0.95), calls=20))
    assert (found.kept, found.bound, found.layout) == (None, "length", Layout(500)) and set(tried) == {LOOKED_AT}


def test_lengths_are_read_from_words_and_from_files(tmp_path: Path) -> None:
    assert Mix.parse("2048:128@0.8, 16384:256@0.2").weights == ((Lengths(2048, 128), 0.8), (Lengths(16384, 256), 0.2))
    file = tmp_path / "pairs.csv"
    file.write_text("100,10\n200 20\n\n")
    assert Mix.read(file).weights == ((Lengths(100, 10), 1.0), (Lengths(200, 20), 1.0))
    assert Mix.read(file).mean() == Lengths(150, 15)


@pytest.mark.parametrize("text", ["", "100", "100:0", "0:1", "100:1@0", "100:1@-1", "100:1@inf", "100:1@nan", "a:b", "1:2:3"])
def test_lengths_that_are_none_are_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match="PROMPT:ANSWER"):
        Mix.parse(text)


@pytest.mark.parametrize("text", ["", "100\n", "100,10,1\n", "a,b\n", "-1,2\n"])
def test_a_file_without_pairs_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"pairs\.csv"):
        Mix.read(file)
