"""Needles: a key and a value said early, the value asked for late. How long-range recall is trained and measured."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

WORDS = """
    amber birch cedar coral delta ember fable flint garnet hazel indigo ivory jasper juniper kestrel lagoon lantern linden
    maple marble meadow mesa nectar nickel ochre onyx opal orchid pebble pine plover quartz raven ridge river rowan saffron
    sable sierra slate spruce summit tundra umber velvet violet walnut willow
""".split()

Encode = Callable[[str], list[int]]


def draw(rng: np.random.Generator) -> tuple[str, str]:
    """A key and a value, each of two words: the value follows its key at once, so what recalls it is plain induction."""
    first, second, third, fourth = rng.choice(WORDS, 4)
    return f"{first}_{second}", f"{third}_{fourth}"


def statement(key: str, value: str) -> str:
    return f"\n# remember: {key} {value}\n"


def question(key: str) -> str:
    return f"\n# recall: {key}"


def weave(tokens: np.ndarray, length: int, rng: np.random.Generator, encode: Encode) -> tuple[np.ndarray, np.ndarray]:
    """`length` tokens of the stream `tokens` with needles and their questions set in: one pair up to one for 64 tokens.

    Returns:
        (tokens int64 (length,), whether each is part of an answer, bool (length,)).
    """
    count = round((length / 64) ** rng.random())  # few and many alike, evenly in the logarithm
    pairs = dict(draw(rng) for _ in range(count))
    pieces: list[tuple[float, list[int], list[bool]]] = []  # (place in 0..1, tokens, which are the answer)
    for key, value in pairs.items():
        told, asked = np.sort(
            rng.random(2) ** (1.0, 0.25)
        )  # most are asked for late: distances up to the whole text are common
        said, query, answer, end = (encode(part) for part in (statement(key, value), question(key), f" {value}", "\n"))
        pieces.append((told, said, [False] * len(said)))
        pieces.append((asked, query + answer + end, [False] * len(query) + [True] * len(answer) + [False] * len(end)))
    pieces.sort(key=lambda piece: piece[0])
    text = tokens[: length - sum(len(piece) for _, piece, _ in pieces)].tolist()
    woven: list[int] = []
    answers: list[bool] = []
    done = 0
    for place, piece, marks in [*pieces, (1.0, [], [])]:
        upto = int(place * len(text))
        woven += text[done:upto] + piece
        answers += [False] * (upto - done) + marks
        done = upto
    return np.asarray(woven, dtype=np.int64), np.asarray(answers)
