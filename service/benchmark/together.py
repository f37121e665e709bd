"""Decode steps of many texts at once beside llama.cpp's own batches: `python -m service.benchmark --together`.

Random weights, the same for both, of the embedded model's shape and of Qwen3-0.6B's; bfloat16 under dense beside llama.cpp's
BF16, without its flash attention and with it, its own defaults else, on as many threads. So many texts are given a token each
in one step, until their logits are there, in turns. Ours is told beside the faster of llama.cpp's, and beside the roof: the
seconds of summing up as many bytes as a step reads, or of its products' flops at the rate of one large product, whichever takes
longer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import attention
from attention import Segments
from service.benchmark.bare import report, seconds_of
from service.benchmark.fewer import PEERS, ROOM, SHAPE, Theirs, has_peer, peers, write
from service.model import checkpoint
from service.model.continuation import extended

SHAPES: dict[str, dict[str, Any]] = {"embedded": {}, "0.6B": SHAPE}
BEHIND = 512  # tokens of each text
ROUNDS, STEPS = 5, 4
SQUARE = 4096  # of the large product


def measure_together(sizes: Sequence[int]) -> dict[str, dict[str, float]]:
    """Tokens a second by contestant, shape and number of texts. ValueError where llama.cpp is not installed."""
    if not has_peer():
        raise ValueError("llama.cpp is not installed: pip install llama-cpp-python gguf")
    found: dict[str, dict[str, float]] = {}
    for shape, changes in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), changes | {"max_position_embeddings": BEHIND + ROOM})
            made = peers(Path(folder), PEERS["bf16"], BEHIND, texts=max(sizes))
            theirs, ours = {name: make() for name, make in made.items()}, Texts(Path(folder))
            for each in theirs.values():
                each.read(BEHIND)
                each.repeat(max(sizes))
            for size in sorted(sizes, reverse=True):  # those that stay go on
                ours.begin(size)
                told = f"{shape}, {size} texts of {BEHIND} tokens"
                seconds = in_turns({"ours": ours.step} | {name: _steps(each, size) for name, each in theirs.items()})
                best, roof = min(seconds[name] for name in theirs), ours.roof_seconds()
                for name, own in seconds.items():
                    found.setdefault(name, {})[told] = size / own
                    shares = f"{best / own:5.2f}x" + f", {roof / own:.0%} of the roof" * (name == "ours")
                    report(told, name, f"{size / own:8.0f} tokens/s, {shares}")
    return found


def in_turns(steps: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of a step of each, some at a time in turns; the first of a turn warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            step()
            seconds[name] += [seconds_of(step) for _ in range(STEPS)]
    return {name: median(each) for name, each in seconds.items()}


class Texts:
    """Those of a model of ours in bfloat16 under dense, `BEHIND` tokens each."""

    def __init__(self, directory: Path) -> None:
        self.model = checkpoint.load(directory, "bfloat16").model
        self.backend = attention.build("dense", {}, self.model.head_shape())

    def begin(self, texts: int) -> None:
        """Have so many, of random keys and values."""
        self.pool = self.backend.new_pool(self.model.config.num_hidden_layers, 2**40)
        self.slots, self.past = [self.pool.allocate(BEHIND + ROOM) for _ in range(texts)], BEHIND
        for slot in self.slots:
            for tensor in self.pool.tensors(slot).values():
                tensor.normal_()
            self.pool.pretend(slot, BEHIND)

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """A token of each: the logits behind them, float32 (texts, V)."""
        count = len(self.slots)
        tokens, segments = torch.randint(self.model.config.vocab_size, (count,)), Segments((1,) * count, (self.past,) * count)
        self.past += 1
        return self.model.logits(extended(self.model, self.backend, self.pool, self.slots, tokens, segments))

    def roof_seconds(self) -> float:
        """That no step can be below."""
        share = self.past / (BEHIND + ROOM)
        read = torch.ones(int(self.model.weight_bytes + share * self.pool.bytes_in_use) // 4)
        left, right = (torch.randn(SQUARE, SQUARE).bfloat16() for _ in range(2))
        multiplying = min(seconds_of(lambda: left @ right) for _ in range(ROUNDS)) / SQUARE**3
        products = len(self.slots) * self.model.weight_bytes // 2
        return max(min(seconds_of(read.sum) for _ in range(ROUNDS)), multiplying * products)


def _steps(theirs: Theirs, texts: int) -> Callable[[], object]:
    return lambda: theirs.feed_each(torch.randint(theirs.vocab_size, (texts,)).tolist())
