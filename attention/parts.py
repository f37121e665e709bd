"""A computation in parts of about a millisecond, between which its caller may do something more urgent."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")
Parts = Iterator[None]  # each step does a part, the last one ends it


def finish(parts: Parts) -> None:
    """Run a computation to its end without a pause."""
    deque(parts, maxlen=0)


def result(parts: Generator[None, None, T]) -> T:
    """What a computation returns that is run to its end without a pause."""
    while True:
        try:
            next(parts)
        except StopIteration as end:
            found: T = end.value
            return found


def spread(start: int, end: int, block: int) -> Iterator[tuple[int, int]]:
    """(first, last) of the consecutive blocks that cover start..end."""
    for first in range(start, end, block):
        yield first, min(first + block, end)
