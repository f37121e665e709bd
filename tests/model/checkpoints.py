"""Small seeded checkpoints of every decoder family, made by transformers, and what transformers answers with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attention
from attention import AttentionBackend, Segments
from service.model import families
from service.model.checkpoint import EMBEDDED
from service.model.transformer import Transformer

DECODERS = [name for name in families.names() if not families.of(name).ARCHITECTURE.endswith(families.MASKED)]
VOCABULARY = 4096  # of the embedded tokenizer, which stands beside every one of them
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "pad_token_id": 0,
}


def write(directory: Path, family: str, **changes: Any) -> Path:
    """A random checkpoint of a family, with a tokenizer beside it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    base = TINY if family != "gpt2" else {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 512}
    config = transformers.AutoConfig.for_model(family, **(base | changes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or name.endswith("bias"):  # fresh ones are all alike and would hide a mix-up
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
        elif "embed" not in name and "wte" not in name:
            torch.nn.init.normal_(parameter, std=0.12)
        else:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((EMBEDDED / name).read_bytes())
    return directory


def change(directory: Path, file: str = "config.json", **fields: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    raw = (json.loads((directory / file).read_text()) if (directory / file).is_file() else {}) | fields
    (directory / file).write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))


def draw(count: int, seed: int = 1) -> Tensor:
    """Some token ids."""
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def own_backend(model: Transformer) -> AttentionBackend:
    """The backend that a checkpoint is served under unless somebody asks for another."""
    native = model.config.native
    return attention.build("dense" if native is None else "native", native, model.head_shape())


def our_logits(
    model: Transformer,
    tokens: Tensor,
    chunk: int | None = None,
    backend: AttentionBackend | None = None,
    total: int | None = None,
) -> Tensor:
    """Logits at every token, the tokens taken in at once or in chunks. total: that the text may come to; None: `max_length`."""
    backend, layers = backend or own_backend(model), model.config.num_hidden_layers
    pool = backend.new_pool(layers, 2**30)
    slot, chunk, rows = pool.allocate(len(tokens)), chunk or len(tokens), []
    with torch.inference_mode():
        for start in range(0, len(tokens), chunk):
            some = tokens[start : start + chunk]
            segments = Segments((len(some),), (start,))
            hidden = model.hidden(
                some,
                segments.positions(),
                lambda layer, q, k, v, segments=segments: backend.extend(q, k, v, segments, pool, layer, [slot]),
                totals=None if total is None else torch.full((len(some),), total),
            )
            rows.append(model.logits(hidden))
    return torch.cat(rows)


def theirs(directory: Path) -> Any:
    """The model as transformers loads it."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")


def their_logits(directory: Path, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        return theirs(directory)(tokens[None]).logits[0]


def their_answer(directory: Path, prompt: Tensor, count: int) -> list[int]:
    """Their greedy continuation, which no end of text ends."""
    model = theirs(directory)
    for field in ("eos_token_id", "pad_token_id"):
        setattr(model.generation_config, field, None)
    with torch.inference_mode():
        told = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=count, do_sample=False)
    return told[0, len(prompt) :].tolist()
