"""Train the embedded model: one set of weights for dense, sliding-window and FAVOR+ attention.

Each step draws a backend; all layers of the step attend with it, or, as `layered`, the last one densely and the others through
windows. Matrices learn by Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), embedding and norms by AdamW. Lengths
grow in phases, each with its rate (CURRICULUM); some of the sequences carry needles (needle.py). The scales of the QK-norm are
held to at most `MAX_QK_SCALE`, which bounds |q| and |k| and so FAVOR+'s variance (attention/backends/performer.py).

    python -m service.training.corpus --out DATA
    python -m service.training.train --data DATA --out RUN        run again to resume from the last saved state
    python -m service.training.train --data DATA --out RUN --start DIR --seen 55200000     from a checkpoint's weights
    python -m service.training.train --data DATA --out RUN --export service/model/embedded

State is saved outside the repository, read back with `weights_only`. The same seed, data and versions give the same
schedule of samples and backends; sums on several threads make the weights equal only closely.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from service.model import families
from service.model.checkpoint import load, save
from service.model.tokenizer import Tokenizer
from service.model.transformer import Attend, Transformer
from service.training import needle
from service.training.gradients import performer_attention, softmax_attention, streamed_attention

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

# Three layers may attend sharply, which recall in a long text needs; the others stay where FAVOR+ varies little.
MAX_QK_SCALE = (1.0, 2.5, 1.5, 2.5, 1.5, 2.5)  # by layer
FIRST_QK_SCALE = 0.6
FROM_THE_TOP = 0.25  # share of the sequences that begin where a module does, as many prompts do
WINDOW, SINKS, FEATURES, FEATURE_SEED, LOCAL_CHUNK = 512, 4, 256, 0, 512

ARCHITECTURE = {
    "model_type": "qwen3",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}


@dataclass(frozen=True)
class Phase:
    """A stretch of the run: its tokens, its rate, its lengths, and how often each backend is drawn."""

    tokens: int
    rate: tuple[float, float]  # share of the full rate, linearly from its first token to its last
    lengths: tuple[int, ...]
    step_tokens: int
    needles: float  # share of the sequences that carry needles, under the backends of RECALLING
    backends: tuple[tuple[str, float], ...]
    answers: float = math.inf  # the most that all answers may weigh beside all other tokens of a sequence
    answer_weight: float = 4.0  # an answer token's loss beside an ordinary one's, where `answers` lets it: there are very few


RECALLING = ("dense", "layered")  # the others cannot hold a needle
MIXED = (("dense", 0.34), ("sliding_window", 0.2), ("performer", 0.46))
MOSTLY_DENSE = (("dense", 0.6), ("sliding_window", 0.1), ("performer", 0.3))
RECALL = (("dense", 0.5), ("layered", 0.3), ("sliding_window", 0.08), ("performer", 0.12))
MOSTLY_LAYERED = (("dense", 0.3), ("layered", 0.5), ("sliding_window", 0.08), ("performer", 0.12))
LONG_DENSE = (("dense", 0.6), ("layered", 0.25), ("sliding_window", 0.05), ("performer", 0.1))
LONG = (2048, 2048, 2048, 8192, 8192, *[16384] * 7, *[32768] * 8)
CURRICULUM = (
    Phase(22_600_000, (1.0, 1.0), (1024,), 8192, 0.1, MIXED),
    Phase(19_900_000, (1.0, 1.0), (2048,), 16384, 0.2, MIXED),
    Phase(3_300_000, (1.0, 1.0), (4096, 8192, 8192, 16384), 16384, 0.3, MIXED),
    Phase(3_900_000, (1.0, 1.0), (2048,), 16384, 0.5, MOSTLY_DENSE),
    Phase(2_500_000, (1.0, 0.55), (4096, 8192, 8192, 16384), 16384, 0.5, MOSTLY_DENSE),
    Phase(3_000_000, (0.55, 0.02), (2048, 2048, 2048, 2048, 2048, 8192, 8192, 16384), 16384, 0.4, MOSTLY_DENSE),
    Phase(3_400_000, (0.3, 0.02), LONG, 32768, 0.6, RECALL),
    Phase(3_400_000, (0.25, 0.02), LONG, 32768, 0.6, MOSTLY_LAYERED),
    Phase(3_400_000, (0.4, 0.02), (2048, 8192, 16384, 16384, *[32768] * 3), 32768, 0.6, LONG_DENSE, 0.25, 64.0),
)
WARM_UP = 20  # steps
MATRIX_RATE, VECTOR_RATE = 0.02, 0.003


def at(tokens: int) -> tuple[Phase, float] | None:
    """The phase in which a run that has seen `tokens` stands, and the share of the full rate there; None behind the last."""
    for phase in CURRICULUM:
        if tokens < phase.tokens:
            first, last = phase.rate
            return phase, first + (last - first) * tokens / phase.tokens
        tokens -= phase.tokens
    return None


class Sampler:
    """The batches of a run: everything about step i is drawn from (seed, i), so a resumed run goes on as it would have."""

    def __init__(self, stream: np.ndarray, tokenizer: Tokenizer, seed: int) -> None:
        assert tokenizer.eos_id is not None, "the tokenizer of service.training.corpus has an end-of-text token"
        self.stream, self.encode, self.seed, self.eos = stream, tokenizer.encode, seed, tokenizer.eos_id
        self.tops = np.flatnonzero(stream == self.eos) + 1

    def draw(self, step: int, phase: Phase) -> tuple[str, int, Tensor, Tensor]:
        """(backend, length, tokens int64 (B, length + 1), weights float32 (B, length)) of a step."""
        rng = np.random.default_rng((self.seed, step))
        names, odds = zip(*phase.backends, strict=True)
        backend, length = str(rng.choice(names, p=odds)), int(rng.choice(phase.lengths))
        needles = phase.needles if backend in RECALLING else 0.0
        rows = []
        for _ in range(max(1, phase.step_tokens // length)):
            sequence, answers = self._sequence(length, needles, rng)
            rows.append((sequence, weighed(answers[1:], phase)))
        tokens, weights = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
        return backend, length, tokens, weights

    def _sequence(self, length: int, needles: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The end-of-text token, as in front of every module, and `length` tokens of the stream behind it."""
        last = len(self.stream) - length
        start = int(rng.choice(self.tops[self.tops < last]) if rng.random() < FROM_THE_TOP else rng.integers(0, last))
        crop, answers = self.stream[start : start + length].astype(np.int64), np.zeros(length, bool)
        if rng.random() < needles:
            crop, answers = needle.weave(crop, length, rng, self.encode)
        return np.append(np.int64(self.eos), crop), np.append(False, answers)


