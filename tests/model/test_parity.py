"""Every family answers as transformers does: logits of short and long texts, greedy answers, bare and through the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from service.engine.allowlist import Backends
from service.model.checkpoint import EMBEDDED, load
from tests.engine import world
from tests.model.checkpoints import draw, our_logits, own_backend, their_answer, their_logits, write

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
SLIDING, FULL = "sliding_attention", "full_attention"
DEEP: dict[str, Any] = {"num_hidden_layers": 4}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "qwen3 tied, with biases": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen3 by layer types": ("qwen3", {"use_sliding_window": True, "sliding_window": 24, "layer_types": [SLIDING, FULL]}),
    "qwen3 yarn": ("qwen3", {"rope_parameters": YARN}),
    "qwen2": ("qwen2", {"head_dim": 12}),
    "qwen2 windows behind the first layers": (
        "qwen2",
        {"head_dim": 12, "use_sliding_window": True, "sliding_window": 33, "max_window_layers": 1, **DEEP},
    ),
    "llama": ("llama", {}),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama linear, biases everywhere": (
        "llama",
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
            "mlp_bias": True,
            "attention_bias": True,
        },
    ),
    "mistral without windows": ("mistral", {"sliding_window": None}),
    "mistral with windows": ("mistral", {"sliding_window": 32}),
    "mistral with a window longer than its context": ("mistral", {"sliding_window": 512}),
    "smollm3": ("smollm3", {"head_dim": 12, **DEEP}),
    "smollm3 with windows": ("smollm3", {"head_dim": 12, "use_sliding_window": True, "sliding_window": 17, **DEEP}),
    "gemma3": ("gemma3_text", {"sliding_window": 20, "num_hidden_layers": 7, "query_pre_attn_scalar": 11}),
    "gemma3 stretched": (
        "gemma3_text",
        {
            "sliding_window": 20,
            "layer_types": [SLIDING, FULL],
            "rope_parameters": {
                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma2": ("gemma2", {"sliding_window": 20, "attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 11, **DEEP}),
    "gemma2 without windows": ("gemma2", {"sliding_window": 512, "attn_logit_softcapping": 0.5}),
    "gemma2 uncapped scores": (
        "gemma2",
        {"sliding_window": 20, "attn_logit_softcapping": None, "final_logit_softcapping": 3.0},
    ),
    "gpt2": ("gpt2", {}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 112}),
    "phi3": ("phi3", {"head_dim": 12, "sliding_window": 40}),
    "phi3 turning in part": (
        "phi3",
        {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.67}},
    ),
}


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
}


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, changes = CASES[request.param]
    return write(tmp_path_factory.mktemp("checkpoint"), family, **changes)


def test_the_embedded_checkpoint_gives_the_logits_transformers_gives() -> None:
    loaded = load(EMBEDDED, dtype="float32")
    tokens = torch.tensor(loaded.tokenizer.encode(Path(json.__file__).read_text())[:600])
    torch.testing.assert_close(our_logits(loaded.model, tokens), their_logits(EMBEDDED, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("count", "chunk"), [(7, None), (400, None), (400, 61)], ids=["short", "long", "long, in chunks"])
def test_each_family_gives_the_logits_transformers_gives(checkpoint: Path, count: int, chunk: int | None) -> None:
    tokens, model = draw(count), load(checkpoint, dtype="float32").model
    expected = their_logits(checkpoint, tokens)
    assert expected.std() > 0.1, "logits that are all alike would show nothing"
    torch.testing.assert_close(our_logits(model, tokens, chunk), expected, rtol=0, atol=1e-4)


async def test_the_engine_gives_the_greedy_answer_transformers_gives(checkpoint: Path) -> None:
    loaded, prompt = load(checkpoint, dtype="float32"), draw(90)
    backends = Backends({"own": own_backend(loaded.model)}, "own")
    async with world.running(loaded.model, backends, tokenizer=loaded.tokenizer, chunk_tokens=32) as engine:
        ours = await world.tokens_of(engine, world.completion(prompt.tolist(), max_tokens=64))
    assert ours == their_answer(checkpoint, prompt, 64)


@pytest.mark.parametrize(("length", "max_length"), [(60, 128), (300, None)], ids=["short", "long"])
async def test_longrope_takes_the_factors_of_the_served_length(tmp_path: Path, length: int, max_length: int | None) -> None:
    """transformers takes those of each text: the short ones up to the trained length, else the long ones."""
    write(tmp_path, "phi3", head_dim=12, rope_parameters=LONGROPE, original_max_position_embeddings=128)
    loaded, tokens = load(tmp_path, dtype="float32", max_length=max_length), draw(length)
    assert loaded.max_length == (max_length or 512)
    torch.testing.assert_close(our_logits(loaded.model, tokens, 61), their_logits(tmp_path, tokens), rtol=0, atol=1e-4)
    backends = Backends({"own": own_backend(loaded.model)}, "own")
    async with world.running(loaded.model, backends, tokenizer=loaded.tokenizer, chunk_tokens=32) as engine:
        ours = await world.tokens_of(engine, world.completion(tokens.tolist(), max_tokens=64))
    assert ours == their_answer(tmp_path, tokens, 64)


def test_a_length_beyond_the_context_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_length is 513, the checkpoint's context 512"):
        load(write(tmp_path, "llama"), max_length=513)
