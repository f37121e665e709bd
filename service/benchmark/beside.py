"""A decode step of the embedded model's shape beside llama.cpp's at equal bits: `python -m service.benchmark --beside`.

Random weights, the same for both, with two key-value heads as shipped and with four; llama.cpp in BF16 and Q8_0, its own
defaults else, on as many threads. Each reads a text once, pauses at every length, and there all take their steps in turns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from service.benchmark.bare import BACKENDS, report
from service.benchmark.fewer import Ours, Theirs, has_peer, write

ROUNDS = 5
PEERS = {"bf16": "BF16", "int8": "Q8_0"}


def measure_beside(lengths: Sequence[int], groups: Sequence[int] = (2, 4)) -> dict[str, dict[str, float]]:
    """Decode seconds by contestant, key-value heads and length. ValueError where llama.cpp is not installed."""
    if not has_peer():
        raise ValueError("llama.cpp is not installed: pip install llama-cpp-python gguf")
    found: dict[str, dict[str, float]] = {}
    for heads in groups:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), {"num_key_value_heads": heads})
            made = {name: make() for name, make in contestants(Path(folder), max(lengths)).items()}
            for length in sorted(lengths):
                for each in made.values():
                    each.read(length)
                steps: dict[str, list[float]] = {name: [] for name in made}
                for _ in range(ROUNDS):
                    for name, each in made.items():
                        steps[name].append(each.step())
                for name, own in steps.items():
                    theirs = median(steps[f"llama.cpp {PEERS[name.split()[-1]]}" if isinstance(made[name], Ours) else name])
                    found.setdefault(name, {})[f"{heads} heads, {length}"] = step = median(own)
                    report(f"{heads} kv heads, behind {length} tokens", name, f"{step * 1e3:6.2f} ms, {theirs / step:5.2f}x")
    return found


def contestants(directory: Path, longest: int) -> dict[str, Callable[[], Ours | Theirs]]:
    """Ours by backend and bits, theirs by bits."""
    made: dict[str, Callable[[], Ours | Theirs]] = {}
    for bits, kind in PEERS.items():
        for name in BACKENDS:
            made[f"{name} {bits}"] = lambda bits=bits, name=name: Ours(directory, bits, longest, name)  # type: ignore[misc]
        made[f"llama.cpp {kind}"] = lambda kind=kind: Theirs(directory, kind, longest)  # type: ignore[misc]
    return made
