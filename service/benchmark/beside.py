"""A decode step of the embedded model's shape beside llama.cpp's at equal bits: `python -m service.benchmark --beside`.

Random weights, the same for both, with two key-value heads as shipped and with four; llama.cpp in BF16 and Q8_0, with its flash
attention and without, its own defaults else, on as many threads. At every length all take their steps in turns, each told in
parts of the faster of llama.cpp's two at its bits. Ours read their text up to there; of llama.cpp's, which take longer, those
of BF16 do, and the others take it over.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from service.benchmark.bare import BACKENDS, report
from service.benchmark.fewer import PEERS, ROOM, Ours, has_peer, peers, write

ROUNDS = 5
BITS = ("bf16", "int8")


def measure_beside(lengths: Sequence[int], groups: Sequence[int]) -> dict[str, dict[str, float]]:
    """Decode seconds by contestant, key-value heads and length. ValueError where llama.cpp is not installed."""
    if not has_peer():
        raise ValueError("llama.cpp is not installed: pip install llama-cpp-python gguf")
    found: dict[str, dict[str, float]] = {}
    for heads in groups:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), {"num_key_value_heads": heads, "max_position_embeddings": max(lengths) + ROOM})
            sides = [Side(Path(folder), bits, max(lengths)) for bits in BITS]
            for length in sorted(lengths):
                for side in sides:
                    side.read(length, sides[0])
                for _ in range(ROUNDS):
                    for side in sides:
                        side.step()
                for side in sides:
                    told = f"{heads} kv heads, behind {length} tokens"
                    for name, (seconds, share) in side.steps().items():
                        found.setdefault(name, {})[told] = seconds
                        report(told, name, f"{seconds * 1e3:6.2f} ms, {share:5.2f}x")
    return found


class Side:
    """All that compute in some bits: ours by backend, llama.cpp without its flash attention and with it."""

    def __init__(self, directory: Path, bits: str, longest: int) -> None:
        self.ours = {f"{name} {bits}": Ours(directory, bits, longest, name) for name in BACKENDS}
        self.theirs = {name: make() for name, make in peers(directory, PEERS[bits], longest).items()}
        self._seconds: dict[str, list[float]] = {}

    def read(self, length: int, first: Side) -> None:
        """Have a text of so many tokens, llama.cpp by way of those of `first`."""
        for each in self.ours.values():
            each.read(length)
        for own, other in zip(self.theirs.values(), first.theirs.values(), strict=True):
            if own is other:
                own.read(length)
            else:
                own.take_over(other)
        self._seconds = {name: [] for name in (*self.ours, *self.theirs)}

    def step(self) -> None:
        """A turn of steps of each."""
        for name, each in (self.ours | self.theirs).items():
            self._seconds[name].append(each.step())

    def steps(self) -> dict[str, tuple[float, float]]:
        """Median seconds of a step of each, and how many times those the better of llama.cpp's takes."""
        seconds = {name: median(own) for name, own in self._seconds.items()}
        best = min(seconds[name] for name in self.theirs)
        return {name: (own, best / own) for name, own in seconds.items()}
