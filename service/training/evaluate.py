"""What each backend costs the embedded model in quality: bits per byte, needle recall, agreement with dense, speed.

All text is held out (service.training.corpus); the backends have the options of a Serve config, `deploy/local.yaml` by
default; dense stands beside them where others are compared with it. The held-out modules stand one behind the other, an
end-of-text token in front of each, as in training; at a context of N the stream is cut into pieces of N tokens, each read
from nothing, and every token of every piece is paid for. xz's figure is for the same bytes as one file.

    python -m service.training.evaluate            all of it
    python -m service.training.evaluate --quick    fewer tokens, lengths and trials, within 8 minutes
    python -m service.training.evaluate --parts bits recall    only these; `seconds` alone needs the machine to itself

The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import attention
from attention import AttentionBackend, Segments
from service import config as settings
from service.model.checkpoint import EMBEDDED, Checkpoint, load
from service.model.continuation import Continuation
from service.model.quantized import BITS, Weights
from service.model.transformer import Attend
from service.training import corpus, needle

CONFIG = Path(__file__).parents[2] / "deploy" / "local.yaml"
LOGITS_AT_ONCE = 2048  # rows of logits held in memory
DECODE_STEPS = 32  # that are timed
BEGINNINGS = (
    # None ends with a newline: with the indentation behind it that is one token, so a bare one says that none follows.
    "def fibonacci(n):",
    "import os",
    "class Stack:\n    def __init__(self):",
    "def read_lines(path):\n    with open(path) as f:",
    "    def test_empty(self):",
)


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    contexts: tuple[int, ...]
    tokens: int | None  # of the held-out stream; None: all
    needle_trials: Mapping[int, int]  # by context, spread evenly over the depths
    agreement_tokens: int
    repeats: int  # of each timed prefill


LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
FULL = Extent(LENGTHS, None, dict.fromkeys(LENGTHS, 25), 65536, 3)
QUICK = Extent((1024, 2048, 8192, 16384), 65536, {1024: 10, 4096: 10, 8192: 10}, 16384, 1)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


class Subject:
    """The served model under its backends: whole sequences in, next-token logits out."""

    def __init__(self, checkpoint: Checkpoint, backends: dict[str, AttentionBackend], directory: Path = EMBEDDED) -> None:
        self.checkpoint, self.backends, self.directory = checkpoint, backends, directory
        self.core, self.tokenizer = checkpoint.model, checkpoint.tokenizer
        assert self.tokenizer.eos_id is not None, "the embedded tokenizer has an end-of-text token"
        self.eos: int = self.tokenizer.eos_id

    def attend(self, backend: str, segments: Segments) -> Attend:
        layers = attention.layers_of(self.backends[backend], self.core.config.num_hidden_layers)
        return lambda layer, q, k, v: layers[layer].attend(q, k, v, segments, causal=True)

    def hidden(self, backend: str, sequences: Sequence[Tensor]) -> Tensor:
        """Last hidden states of sequences, packed: (T, C)."""
        segments = Segments(tuple(len(sequence) for sequence in sequences))
        return self.core.hidden(torch.cat(list(sequences)), segments.positions(), self.attend(backend, segments))

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        return F.log_softmax(self.core.logits(hidden), dim=-1)


@dataclass(frozen=True)
class Held:
    """The held-out text: all of it, and the beginning that is scored, as tokens and as bytes of text."""

    modules: int
    text: bytes
    tokens: int
    stream: Tensor
    size: int


def held_out(model: Subject, most: int | None) -> Held:
    """The held-out modules, one behind the other, an end-of-text token in front of each; up to `most` tokens are scored."""
    _, modules = corpus.split(list(corpus.modules()))
    tokens = [token for module in modules for token in (model.eos, *model.tokenizer.encode(module.text))]
    size = sum(len(model.tokenizer.token_bytes(token)) for token in tokens[:most] if token != model.eos)
    text = b"".join(module.text.encode() for module in modules)
    return Held(len(modules), text, len(tokens), torch.tensor(tokens[:most]), size)


def bits_per_byte(model: Subject, backend: str, held: Held, context: int) -> float:
    """Bits that what is scored costs in pieces of `context` tokens, over the bytes of its text."""
    bits = 0.0
    together = max(1, 8192 // context)  # pieces in one packed batch
    for batch in held.stream.split(context * together):
        pieces = batch.split(context)
        eos = torch.full((1,), model.eos)
        hidden = model.hidden(backend, [torch.cat((eos, piece[:-1])) for piece in pieces])
        for rows, targets in zip(hidden.split(LOGITS_AT_ONCE), batch.split(LOGITS_AT_ONCE), strict=True):
            bits += F.cross_entropy(model.core.logits(rows), targets, reduction="sum").item() / math.log(2)
    return bits / held.size


def needle_recall(model: Subject, backend: str, stream: Tensor, context: int, trials: int) -> dict[float, float]:
    """Share of needles whose whole value is the greedy answer, by depth; the same needles and text for every backend."""
    rng = np.random.default_rng(context)
    encode = model.tokenizer.encode
    hits: dict[float, list[bool]] = {depth: [] for depth in DEPTHS}
    for trial in range(trials):
        depth = DEPTHS[trial % len(DEPTHS)]
        key, value = needle.draw(rng)
        told, asked, answer = encode(needle.statement(key, value)), encode(needle.question(key)), encode(f" {value}")
        room = context - len(told) - len(asked) - len(answer)
        start = int(rng.integers(0, len(stream) - room))
        text = stream[start : start + room].tolist()
        place = int(depth * room)
        tokens = [*text[:place], *told, *text[place:], *asked, *answer]
        hidden = model.hidden(backend, [torch.tensor(tokens)])
        guesses = model.core.logits(hidden[-len(answer) - 1 : -1]).argmax(-1).tolist()
        hits[depth].append(guesses == answer)
    return {depth: fmean(found) for depth, found in hits.items() if found}


def agreement(
    model: Subject, backend: str, stream: Tensor, tokens: int, context: int = 2048, judged: Subject | None = None
) -> dict[str, float]:
    """Mean KL(dense || backend) in nats and how often both like the same token best, at `context`.

    judged: the model that answers under the backend, where it is another.
    """
    judged = judged or model
    divergence, same, count = 0.0, 0.0, 0
    for piece in stream[:tokens].split(context):
        dense = model.log_probabilities(model.hidden("dense", [piece]))
        other = judged.log_probabilities(judged.hidden(backend, [piece]))
        divergence += F.kl_div(other, dense, reduction="sum", log_target=True).item()
        same += (dense.argmax(-1) == other.argmax(-1)).sum().item()
        count += len(piece)
    return {"kl": divergence / count, "top1": same / count}


def prefill_seconds(model: Subject, stream: Tensor, context: int, repeats: int) -> dict[str, float]:
    """Median seconds of one bare forward over `context` tokens, the backends taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in model.backends}
    for _ in range(repeats):
        for name, times in seconds.items():
            start = time.perf_counter()
            model.core.logits(model.hidden(name, [stream[:context]])[-1:])
            times.append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


