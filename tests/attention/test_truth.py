"""The served-truth check: how long its input is, and what it says it did not cover."""

from __future__ import annotations

import pytest

from attention import HeadShape, build, names, result, truth
from attention.memory import peak_bytes

SHAPE = HeadShape(2, 1, 16)
WIDE = [("sliding_window", {"window": 1 << 20}), ("bigbird", {"block": 1 << 20}), ("chunked", {"chunk": 1 << 20})]


@pytest.mark.parametrize(("name", "options"), WIDE)
@pytest.mark.parametrize("max_length", [1, 2, 30, 500])
def test_a_pattern_wider_than_the_models_context_is_checked_over_that_and_no_further(
    name: str, options: dict[str, int], max_length: int
) -> None:
    backend = build(name, options, SHAPE)
    verdict = truth.check(backend, max_length=max_length)
    assert verdict.passed and not verdict.uncovered
    assert peak_bytes(lambda: truth.check(backend, max_length=max_length)) < 32 << 20  # a million tokens' q alone is 128 MiB


def test_a_pattern_wider_than_the_cap_says_what_was_not_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "MOST", 300)
    backend = build("sliding_window", {"window": 400, "sinks": 0}, SHAPE)
    verdict = truth.check(backend, max_length=1000)
    assert verdict.passed
    assert verdict.uncovered == "the pattern reaches 401 tokens, 300 were checked: what lies beyond is unchecked"
    assert not truth.check(backend, max_length=300).uncovered
    assert not truth.check(build("sliding_window", {"window": 200}, SHAPE), max_length=1000).uncovered


def test_a_mask_that_is_wrong_from_a_late_token_on_is_still_found(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = build("sliding_window", {"window": 300, "sinks": 0}, SHAPE)
    monkeypatch.setattr(type(backend), "visible", lambda self, i, j, length: (i - j).abs() <= 299)
    assert not truth.check(backend, max_length=1000).passed
    assert truth.check(backend, max_length=300).passed  # no such sequence shows the difference


@pytest.mark.parametrize("name", names())
def test_a_check_in_parts_finds_what_the_whole_one_finds(name: str) -> None:
    backend = build(name, {}, SHAPE)
    if True not in backend.directions:
        pytest.skip("serves nothing")
    found = result(truth.checking(backend, max_length=500))
    assert found.passed and found.error <= truth.check(backend, max_length=500).error


def test_a_check_in_parts_finds_a_wrong_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = build("sliding_window", {"window": 300, "sinks": 0}, SHAPE)
    monkeypatch.setattr(type(backend), "visible", lambda self, i, j, length: (i - j).abs() <= 299)
    assert not result(truth.checking(backend, max_length=1000)).passed
