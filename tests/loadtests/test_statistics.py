"""Statistics recover laws that samples were made by, and intervals hold as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from loadtests import capacity, measures, statistics
from loadtests.client import Outcome, Record
from loadtests.generator import Sent
from loadtests.scenario import Limit, ServiceLevel

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


def test_a_distribution_keeps_every_sample_to_three_digits() -> None:
    samples = np.random.default_rng(1).lognormal(-4, 2, 3000)
    kept = measures.distribution(samples).values()
    assert len(kept) == 3000
    assert np.allclose(kept, np.sort(samples), rtol=1e-3, atol=1e-6)


def test_no_samples_make_an_empty_distribution() -> None:
    assert len(measures.distribution([]).values()) == 0
    assert measures.quantile(np.empty(0), 0.5) is None


@pytest.mark.parametrize("count", [499, 500])
def test_a_p99_is_told_from_500_samples_on(count: int) -> None:
    samples = np.ones(count)
    assert (measures.quantile(samples, 0.99) is None) == (count < 500)
    assert measures.quantile(samples, 0.95) == 1.0


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found_within_its_interval(power: float) -> None:
    rng = np.random.default_rng(2)
    cells = [1e-6 * n**power * rng.lognormal(0, 0.05, (3, 40)) for n in LENGTHS]
    found = statistics.exponent(
        LENGTHS, [float(np.median(each)) for each in cells], np.stack([statistics.medians(list(c), rng) for c in cells], axis=1)
    )
    assert found.low <= power <= found.high
    assert found.high - found.low < 0.05


def test_the_interval_of_a_median_holds_it_about_as_often_as_it_says() -> None:
    """Repeats that differ among themselves, as on a disturbed machine: an interval from pooled samples would miss it often."""
    rng = np.random.default_rng(3)
    held = pooled = 0
    for _ in range(100):
        repeats = [rng.normal(10 + shift, 1.0, 50) for shift in rng.normal(0, 0.5, 8)]
        draws = statistics.medians(repeats, rng, 300)
        held += np.quantile(draws, 0.025) <= 10 <= np.quantile(draws, 0.975)
        draws = statistics.medians([np.concatenate(repeats)], rng, 300)
        pooled += np.quantile(draws, 0.025) <= 10 <= np.quantile(draws, 0.975)
    assert held >= 80 > pooled


def test_resampled_medians_are_those_of_a_plain_loop() -> None:
    """One repeat: the mean and spread of a bootstrap written out by hand, within what its own chance leaves open."""
    samples = np.random.default_rng(4).exponential(1.0, 25)
    draws = statistics.medians([samples], np.random.default_rng(5), 4000)
    rng = np.random.default_rng(6)
    plain = np.array([np.median(rng.choice(samples, 25)) for _ in range(4000)])
    assert draws.mean() == pytest.approx(plain.mean(), abs=5 * plain.std() / np.sqrt(4000))
    assert draws.std() == pytest.approx(plain.std(), rel=0.1)


def test_repeats_of_different_size_keep_their_medians_apart_from_the_padding() -> None:
    draws = statistics.medians([np.ones(3), np.ones(50)], np.random.default_rng(7))
    assert np.all(draws == 1.0)


def test_a_crossover_is_found_where_two_laws_meet() -> None:
    quadratic = np.array([1e-8 * n * n for n in LENGTHS])
    linear = np.array([4e-5 * n for n in LENGTHS])  # equal at 4,000
    noise = np.random.default_rng(8).lognormal(0, 0.02, (500, 6))
    found = statistics.crossover(LENGTHS, quadratic, linear, quadratic * noise, linear * noise[::-1])
    assert found.tokens is not None and found.tokens.low <= 4000 <= found.tokens.high
    assert found.tokens.value == pytest.approx(4000, rel=0.02)
    assert found.certainty == 1.0


def test_a_second_that_is_always_or_never_faster_has_no_crossover() -> None:
    one, draws = np.ones(6), np.ones((100, 6))
    assert statistics.crossover(LENGTHS, one, one / 2, draws, draws / 2) == statistics.Crossover(None, True, 1.0)
    assert statistics.crossover(LENGTHS, one, one * 2, draws, draws * 2) == statistics.Crossover(None, False, 1.0)


def test_a_steady_growth_is_found_through_jumps_of_single_readings() -> None:
    seconds = np.arange(0.0, 600.0, 5.0)
    values = 1e8 + 1000 * seconds
    values[::17] += 5e6
    found = statistics.growth(seconds.tolist(), values.tolist())
    assert found.low <= 1000 <= found.high
    assert found.value == pytest.approx(1000, rel=0.05)


def test_wilson_s_interval_is_the_textbook_s() -> None:
    found = statistics.wilson(95, 100)  # Newcombe 1998's formula
    z, p, n = 1.959964, 0.95, 100
    middle, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half), abs=1e-6)


def record(latency: float, tokens: int = 100, first: float | None = None, outcome: Outcome = Outcome.OK) -> Record:
    found = Record("requests", 0, intended=10.0, sent=10.0, done=10.0 + latency, outcome=outcome, prompt_tokens=tokens)
    found.first = None if first is None else 10.0 + first
    return found


def test_a_request_is_good_by_a_bound_that_grows_with_its_length() -> None:
    level = ServiceLevel(latency=Limit(seconds=0.1, seconds_per_token=0.001), first_token=Limit(seconds=0.05))
    assert measures.is_good(record(0.19, 100, first=0.04), level)
    assert not measures.is_good(record(0.21, 100, first=0.04), level)
    assert measures.is_good(record(0.21, 200, first=0.04), level)
    assert not measures.is_good(record(0.19, 100, first=0.06), level)
    assert not measures.is_good(record(0.19, 100), level)
    assert not measures.is_good(record(0.0, 100, first=0.0, outcome=Outcome.REFUSED), level)


def test_latency_counts_from_the_intended_send_and_what_the_generator_was_late_is_told_apart() -> None:
    late = Record("requests", 0, intended=10.0, sent=10.5, done=11.0, outcome=Outcome.OK)
    found = measures.measure("requests", [late] * 30, None)
    assert found.latency.values()[0] == pytest.approx(1.0, rel=1e-3)
    assert found.latency_from_send.values()[0] == pytest.approx(0.5, rel=1e-3)
    gates = {gate.name: gate.passed for gate in measures.gates(found, True, Sent([], []))}
    assert not gates["sent on time"]


def test_requests_that_were_not_sent_break_the_intended_rate() -> None:
    sent = [record(0.1) for _ in range(30)]
    for place, each in enumerate(sent):
        each.intended = each.sent = 10.0 + place
    sent[3].outcome = Outcome.NOT_SENT
    gates = {gate.name: gate.passed for gate in measures.gates(measures.measure("requests", sent, None), True, Sent([], []))}
    assert gates == {"sent on time": True, "undisturbed by lag": True, "at the intended rate": False}


@pytest.mark.parametrize("limit", [0.7, 3.0, 40.0])
async def test_the_search_ends_within_its_precision_of_the_true_limit(limit: float) -> None:
    async def attempt(rate: float, _: int) -> tuple[int, int]:
        return (100, 100) if rate <= limit else (50, 100)

    probes, found = await capacity.search(attempt, 2.0, 0.95, 0.1, 20)
    assert found is not None and found <= limit <= found * 1.1 * 1.001
    assert all(probe.kept == (probe.rate <= limit) for probe in probes)


async def test_a_level_that_is_never_kept_ends_the_search_with_none() -> None:
    async def attempt(_: float, __: int) -> tuple[int, int]:
        return 0, 100

    probes, found = await capacity.search(attempt, 2.0, 0.95, 0.1, 20)
    assert found is None and len(probes) == 7


async def test_an_undecided_probe_is_tried_again_and_then_says_that_it_is_undecided() -> None:
    calls = []

    async def attempt(rate: float, number: int) -> tuple[int, int]:
        calls.append((rate, number))
        return (96, 100) if rate <= 2.0 else (10, 100)

    probes, found = await capacity.search(attempt, 2.0, 0.95, 0.9, 2)
    assert calls == [(2.0, 0), (2.0, 1), (4.0, 2)]
    assert [(each.count, each.decided) for each in probes] == [(200, False), (100, True)]
    assert found == 2.0
