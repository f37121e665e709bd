"""Prompt lookup: guesses of the tokens to come, taken from the text itself and looked over by the model in one step.

Code, logs and answers about a text repeat what has been said. Where the last `ngram` tokens of a text stand in it once before,
what followed there is likely to follow here (Saxena, "Prompt lookup decoding", 2023; LLMA, Yang et al., arXiv 2304.04487).
No second model is asked. A step answers the guess and the token before it, row by row as plain steps would (`attention.steps`);
each row is drawn by its own place's number, and what was drawn is handed out as far as the guess was right, and one token
more. So an answer is the same with and without: the same logits, the same numbers, the same tokens.

How long a guess is follows from what it has been worth: `chance`, with which a guessed token of this sample is right, against
`price`, what its row adds to a step in parts of what the step's own token takes. A guess of d tokens pays while
chance^d > price; where one token does not, none is guessed, and what was seen is forgotten until one is tried again. The price
is asked for where there is a hint, and a hint is looked for the seldomer the more often there was none: text that never repeats
takes no time, nor does text that repeats where no guess pays.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

FIRST_CHANCE = 0.8  # before anything was seen; it counts as much as one guess
KEPT = 0.9  # of what was seen, at the next guess
KEPT_IDLE = 0.96  # at each hint that was not worth it
MOST_CHANCE = 0.99
MOST_PASSED = 8  # tokens until the next try, where the last hint was not worth it, or the last searches found none
Tokens = Callable[[int, int], "array[int]"]
"""(start, end) -> the text's tokens at these positions."""


class Lookup:
    """The guesses of one sample."""

    def __init__(self) -> None:
        self._right = 0.0  # tokens lately
        self._wrong = 0.0  # guesses lately that ended with a wrong one
        self._back = 0  # to what was repeated last
        self._in_vain = 0  # searches since one found something, at most MOST_PASSED
        self._next = 0  # length of the text before which nothing is tried

    @property
    def chance(self) -> float:
        """With which a guessed token is right when those before it were."""
        return min(MOST_CHANCE, (self._right + FIRST_CHANCE) / (self._right + self._wrong + 1))

    def guess(self, tokens: Tokens, length: int, ngram: int, most: int, price: Callable[[], float]) -> array[int]:
        """Up to `most` tokens that may follow a text of `length`; none where nothing hints at them, or it does not pay."""
        if most <= 0 or length <= ngram or length < self._next or not self._has_hint(tokens, length, ngram):
            return array("i")
        if (count := min(most, self._worth(price()))) <= 0:
            self._remember(KEPT_IDLE)
            self._next = length + MOST_PASSED
            return array("i")
        source = tokens(length - self._back, length)[:count] if self._back < count else tokens(length - self._back, length)
        return array("i", (source[i % len(source)] for i in range(count)))

    def _has_hint(self, tokens: Tokens, length: int, ngram: int) -> bool:
        """Whether the text's last tokens stand in it before: `_back` tells where."""
        last = tokens(length - ngram, length)
        if 0 < self._back <= length - ngram and tokens(length - ngram - self._back, length - self._back) == last:
            return True
        found = find(tokens(0, length), ngram)
        self._back = 0 if found is None else length - found
        self._in_vain = min(self._in_vain + 1, MOST_PASSED) if found is None else 0
        self._next = length + self._in_vain
        return found is not None

    def learn(self, guessed: int, right: int) -> None:
        """A guess of so many tokens was looked over, and the first `right` of them were."""
        self._remember(KEPT)
        self._right += right
        self._wrong += right < guessed

    def _worth(self, price: float) -> int:
        return int(math.log(price) / math.log(self.chance)) if 0 < price < 1 else 0

    def _remember(self, kept: float) -> None:
        self._right, self._wrong = kept * self._right, kept * self._wrong


def find(text: array[int], ngram: int) -> int | None:
    """The position behind the latest earlier occurrence of a text's last `ngram` tokens; None where there is none."""
    tokens: NDArray[np.int32] = np.frombuffer(text, dtype=np.int32)
    last = tokens[-ngram:]
    ends = np.flatnonzero(tokens[ngram - 1 : -1] == last[-1]) + ngram - 1
    for back in range(1, ngram):
        if not len(ends):
            return None
        ends = ends[tokens[ends - back] == last[-1 - back]]
    return int(ends[-1]) + 1 if len(ends) else None
