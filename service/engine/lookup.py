"""Prompt lookup: guesses of the tokens to come, taken from the text itself and looked over by the model in one step.

Code, logs and answers about a text repeat what has been said. Where the last `ngram` tokens of a text stand in it once before,
what followed there is likely to follow here (Saxena, "Prompt lookup decoding", 2023; LLMA, Yang et al., arXiv 2304.04487).
No second model is asked. A step answers the guess and the token before it, row by row as plain steps would (`attention.steps`);
each row is drawn by its own place's number, and what was drawn is handed out as far as the guess was right, and one token
more. So an answer is the same with and without: the same logits, the same numbers, the same tokens.

How long a guess is follows from what it has been worth: `chance`, with which a guessed token of this sample is right, against
`price`, what its row adds to a step in parts of what the step's own token takes. A guess of d tokens pays while
chance^d > price; where one token does not, none is guessed, and what was seen is forgotten until one is tried again.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

FIRST_CHANCE = 0.8  # before anything was seen; it counts as much as one guess
KEPT = 0.9  # of what was seen, at the next guess
KEPT_IDLE = 0.99  # at each token that might have been guessed, and was not worth it
MOST_CHANCE = 0.99
Tokens = Callable[[int, int], "array[int]"]
"""(start, end) -> the text's tokens at these positions."""


class Lookup:
    """The guesses of one sample."""

    def __init__(self) -> None:
        self._right = 0.0  # tokens lately
        self._wrong = 0.0  # guesses lately that ended with a wrong one
        self._back = 0  # to what was repeated last

    @property
    def chance(self) -> float:
        """With which a guessed token is right when those before it were."""
        return min(MOST_CHANCE, (self._right + FIRST_CHANCE) / (self._right + self._wrong + 1))

    def guess(self, tokens: Tokens, length: int, ngram: int, most: int, price: float) -> array[int]:
        """Up to `most` tokens that may follow a text of `length`; none where nothing hints at them, or it does not pay."""
        count = min(most, self._worth(price)) if most > 0 else 0
        if count <= 0 or length <= ngram:
            if most > 0:
                self._remember(KEPT_IDLE)
            return array("i")
        last = tokens(length - ngram, length)
        if not (0 < self._back <= length - ngram and tokens(length - ngram - self._back, length - self._back) == last):
            self._back = length - found if (found := find(tokens(0, length), ngram)) else 0
        if not self._back:
            return array("i")
        source = tokens(length - self._back, length)[:count] if self._back < count else tokens(length - self._back, length)
        return array("i", (source[i % len(source)] for i in range(count)))

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
        ends = ends[tokens[ends - back] == last[-1 - back]]
    return int(ends[-1]) + 1 if len(ends) else None
