"""When requests are sent: offsets in seconds from the beginning of a block, drawn before it runs.

The law of each is stated and tested; a schedule depends on the seed alone, never on how the server answers.
"""

from __future__ import annotations

import numpy as np

from loadtests.scenario import Constant, Gamma, OnOff, Poisson

Open = Constant | Poisson | Gamma | OnOff


def draw(arrivals: Open, seconds: float, rng: np.random.Generator) -> tuple[float, ...]:
    """Ascending send times below `seconds`."""
    if isinstance(arrivals, Constant):
        return tuple((np.arange(int(np.ceil(seconds * arrivals.rate - 1e-9))) / arrivals.rate).tolist())
    if isinstance(arrivals, OnOff):
        return _on_off(arrivals, seconds, rng)
    shape = 1.0 if isinstance(arrivals, Poisson) else arrivals.variation**-2
    return tuple(_renewals(shape, arrivals.rate, seconds, rng).tolist())


def draw_count(rate: float, count: int, rng: np.random.Generator) -> tuple[float, ...]:
    """`count` Poisson arrivals, the first at once."""
    gaps = rng.exponential(1 / rate, count)
    return tuple((np.cumsum(gaps) - gaps[0]).tolist())


def _renewals(shape: float, rate: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Arrivals whose gaps are gamma of this shape and of mean 1/rate; shape 1 is the exponential."""
    times = np.empty(0)
    while not len(times) or times[-1] < seconds:
        gaps = rng.gamma(shape, 1 / (shape * rate), max(64, int(1.2 * rate * seconds)))
        times = np.concatenate([times, np.cumsum(gaps) + (times[-1] if len(times) else 0.0)])
    return times[times < seconds]


def _on_off(arrivals: OnOff, seconds: float, rng: np.random.Generator) -> tuple[float, ...]:
    """Poisson arrivals on the clock of the on-phases alone, then stretched by the silences between them."""
    period = arrivals.on_seconds + arrivals.off_seconds
    whole, rest = divmod(seconds, period)
    busy = _renewals(1.0, arrivals.rate, whole * arrivals.on_seconds + min(rest, arrivals.on_seconds), rng)
    return tuple((busy + np.floor(busy / arrivals.on_seconds) * arrivals.off_seconds).tolist())