def decode_seconds(model: Subject, stream: Tensor, context: int, steps: int) -> dict[str, float]:
    """Median seconds of a bare decode step, the last ones of a text of `context` tokens, the backends taking turns."""
    grown = {name: Continuation(model.core, backend, context) for name, backend in model.backends.items()}
    newest = {name: text.read(stream[: context - steps - 1]).argmax(-1) for name, text in grown.items()}
    seconds: dict[str, list[float]] = {name: [] for name in grown}
    for _ in range(steps + 1):
        for name, text in grown.items():
            start = time.perf_counter()
            newest[name] = text.read(newest[name]).argmax(-1)
            newest[name].item()  # which waits for an accelerator
            seconds[name].append(time.perf_counter() - start)
    return {name: median(times[1:]) for name, times in seconds.items()}


def complete(model: Subject, backend: str, beginning: str, tokens: int) -> str:
    """Greedy continuation of a text, the beginning included."""
    new = model.tokenizer.encode(beginning, add_special_tokens=True)
    text = new[model.tokenizer.leading :]
    grown = Continuation(model.core, model.backends[backend], len(new) + tokens)
    while len(text) < tokens:
        new = [int(grown.read(torch.tensor(new)).argmax())]
        if new[0] == model.eos:
            break
        text += new
    return model.tokenizer.decode(text)