def weighed(answers: np.ndarray, phase: Phase) -> np.ndarray:
    """Each token's weight, float32, of which are answers."""
    count = int(answers.sum())
    weight = min(phase.answer_weight, phase.answers * (len(answers) - count) / max(count, 1))
    return np.where(answers, weight, 1.0).astype(np.float32)


def attend_for(backend: str, length: int) -> Attend:
    """The differentiable form of a backend at a length."""
    if backend == "performer":
        return performer_attention(length, FEATURES, FEATURE_SEED, LOCAL_CHUNK)
    if backend == "sliding_window":
        return softmax_attention(length, WINDOW, SINKS)
    dense = softmax_attention(length) if length <= 2048 else streamed_attention(length)
    if backend == "dense":
        return dense
    assert backend == "layered", backend
    near, last = softmax_attention(length, WINDOW, SINKS), len(MAX_QK_SCALE) - 1
    return lambda layer, q, k, v: (dense if layer == last else near)(layer, q, k, v)


def new_model(seed: int) -> Transformer:
    """Fresh weights: normal with a deviation of 1/sqrt(fan-in), projections onto the residual stream at zero."""
    torch.manual_seed(seed)
    model = Transformer(families.read(ARCHITECTURE))
    nn.init.normal_(model.embed.weight, std=0.02)
    for layer in model.stack:
        for matrix in (layer.qkv.weight, layer.gate_up.weight):
            nn.init.normal_(matrix, std=matrix.shape[1] ** -0.5)
        nn.init.zeros_(layer.out.weight)
        nn.init.zeros_(layer.down.weight)
        layer.q_norm.data.fill_(FIRST_QK_SCALE)
        layer.k_norm.data.fill_(FIRST_QK_SCALE)
    return model


