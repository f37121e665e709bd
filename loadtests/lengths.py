"""Input lengths, drawn. The presets are log-normal fits of published traces' inputs (Azure LLM inference 2023, Mooncake)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from loadtests.scenario import FixedLength, ListedLengths, LogNormalLengths, Preset

PRESETS: Mapping[Preset, tuple[float, float]] = {
    "azure_code": (7.00, 1.36),
    "azure_conversation": (6.63, 0.99),
    "mooncake_conversation": (8.74, 1.20),
}
"""Mean and standard deviation of the natural logarithm of an input's tokens."""


@dataclass(frozen=True)
class Drawn:
    """Lengths in tokens, and the share of them that had to be clipped to the allowed range."""

    tokens: tuple[int, ...]
    clipped_share: float


def draw(lengths: FixedLength | ListedLengths | LogNormalLengths, count: int, limit: int, rng: np.random.Generator) -> Drawn:
    """`count` lengths of at most `limit` tokens.

    Fixed and listed lengths are taken as they are, even beyond `limit`: the server's refusal is then the measurement.
    """
    if isinstance(lengths, FixedLength):
        return Drawn((lengths.tokens,) * count, 0.0)
    if isinstance(lengths, ListedLengths):
        return Drawn(tuple(int(each) for each in rng.choice(lengths.tokens, count)), 0.0)
    mean, deviation = law(lengths)
    wanted = np.rint(rng.lognormal(mean, deviation, count))
    kept = np.clip(wanted, min(lengths.minimum, limit), min(lengths.maximum or limit, limit))
    return Drawn(tuple(int(each) for each in kept), float(np.mean(kept != wanted)) if count else 0.0)


def law(lengths: LogNormalLengths) -> tuple[float, float]:
    """Mean and standard deviation of the logarithm."""
    if lengths.preset is not None:
        return PRESETS[lengths.preset]
    assert lengths.ln_mean is not None and lengths.ln_sd is not None, "the scenario wants both or a preset"
    return lengths.ln_mean, lengths.ln_sd


def name(lengths: FixedLength | ListedLengths | LogNormalLengths) -> str:
    """How a table calls these lengths."""
    if isinstance(lengths, FixedLength):
        return str(lengths.tokens)
    if isinstance(lengths, ListedLengths):
        return "/".join(str(each) for each in lengths.tokens)
    return lengths.preset or f"lognormal({lengths.ln_mean:g},{lengths.ln_sd:g})"