def kernel_arguments(model: Subject, stream: Tensor, context: int = 2048) -> list[tuple[float, float]]:
    """w = |q' + k'|^2 of random query-key pairs the causal way, by layer: (mean, 95th percentile). See performer.py."""
    found: list[tuple[float, float]] = []
    segments = Segments((context,))
    inner = model.attend("dense", segments)
    generator = torch.Generator().manual_seed(0)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.randint(0, context, (4096,), generator=generator)
        j = (torch.rand(4096, generator=generator) * (i + 1)).long()
        heads = q.shape[1] // k.shape[1]
        pairs = q[i].float() + k[j].repeat_interleave(heads, dim=1).float()  # (4096, H, D)
        w = pairs.square().sum(-1) * q.shape[-1] ** -0.5
        found.append((w.mean().item(), w.quantile(0.95).item()))
        return inner(layer, q, k, v)

    model.core.hidden(stream[:context], segments.positions(), attend)
    return found


def table(title: str, columns: Sequence[object], rows: Mapping[str, Mapping[Any, float]], form: str = "{:.3f}") -> None:
    print(f"\n{title}")
    print("  " + "backend".ljust(16) + "".join(f"{column!s:>10}" for column in columns))
    for name, row in rows.items():
        cells = "".join(form.format(row[c]).rjust(10) if c in row else "-".rjust(10) for c in columns)
        print("  " + name.ljust(16) + cells, flush=True)


def by_backend(model: Subject, columns: Sequence[int], measure: Callable[[str, int], float]) -> dict[str, dict[int, float]]:
    return {name: {column: measure(name, column) for column in columns} for name in model.backends}


@torch.inference_mode()
def evaluate(model: Subject, extent: Extent, parts: Sequence[str]) -> dict[str, object]:
    """Measure these of PARTS, print the tables, return the figures of the JSON line."""
    held = held_out(model, extent.tokens)
    print(f"held out: {held.modules} modules, {len(held.text)} bytes, {held.tokens} tokens")
    print(f"scored: {held.size} bytes, {len(held.stream)} tokens")
    found: dict[str, object] = {}
    for part in parts:
        found |= PARTS[part](model, extent, held)
    return found


def _bits(model: Subject, extent: Extent, held: Held) -> dict[str, object]:
    xz = 8 * len(lzma.compress(held.text, preset=9 | lzma.PRESET_EXTREME)) / len(held.text)
    print(f"xz -9e of all of it as one file: {xz:.4f} bits per byte")
    bits = by_backend(model, extent.contexts, lambda name, n: bits_per_byte(model, name, held, n))
    table("bits per byte by context", extent.contexts, bits)
    return {"xz_bits_per_byte": xz, "bits_per_byte": bits}


def _recall(model: Subject, extent: Extent, held: Held) -> dict[str, object]:
    recall = {
        name: {n: needle_recall(model, name, held.stream, n, trials) for n, trials in extent.needle_trials.items()}
        for name in model.backends
    }
    mean = {name: {n: fmean(found.values()) for n, found in rows.items()} for name, rows in recall.items()}
    table(f"needle recall by context, {list(extent.needle_trials.values())} trials", list(extent.needle_trials), mean)
    longest = 8192
    table(f"needle recall by depth at {longest}", DEPTHS, {name: rows[longest] for name, rows in recall.items()})
    return {"needle_recall": mean}


def _agreement(model: Subject, extent: Extent, held: Held) -> dict[str, object]:
    close = {name: agreement(model, name, held.stream, extent.agreement_tokens) for name in model.backends}
    table("agreement with dense at 2048", ("kl", "top1"), close)
    w = kernel_arguments(model, held.stream)
    print("\nw = |q' + k'|^2 by layer, mean (95th percentile): " + ", ".join(f"{m:.1f} ({high:.1f})" for m, high in w))
    return {"agreement": close}