class Trainer:
    """Weights, optimisers and the count of steps and tokens: what is saved and resumed."""

    def __init__(self, seed: int, compiled: bool) -> None:
        self.model = new_model(seed)
        self.compiled = compiled
        self.step, self.tokens = 0, 0
        self.warmth = 0  # steps that the optimisers have taken
        self._losses: dict[tuple[str, int, bool], Loss] = {}
        layers = self.model.stack
        fused = [p for layer in layers for p in (layer.qkv.weight, layer.gate_up.weight)]
        plain = [p for layer in layers for p in (layer.out.weight, layer.down.weight)]
        config = self.model.config
        depth = config.head_dim
        heads = [config.num_attention_heads * depth, *[config.num_key_value_heads * depth] * 2]
        halves = [config.intermediate_size] * 2
        # Muon makes each matrix's update orthogonal: fused matrices are handed over part by part, as views of the same
        # storage, so that q, k, v are not mixed.
        self.parts = [(p, list(self._views(p, halves if p.shape[0] == sum(halves) else heads))) for p in fused]
        matrices = [view for _, views in self.parts for view in views] + plain
        known = {id(p) for p in (*fused, *plain)}
        vectors = [p for p in self.model.parameters() if id(p) not in known]
        self.optimizers = (
            torch.optim.Muon(matrices, lr=MATRIX_RATE, momentum=0.95, weight_decay=0.01),
            torch.optim.AdamW(vectors, lr=VECTOR_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        )
        self.rates = (MATRIX_RATE, VECTOR_RATE)

    @staticmethod
    def _views(parameter: Tensor, sizes: list[int]) -> Iterator[nn.Parameter]:
        for part in parameter.data.split(sizes):
            yield nn.Parameter(part)

    def loss(self, backend: str, length: int, tokens: Tensor, weights: Tensor) -> Tensor:
        """Weighted mean of the next-token losses in nats, under bfloat16 autocast."""
        key = (backend, length, torch.is_grad_enabled())
        if key not in self._losses:
            function = self._loss_function(backend, length)
            # The graphs grow with the length: long ones, and those of the glances at held-out text, take
            # longer to compile than they save.
            short = self.compiled and length <= 2048 and torch.is_grad_enabled()
            self._losses[key] = torch.compile(function, dynamic=False) if short else function
        with torch.autocast("cpu", torch.bfloat16):
            return self._losses[key](tokens[:, :-1].flatten(), tokens[:, 1:].flatten(), weights.flatten())

    def _loss_function(self, backend: str, length: int) -> Loss:
        attend = attend_for(backend, length)

        def loss(tokens: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            positions = torch.arange(length).repeat(tokens.shape[0] // length)
            logits = self.model.logits(self.model.hidden(tokens, positions, attend))
            return (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum() / weights.sum()

        return loss

    def update(self, fraction: float) -> None:
        """One step of both optimisers at `fraction` of the full rate."""
        self.warmth += 1
        fraction *= min(1.0, self.warmth / WARM_UP)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * fraction
        for parameter, views in self.parts:
            assert parameter.grad is not None
            for view, grad in zip(views, parameter.grad.split([len(view) for view in views]), strict=True):
                view.grad = grad
        for optimizer in self.optimizers:
            optimizer.step()  # type: ignore[no-untyped-call]
        self.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for layer, most in zip(self.model.stack, MAX_QK_SCALE, strict=True):
                layer.q_norm.clamp_(-most, most)
                layer.k_norm.clamp_(-most, most)

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "warmth": self.warmth,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def resume(self, state: dict[str, Any]) -> None:
        self.step, self.tokens, self.warmth = state["step"], state["tokens"], state["warmth"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


@torch.no_grad()
def held_out_nats(trainer: Trainer, stream: np.ndarray, length: int = 1024, sequences: int = 16) -> dict[str, float]:
    """Nats per token on the first held-out sequences, by backend: a glance while training, no choice hangs on it."""
    rows = np.stack([stream[i * length : (i + 1) * length + 1] for i in range(sequences)]).astype(np.int64)
    tokens = torch.from_numpy(rows)
    weights = torch.ones(sequences, length)
    names = ("dense", "sliding_window", "performer")
    halves = list(zip(tokens.split(8), weights.split(8), strict=True))
    return {name: float(np.mean([trainer.loss(name, length, *half).item() for half in halves])) for name in names}


def write(path: Path, state: dict[str, Any]) -> None:
    """Save whole or not at all."""
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def train(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    torch._dynamo.config.recompile_limit = 64  # one graph per backend and length, none of them eager in silence
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "state.pt"
    trainer = Trainer(arguments.seed, arguments.compile)
    if path.exists():
        trainer.resume(torch.load(path, weights_only=True))
    elif arguments.start is not None:
        trainer.model.load_state_dict(load(arguments.start, "float32").model.state_dict())
        trainer.tokens = arguments.seen
    sampler = Sampler(np.load(arguments.data / "train.npy"), Tokenizer.load(arguments.data), arguments.seed)
    held_out = np.load(arguments.data / "held_out.npy")
    log = (arguments.out / "log.jsonl").open("a")
    whole = sum(phase.tokens for phase in CURRICULUM)
    bar = tqdm(total=whole, initial=trainer.tokens, unit="tok", unit_scale=True, mininterval=10, smoothing=0.05)
    saved = time.monotonic()
    while (stage := at(trainer.tokens)) is not None:
        phase, fraction = stage
        backend, length, tokens, weights = sampler.draw(trainer.step, phase)
        loss = torch.zeros(())
        micro = max(1, 8192 // length)  # sequences at a time: one shape, so one compiled graph
        for some, some_weights in zip(tokens.split(micro), weights.split(micro), strict=True):
            part = trainer.loss(backend, length, some, some_weights) * len(some) / len(tokens)
            part.backward()
            loss += part.detach()
        trainer.update(fraction)
        trainer.step += 1
        trainer.tokens += weights.numel()
        bar.update(weights.numel())
        record = {"step": trainer.step, "tokens": trainer.tokens, "backend": backend, "length": length, "nats": loss.item()}
        if trainer.step % 100 == 0:
            record["held_out"] = held_out_nats(trainer, held_out)
            bar.write(json.dumps(record))
        log.write(json.dumps(record) + "\n")
        log.flush()
        if time.monotonic() - saved > 120 or at(trainer.tokens) is None:
            write(path, trainer.state())
            saved = time.monotonic()


def export(arguments: argparse.Namespace) -> None:
    """Write the saved weights and the tokenizer as a checkpoint directory that transformers loads too."""
    trainer = Trainer(arguments.seed, compiled=False)
    trainer.resume(torch.load(arguments.out / "state.pt", weights_only=True))
    save(trainer.model, arguments.export, {"_name_or_path": "longserve-stdlib-5m"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        with contextlib.suppress(shutil.SameFileError):
            shutil.copy(arguments.data / name, arguments.export / name)
    print(f"{trainer.tokens} tokens in {trainer.step} steps -> {arguments.export}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what service.training.corpus wrote")
    parser.add_argument("--out", type=Path, required=True, help="where the run's state and log go, outside the repository")
    parser.add_argument("--start", type=Path, help="a checkpoint whose weights a new run begins with")
    parser.add_argument("--seen", type=int, default=0, help="tokens that they have seen: where in the schedule it begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile short lengths")
    parser.add_argument("--export", type=Path, help="write the checkpoint directory instead of training")
    arguments = parser.parse_args()
    export(arguments) if arguments.export else train(arguments)


if __name__ == "__main__":
    main()
