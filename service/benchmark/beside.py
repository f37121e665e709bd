"""A decode step of the embedded model's shape beside llama.cpp's at equal bits: `python -m service.benchmark --beside`.

Random weights, the same for both, with two key-value heads as shipped and with four; llama.cpp in BF16 and Q8_0, with its flash
attention and without, its own defaults else, on as many threads. Each reads a text once, pauses at every length, and there all
take their steps in turns. Each is told in parts of the faster of llama.cpp's two.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from service.benchmark.bare import BACKENDS, report
from service.benchmark.fewer import ROOM, Contestants, Ours, has_peer, peers, write

ROUNDS = 5
PEERS = {"bf16": "BF16", "int8": "Q8_0"}


def measure_beside(lengths: Sequence[int], groups: Sequence[int]) -> dict[str, dict[str, float]]:
    """Decode seconds by contestant, key-value heads and length. ValueError where llama.cpp is not installed."""
    if not has_peer():
        raise ValueError("llama.cpp is not installed: pip install llama-cpp-python gguf")
    found: dict[str, dict[str, float]] = {}
    for heads in groups:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), {"num_key_value_heads": heads, "max_position_embeddings": max(lengths) + ROOM})
            rivals = {bits: contestants(Path(folder), bits, max(lengths)) for bits in PEERS}
            made = {bits: {name: make() for name, make in own.items()} for bits, own in rivals.items()}
            for length in sorted(lengths):
                told = f"{heads} kv heads, behind {length} tokens"
                for own in made.values():
                    for each in own.values():
                        each.read(length)
                steps: dict[str, list[float]] = {}
                for _ in range(ROUNDS):
                    for own in made.values():
                        for name, each in own.items():
                            steps.setdefault(name, []).append(each.step())
                for own in made.values():
                    theirs = min(median(steps[name]) for name, each in own.items() if not isinstance(each, Ours))
                    for name in own:
                        found.setdefault(name, {})[told] = step = median(steps[name])
                        report(told, name, f"{step * 1e3:6.2f} ms, {theirs / step:5.2f}x")
    return found


def contestants(directory: Path, bits: str, longest: int) -> Contestants:
    """Ours by backend, and theirs."""
    ours: Contestants = {f"{name} {bits}": lambda name=name: Ours(directory, bits, longest, name) for name in BACKENDS}  # type: ignore[misc]
    return ours | peers(directory, PEERS[bits], longest)
