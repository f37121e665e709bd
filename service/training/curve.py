"""Recall against the size of the state: what backends whose state is constant find, by how many bytes they keep.

Each plan is a backend of all layers or, behind windows in the others, of the last layer, which is where the embedded model
recalls (`service.training.layers` tells). Beside each stands what it would find if it kept as many tokens by chance as it
keeps by choice: a needle is found when its value is kept.

    python -m service.training.curve --context 8192 --trials 25

The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import attention
from service.model.checkpoint import EMBEDDED, load
from service.training.evaluate import Subject, held_out, needle_recall
from service.training.layers import plan

NEAR: dict[str, Any] = {"sliding_window": {"window": 512}}  # of all layers but the last
KEPT = (256, 512, 1024, 2048, 4096)
FEATURES = (64, 256, 1024)


def plans(layers: int) -> Iterator[tuple[str, str, dict[str, Any], float]]:
    """(label, backend, options, tokens that its last layer sees at most); the growing ones, for comparison, at the end."""

    def last(label: str, backend: str, options: dict[str, Any], seen: float) -> tuple[str, str, dict[str, Any], float]:
        kinds = {"near": NEAR, "far": {backend: options}}
        return f"{label}, last layer", attention.LAYERED, plan(layers, frozenset({layers - 1}), kinds), seen

    for kept in KEPT:
        yield last(f"window {512 + kept}", "sliding_window", {"window": 512 + kept}, 512 + kept)
    for kept in KEPT:
        yield last(f"distinct {kept}", "distinct", {"kept": kept}, 512 + kept)
    for features in FEATURES:
        yield f"performer {features}", "performer", {"features": features, "local_chunk": 512}, 1024
    yield "linear", "linear", {}, 0
    yield last("topk (grows)", "topk", {}, float("inf"))
    yield "dense (grows)", "dense", {}, float("inf")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--trials", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = Subject(load(arguments.model, "auto"), {})
    layers, shape = model.core.config.num_hidden_layers, model.core.head_shape()
    stream = held_out(model, None).stream
    found = {}
    print(f"{arguments.trials} needles at {arguments.context} tokens; state of one sequence, all layers")
    print(f"  {'plan':28}{'state, MiB':>12}{'recall':>10}{'by chance':>11}")
    for label, name, options, seen in plans(layers):
        backend = attention.build(name, options, shape)
        model.backends = {label: backend}
        size = backend.new_pool(layers, 0).slot_bytes(arguments.context)
        recall = fmean(needle_recall(model, label, stream, arguments.context, arguments.trials).values())
        chance = min(1.0, seen / arguments.context)
        found[label] = {"state_bytes": size, "recall": recall, "by_chance": round(chance, 3)}
        print(f"  {label:28}{size / 2**20:>12.2f}{recall:>10.2f}{chance:>11.2f}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
