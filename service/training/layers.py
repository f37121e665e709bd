"""Which layers of the model must see far: needle recall and bits per byte by layer, and the cheapest plan that keeps enough.

A plan gives each layer one of two backends, near (a window) or far (dense, topk); it is served as the backend `layered`. Each
layer is measured far alone, and near alone. Then, from near everywhere, the layer that brings most becomes far, until recall
and bits are within the budget of those with all layers far; what a later layer made needless becomes near again.

    python -m service.training.layers --far '{"topk": {}}' --recall 0.95 --bits 0.005

The last line printed is the plan, as an entry of a Serve config's `backends`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import attention
from service.model.checkpoint import EMBEDDED, load
from service.training.evaluate import Held, Subject, bits_per_byte, held_out, needle_recall

Far = frozenset[int]  # the layers that see far
Measure = Callable[[Far], "Quality"]


@dataclass(frozen=True, order=True)
class Quality:
    """What a plan reaches; the larger one finds more, of equals it costs fewer bits."""

    recall: float  # share of needles found
    saved: float  # minus bits per byte

    def suffices(self, wanted: Quality, recall: float, bits: float) -> bool:
        """Whether it keeps this share of another's recall and costs no more than this part more bits."""
        return self.recall >= recall * wanted.recall and -self.saved <= (1 + bits) * -wanted.saved


def cheapest(layers: int, measure: Measure, is_enough: Callable[[Quality], bool]) -> Far:
    """Few layers that are enough: greedily added, then those taken out again that the others made needless."""
    far: Far = frozenset()
    while len(far) < layers and not is_enough(measure(far)):
        far = max((far | {layer} for layer in range(layers) if layer not in far), key=measure)
    for layer in sorted(far):
        if is_enough(measure(far - {layer})):
            far -= {layer}
    return far


def plan(layers: int, far: Far, kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The options of `layered` with these layers far; kinds: of `near` and `far`, one backend with its options each."""
    return {"layers": {str(layer): kinds["far" if layer in far else "near"] for layer in range(layers)}}


def measured(model: Subject, kinds: dict[str, dict[str, Any]], held: Held, context: int, trials: int) -> Measure:
    """A function from the layers that see far to what they reach over held-out text."""
    layers = model.core.config.num_hidden_layers

    @cache
    def measure(far: Far) -> Quality:
        model.backends["plan"] = attention.build(attention.LAYERED, plan(layers, far, kinds), model.core.head_shape())
        recall = fmean(needle_recall(model, "plan", held.stream, context, trials).values())
        return Quality(recall, -bits_per_byte(model, "plan", held, min(context, len(held.stream))))

    return measure


def show(label: str, quality: Quality) -> None:
    print(f"  {label:24}{quality.recall:8.2f}{-quality.saved:10.4f}", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--near", type=json.loads, default={"sliding_window": {}}, help="as JSON, a backend with its options")
    parser.add_argument("--far", type=json.loads, default={"dense": {}}, help="the same")
    parser.add_argument("--recall", type=float, default=0.95, help="share of the recall with all layers far that must stay")
    parser.add_argument("--bits", type=float, default=0.005, help="part by which bits per byte may grow")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=32768, help="of held-out text, for bits per byte")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = Subject(load(arguments.model, "auto"), {})
    held = held_out(model, arguments.tokens)
    layers, kinds = model.core.config.num_hidden_layers, {"near": arguments.near, "far": arguments.far}
    measure = measured(model, kinds, held, arguments.context, arguments.trials)
    everything = frozenset(range(layers))
    print(f"{json.dumps(kinds)}, {arguments.trials} needles and {len(held.stream)} tokens at {arguments.context}")
    print(f"  {'layers that see far':24}{'recall':>8}{'bits/byte':>10}")
    wanted = measure(everything)
    for label, far in (("all", everything), ("none", frozenset[int]())):
        show(label, measure(far))
    for layer in range(layers):
        show(f"{layer} alone", measure(frozenset({layer})))
        show(f"all but {layer}", measure(everything - {layer}))
    found = cheapest(layers, measure, lambda quality: quality.suffices(wanted, arguments.recall, arguments.bits))
    show("plan: " + (", ".join(map(str, sorted(found))) or "none"), measure(found))
    print(json.dumps({attention.LAYERED: plan(layers, found, kinds)}))


if __name__ == "__main__":
    main()
