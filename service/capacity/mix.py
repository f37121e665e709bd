"""What callers ask for: how long prompts and answers are, and how often each comes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FORM = "PROMPT:ANSWER[@WEIGHT], tokens and a weight, which is 1 where none is told"


@dataclass(frozen=True)
class Lengths:
    """One call's prompt and answer, in tokens; so many are drawn, and so many are reserved."""

    prompt: int
    answer: int


@dataclass(frozen=True)
class Mix:
    """Lengths by weight."""

    weights: tuple[tuple[Lengths, float], ...]

    def draw(self, count: int, seed: int) -> list[Lengths]:
        """So many calls, independent of each other; the same for the same seed, whatever the rate."""
        lengths, weights = zip(*self.weights, strict=True)
        return random.Random(seed).choices(lengths, weights, k=count)

    def mean(self) -> Lengths:
        """Rounded to tokens."""
        total = sum(weight for _, weight in self.weights)
        prompt = sum(each.prompt * weight for each, weight in self.weights) / total
        return Lengths(round(prompt), round(sum(each.answer * weight for each, weight in self.weights) / total))

    @property
    def longest(self) -> Lengths:
        """The call that asks for most tokens together."""
        return max((lengths for lengths, _ in self.weights), key=lambda each: each.prompt + each.answer)

    @classmethod
    def parse(cls, text: str) -> Mix:
        """`2048:128@0.8,16384:256@0.2`. Raises ValueError naming the part at fault."""
        return cls(tuple(_part(part.strip()) for part in text.split(",")))

    @classmethod
    def read(cls, path: Path) -> Mix:
        """A file with a pair on each line, each as likely as the next: prompt and answer, apart by comma or space.

        Raises:
            ValueError: a line that is none, or no line.
        """
        lines = [line.replace(",", " ").split() for line in path.read_text().splitlines() if line.strip()]
        try:
            pairs = [(Lengths(*map(_positive, line)), 1.0) for line in lines]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: each line must hold a prompt's and an answer's tokens: {error}") from None
        if not pairs:
            raise ValueError(f"{path}: holds no pair of lengths")
        return cls(tuple(pairs))


def _part(part: str) -> tuple[Lengths, float]:
    lengths, _, weight = part.partition("@")
    try:
        prompt, answer = map(_positive, lengths.split(":"))
        share = float(weight) if weight else 1.0
        if not 0 < share < float("inf"):
            raise ValueError
    except ValueError:
        raise ValueError(f"lengths must be {FORM}, received {part!r}") from None
    return Lengths(prompt, answer), share


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(f"{number} is below 1")
    return number


def gaps(count: int, seed: int) -> Sequence[float]:
    """So many times between two calls in units of the mean one, exponential: calls come as a Poisson process."""
    draw = random.Random(f"gaps {seed}")
    return [draw.expovariate(1.0) for _ in range(count)]
