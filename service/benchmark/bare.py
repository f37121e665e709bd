"""The bare model: the same chunks through `Transformer.hidden` with nothing around them. What the engine is compared with."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

import attention
from attention import AttentionBackend, Segments
from service.model import families
from service.model.checkpoint import EMBEDDED, choose_dtype
from service.model.continuation import extended
from service.model.transformer import Transformer

BACKENDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "sliding_window": {"window": 512, "sinks": 4},
    "performer": {"features": 256},
}
CHUNK = 512  # tokens at a time
STEPS = 20  # timed decode steps


def report(what: str, name: str, told: str) -> None:
    """One line of the table: what was measured, under which backend, and how it came out."""
    print(f"{what:60s} {name:15s} {told}", flush=True)


def bare_model(groups: int) -> Transformer:
    """The shape of the embedded model with random weights and a number of key-value heads."""
    config = json.loads((EMBEDDED / "config.json").read_text()) | {"num_key_value_heads": groups}
    torch.manual_seed(0)
    dtype, _ = choose_dtype("auto", "cpu")
    model = Transformer(families.read(config)).to(dtype).requires_grad_(False).eval()
    model.pack()
    return model


def build(model: Transformer, name: str) -> AttentionBackend:
    return attention.build(name, BACKENDS[name], model.head_shape())


@torch.inference_mode()
def bare(model: Transformer, backend: AttentionBackend, tokens: int, steps: int = 0) -> tuple[float, float]:
    """Seconds of a prefill in chunks, and of the median decode step behind it."""
    pool = backend.new_pool(model.config.num_hidden_layers, 2**62)
    slot = pool.allocate(tokens + steps)

    def extend(ids: torch.Tensor, start: int) -> torch.Tensor:
        return extended(model, backend, pool, (slot,), ids, Segments((len(ids),), (start,)))

    def decode(place: int) -> float:
        return seconds_of(lambda: model.logits(extend(ids[:1], place)).argmax(-1).item())

    ids = torch.randint(model.config.vocab_size, (tokens,))
    prefill = seconds_of(lambda: [extend(ids[a : a + CHUNK], a) for a in range(0, tokens, CHUNK)])
    times = [decode(tokens + i) for i in range(steps)]
    return prefill, median(times[1:]) if steps else 0.0


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_bare(lengths: Sequence[int]) -> None:
    """Prefill and decode of the bare model, for two numbers of key-value heads."""
    for groups in (2, 4):
        model = bare_model(groups)
        for name in BACKENDS:
            backend = build(model, name)
            for tokens in lengths:
                tokens = min(tokens, model.config.max_length - STEPS)
                bare(model, backend, tokens)  # compiles the kernels of these shapes
                prefill, step = bare(model, backend, tokens, steps=STEPS)
                told = f"{tokens / prefill:8.0f} tokens/s, decode step {step * 1e3:.2f} ms"
                report(f"bare model, {groups} kv heads, {tokens} tokens", name, told)
