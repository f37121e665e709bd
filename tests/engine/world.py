"""A tiny real world for the engine's tests: a model of random weights, a byte tokenizer, an engine around them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models
from torch import Tensor

import attention
from service.config import EngineConfig
from service.engine.engine import Backends, Engine
from service.engine.observer import Outcome, Shadowed, Step
from service.engine.request import Delta, Embedding, Request, Sampling
from service.model import families
from service.model.tokenizer import Tokenizer, _byte_alphabet
from service.model.transformer import Stages, Transformer

EOS = 256
VOCABULARY = 257
MAX_LENGTH = 2048
BACKENDS = {"dense": {}, "sliding_window": {"window": 64, "sinks": 4}, "performer": {"features": 32}}

_ids = itertools.count()


def make_model(dtype: torch.dtype = torch.float32, eos: int = EOS, scale: int = 1, vocabulary: int = VOCABULARY) -> Transformer:
    """A transformer of random weights; untied, since a tied one would only repeat its last token."""
    torch.manual_seed(0)
    config = families.read(
        {
            "model_type": "qwen3",
            "vocab_size": vocabulary,
            "hidden_size": 32 * scale,
            "intermediate_size": 48 * scale,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16 * scale,
            "max_position_embeddings": MAX_LENGTH,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "eos_token_id": eos,
        }
    )
    return Transformer(config).to(dtype).requires_grad_(False).eval()


def make_tokenizer(moved: Mapping[int, int] | None = None) -> Tokenizer:
    """One token per byte, and an end-of-text token. `moved`: bytes whose id is another, which leaves a hole."""
    vocabulary = {char: (moved or {}).get(byte, byte) for char, byte in _byte_alphabet().items()}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<end>"])
    return Tokenizer(core, EOS)


def make_backends(model: Transformer, default: str = "dense", **options: dict[str, Any]) -> Backends:
    """Real backends for the model: all of BACKENDS, or those given with their options."""
    chosen = options or BACKENDS
    return Backends({name: attention.build(name, opts, model.head_shape()) for name, opts in chosen.items()}, default)


@dataclass
class Watcher:
    """An observer that remembers."""

    ended: list[tuple[str, Outcome]] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    shadows: list[Shadowed] = field(default_factory=list)

    def finished(self, request: Request, outcome: Outcome) -> None:
        self.ended.append((request.id, outcome))

    def refused(self, request: Request, reason: str) -> None:
        self.refusals.append(reason)

    def stepped(self, step: Step) -> None:
        self.steps.append(step)

    def shadowed(self, shadowed: Shadowed) -> None:
        self.shadows.append(shadowed)


@asynccontextmanager
async def running(
    model: Transformer | None = None,
    backends: Backends | None = None,
    watcher: Watcher | None = None,
    tokenizer: Tokenizer | None = None,
    **config: Any,
) -> AsyncIterator[Engine]:
    """A started engine, stopped on leaving. The budget is 64 MiB unless the config says otherwise."""
    model = model or make_model()
    settings = EngineConfig(**({"memory_budget_bytes": 64 * 2**20} | config))
    engine = Engine(model, tokenizer or make_tokenizer(), backends or make_backends(model), settings, watcher)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def completion(
    prompt: str | list[int] = "abc", backend: str | None = None, n: int = 1, deadline: float | None = None, **sampling: Any
) -> Request:
    """A greedy completion request unless the sampling says otherwise; it ignores the end-of-text token."""
    tokens = list(prompt.encode()) if isinstance(prompt, str) else prompt
    settings = Sampling(**({"temperature": 0.0, "max_tokens": 8, "ignore_eos": True} | sampling))
    return Request(f"r{next(_ids)}", "completion", tokens, backend, settings, n, deadline)


def embedding(prompt: str | list[int] = "abc", backend: str | None = None, deadline: float | None = None) -> Request:
    tokens = list(prompt.encode()) if isinstance(prompt, str) else prompt
    return Request(f"r{next(_ids)}", "embedding", tokens, backend, deadline=deadline)


async def complete(engine: Engine, request: Request) -> list[Delta]:
    """All deltas of a completion."""
    deltas = [item async for item in engine.submit(request)]
    assert all(isinstance(item, Delta) for item in deltas)
    return deltas  # type: ignore[return-value]


async def told(engine: Engine, request: Request) -> list[tuple[Any, ...]]:
    """All that an answer says, each sample by itself, however it was cut into deltas."""
    samples: dict[int, list[Delta]] = {}
    for delta in await complete(engine, request):
        samples.setdefault(delta.index, []).append(delta)
    return [
        (
            index,
            "".join(delta.text for delta in deltas),
            [token for delta in deltas for token in delta.tokens],
            [each for delta in deltas for each in delta.logprobs or ()],
            deltas[-1].finish_reason,
        )
        for index, deltas in sorted(samples.items())
    ]


async def tokens_of(engine: Engine, request: Request) -> list[int]:
    """All tokens of a completion's first sample."""
    return [token for delta in await complete(engine, request) if delta.index == 0 for token in delta.tokens]


async def embed(engine: Engine, request: Request) -> list[float]:
    (item,) = [item async for item in engine.submit(request)]
    assert isinstance(item, Embedding)
    return item.vector


def prompt(length: int, seed: int = 0) -> list[int]:
    """Some bytes."""
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def is_empty(engine: Engine) -> bool:
    """Whether the engine holds nothing of any request."""
    levels = engine.snapshot()
    held = (levels.running, levels.waiting, levels.waiting_tokens, levels.bytes_in_use)
    return not any((*held, *levels.pool_bytes.values(), *levels.pool_slots.values()))


async def until(condition: Callable[[], object], seconds: float = 10) -> None:
    """Wait until a condition holds; fail after so many seconds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


def disturb(model: Transformer, trouble: Callable[[Tensor, Tensor], None]) -> Transformer:
    """A model whose every call first does `trouble(tokens, positions)`, behind its first layer."""
    stages = model.stages

    def disturbed(tokens: Tensor, positions: Tensor, *rest: Any) -> Stages:
        inner = stages(tokens, positions, *rest)
        question = inner.send((yield next(inner)))
        trouble(tokens, positions)
        while True:
            try:
                question = inner.send((yield question))
            except StopIteration as end:
                return end.value

    model.stages = disturbed  # type: ignore[method-assign]
    return model