def _weights(model: Subject, extent: Extent, held: Held) -> dict[str, object]:
    found = {}
    for weights in ("auto", *BITS):
        loaded = load(model.directory, str(model.core.dtype).removeprefix("torch."), weights=weights)
        judged = Subject(loaded, model.backends)
        close = agreement(model, "dense", held.stream, extent.agreement_tokens, judged=judged)
        found[weights] = {"MiB": loaded.model.weight_bytes / 2**20, "bits": bits_per_byte(judged, "dense", held, 2048), **close}
    table("weights in fewer bits, dense at 2048; kl and top1 against the first", ("MiB", "bits", "kl", "top1"), found, "{:.4f}")
    return {"weights": found}


def _kv(model: Subject, extent: Extent, held: Held) -> dict[str, object]:
    kinds = {"dense": None, "dense, kv int8": torch.int8}
    backends = {name: attention.build("dense", None, replace(model.core.head_shape(), kv=kv)) for name, kv in kinds.items()}
    kept, contexts = Subject(model.checkpoint, backends, model.directory), [n for n in extent.contexts if n >= 2048]
    bits = by_backend(kept, contexts, lambda name, n: bits_per_byte(kept, name, held, n))
    table("keys and values in 8 bits: bits per byte by context", contexts, bits, "{:.4f}")
    close = {name: agreement(kept, name, held.stream, extent.agreement_tokens) for name in kinds}
    table("agreement with dense at 2048", ("kl", "top1"), close, "{:.5f}")
    trials = {n: count for n, count in extent.needle_trials.items() if n >= 2048}
    recall = by_backend(kept, [*trials], lambda name, n: fmean(needle_recall(kept, name, held.stream, n, trials[n]).values()))
    table(f"needle recall by context, {list(trials.values())} trials", list(trials), recall)
    return {"kv": {"bits_per_byte": bits, "agreement": close, "needle_recall": recall}}


def _seconds(model: Subject, extent: Extent, held: Held) -> dict[str, object]:
    timed = {n: prefill_seconds(model, held.stream, n, extent.repeats) for n in extent.contexts}
    seconds = by_backend(model, extent.contexts, lambda name, n: timed[n][name])
    table("bare prefill seconds by context", extent.contexts, seconds)
    timed = {n: decode_seconds(model, held.stream, n, DECODE_STEPS) for n in extent.contexts}
    steps = by_backend(model, extent.contexts, lambda name, n: timed[n][name])
    milliseconds = {name: {n: 1e3 * each for n, each in row.items()} for name, row in steps.items()}
    table("milliseconds of a bare decode step by context", extent.contexts, milliseconds)
    return {"prefill_seconds": seconds, "decode_seconds": steps}


def _completions(model: Subject, extent: Extent, held: Held) -> dict[str, object]:
    for beginning in BEGINNINGS:
        print(f"\n--- greedy, dense, 80 tokens\n{complete(model, 'dense', beginning, 80)}")
    return {}


PARTS = {
    "bits": _bits,
    "recall": _recall,
    "agreement": _agreement,
    "weights": _weights,
    "kv": _kv,
    "seconds": _seconds,
    "completions": _completions,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--config", type=Path, default=CONFIG, help="Serve config whose backends and options are measured")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--weights", default="auto", choices=get_args(Weights), help="in which matrices are kept")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    checkpoint = load(arguments.model, arguments.dtype, weights=arguments.weights)
    chosen = settings.read(arguments.config).applications[0].deployments[0].user_config.attention.backends
    shape = checkpoint.model.head_shape()
    compared: dict[str, dict[str, Any]] = {"dense": {}} if {"agreement", "weights", "completions"} & {*arguments.parts} else {}
    backends = {name: attention.build(name, options, shape) for name, options in {**compared, **chosen}.items()}
    print(f"model: {checkpoint.id}, {checkpoint.model.dtype}, {arguments.threads} threads, torch {torch.__version__}")
    print("backends: " + json.dumps({name: backend.options.model_dump() for name, backend in backends.items()}))
    found = evaluate(Subject(checkpoint, backends, arguments.model), QUICK if arguments.quick else FULL, arguments.parts)
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
