"""What is still to be done, and how long that takes: prefills one by one, decodes side by side. No torch: proxies ask it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Ahead(NamedTuple):
    """Predicted seconds of one job, or of several together."""

    prefill: float = 0.0
    decode: float = 0.0

    @property
    def seconds(self) -> float:
        return self.prefill + self.decode


def together(works: Iterable[tuple[float, float]]) -> Ahead:
    """Of all of them."""
    prefill = decode = 0.0
    for one, other in works:
        prefill += one
        decode = max(decode, other)
    return Ahead(prefill, decode)
