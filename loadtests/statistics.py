"""The statistics that numpy and scipy do not have in one call: resampling by repeats, growth by length, crossover.

A cell's samples come in repeats (blocks), and a disturbance of the machine concerns a whole repeat. So repeats are resampled
first, then the requests within each (a cluster bootstrap: Davison and Hinkley, 1997, section 3.8), and the intervals hold
for another run of the same scenario on the same machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

DRAWS = 1000
LEVEL = 0.95
MOST_SAMPLES = 1000  # of one repeat that are resampled: fewer than there are make the interval wider, never narrower


@dataclass(frozen=True)
class Interval:
    """An estimate with the interval that holds it at LEVEL."""

    value: float
    low: float
    high: float

    @property
    def excludes_one(self) -> bool:
        """Whether a ratio is told apart from no difference."""
        return not self.low <= 1.0 <= self.high


def medians(repeats: Sequence[np.ndarray], rng: np.random.Generator, draws: int = DRAWS) -> np.ndarray:
    """(draws,) medians of resamples of the repeats and of the samples within each. Every repeat must hold some."""
    few = [_thinned(np.asarray(each, float), rng) for each in repeats]
    counts = np.array([len(each) for each in few])
    resampled = np.full((draws, len(few), counts.max()), np.inf)  # sorted behind all samples where a repeat has fewer
    chosen = rng.integers(0, len(few), (draws, len(few)))
    for repeat, samples in enumerate(few):
        rows, places = np.nonzero(chosen == repeat)
        resampled[rows, places, : len(samples)] = rng.choice(samples, (len(rows), len(samples)))
    ordered = np.sort(resampled.reshape(draws, -1), axis=1)
    total, row = counts[chosen].sum(axis=1), np.arange(draws)
    return np.asarray((ordered[row, (total - 1) // 2] + ordered[row, total // 2]) / 2)


def _thinned(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return samples if len(samples) <= MOST_SAMPLES else rng.choice(samples, MOST_SAMPLES, replace=False)


def interval(value: float, draws: np.ndarray) -> Interval:
    """The percentile interval of resampled estimates."""
    low, high = np.quantile(draws[np.isfinite(draws)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(min(low, value)), float(max(high, value)))


def wilson(good: int, count: int) -> Interval:
    """The share of good ones among `count`, with Wilson's interval."""
    found = stats.binomtest(good, count).proportion_ci(LEVEL, "wilson")
    return Interval(good / count, float(found.low), float(found.high))


def exponent(lengths: Sequence[float], medians_of: Sequence[float], resampled: np.ndarray) -> Interval:
    """The power of length by which a cost grows: the slope of a straight line through the logarithms.

    Args:
        resampled: (draws, lengths), medians of resamples.
    """
    logs = np.log(lengths)
    slopes = np.polyfit(logs, np.log(resampled).T, 1)[0]
    return interval(float(np.polyfit(logs, np.log(medians_of), 1)[0]), slopes)


def slope(x: Sequence[float], y: Sequence[float]) -> Interval:
    """Least squares: y for one more x, with the interval of the fit (a single point off a line widens it)."""
    fit = stats.linregress(x, y)
    wide = fit.stderr * stats.t.ppf((1 + LEVEL) / 2, max(len(x) - 2, 1))
    return Interval(float(fit.slope), float(fit.slope - wide), float(fit.slope + wide))


def growth(seconds: Sequence[float], values: Sequence[float]) -> Interval:
    """Growth of a value a second by Theil and Sen's median of slopes, which single jumps do not move."""
    fit = stats.theilslopes(values, seconds, LEVEL)
    return Interval(float(fit.slope), float(fit.low_slope), float(fit.high_slope))


def variation(repeats: Sequence[np.ndarray]) -> float | None:
    """Standard deviation of the repeats' medians over their mean; None for one repeat."""
    if len(repeats) < 2:
        return None
    found = np.array([np.median(each) for each in repeats])
    return float(found.std(ddof=1) / found.mean())


@dataclass(frozen=True)
class Crossover:
    """From which length on the second of two is the faster. `tokens` None: it never is, or always (`always`)."""

    tokens: Interval | None
    always: bool
    certainty: float  # share of resamples that agree with that


def crossover(
    lengths: Sequence[float], first: np.ndarray, second: np.ndarray, first_draws: np.ndarray, second_draws: np.ndarray
) -> Crossover:
    """The length from which on `second` stays below `first`, between measured lengths by straight lines in logarithms.

    Args:
        first, second: (lengths,) medians. first_draws, second_draws: (draws, lengths) medians of resamples.
    """
    logs = np.log(lengths)
    found = _crossing(logs, np.log(second) - np.log(first))
    drawn = np.array([_crossing(logs, row) for row in np.log(second_draws) - np.log(first_draws)])
    if np.isinf(found):
        return Crossover(None, found < 0, float(np.mean(drawn == found)))
    held = drawn[np.isfinite(drawn)]
    return Crossover(
        interval(float(np.exp(found)), np.exp(held) if len(held) else np.exp([found])), False, len(held) / len(drawn)
    )


def _crossing(logs: np.ndarray, difference: np.ndarray) -> float:
    """Logarithm of the length behind which the difference stays negative; -inf: it always is, inf: not at the end."""
    if difference[-1] >= 0:
        return np.inf
    above = np.flatnonzero(difference >= 0)
    if not len(above):
        return -np.inf
    left = int(above[-1])
    share = difference[left] / (difference[left] - difference[left + 1])
    return float(logs[left] + share * (logs[left + 1] - logs[left]))
