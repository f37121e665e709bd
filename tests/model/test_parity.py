"""Every family answers as transformers does: logits of short and long texts, greedy answers, bare and through the engine."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from service.engine.allowlist import Backends
from service.model import rotary
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
    "gemma": ("gemma", {"attention_bias": True}),
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


@pytest.mark.parametrize("length", [128, 4096])
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("stated", [{"rope_type": "linear", "factor": 3.7}, LLAMA3_ROPE, YARN, LONGROPE])
def test_frequencies_are_those_of_transformers_to_the_bit(stated: dict[str, Any], theta: float, length: int) -> None:
    """Their last bit would move far positions by more than float32 loses."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = {"original_max_position_embeddings": 512} | stated | {"rope_theta": theta}
    given = {name: each for name, each in given.items() if stated["rope_type"] != "linear" or name[0] != "o"}
    config = LlamaConfig(head_dim=12, max_position_embeddings=4096, rope_parameters=given)
    wanted, _ = ROPE_INIT_FUNCTIONS[stated["rope_type"]](config, "cpu", seq_len=length)
    assert torch.equal(rotary.frequencies(rotary.normal(given, 4096), 12, length), wanted)


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


TRAINED = 128  # of the LongRoPE below


def stretched(directory: Path, trained: int = TRAINED) -> Path:
    """A checkpoint with two sets of factors. Trained for one token, transformers takes the long ones for all texts."""
    rope = {**LONGROPE, "original_max_position_embeddings": trained, "attention_factor": 1.1}
    return write(directory, "phi3", head_dim=12, rope_parameters=rope, original_max_position_embeddings=trained)


@pytest.mark.parametrize("chunk", [None, 61])
@pytest.mark.parametrize("length", [60, TRAINED, TRAINED + 1, 300])
@pytest.mark.parametrize("max_length", [TRAINED, None])
def test_longrope_takes_the_factors_that_transformers_takes_for_the_text(
    length: int, chunk: int | None, max_length: int | None, tmp_path: Path
) -> None:
    if max_length is not None and length > max_length:
        pytest.skip("longer than what is served")
    loaded, tokens = load(stretched(tmp_path), dtype="float32", max_length=max_length), draw(length)
    assert loaded.max_length == (max_length or 512)
    assert loaded.model.border == (TRAINED if max_length is None else None)
    ours = our_logits(loaded.model, tokens, chunk, total=length)
    torch.testing.assert_close(ours, their_logits(tmp_path, tokens), rtol=0, atol=1e-4)


async def test_requests_on_both_sides_of_longropes_border_share_a_batch(tmp_path: Path) -> None:
    """Each has the factors of what it may come to. transformers computes a text anew when its answer crosses over."""
    short, long, crossing = draw(60), draw(300), draw(100)
    loaded = load(stretched(tmp_path / "as it is"), dtype="float32")
    backends = Backends({"own": own_backend(loaded.model)}, "own")
    asked = [world.completion(each.tolist(), max_tokens=64) for each in (short, long, crossing)]
    async with world.running(loaded.model, backends, tokenizer=loaded.tokenizer, chunk_tokens=32) as engine:
        ours = await asyncio.gather(*(world.tokens_of(engine, each) for each in asked))
    assert ours[:2] == [their_answer(tmp_path / "as it is", each, 64) for each in (short, long)]
    assert ours[2] == their_answer(stretched(tmp_path / "long throughout", 1), crossing, 64)
    assert ours[2] != their_answer(tmp_path / "as it is", crossing, 64), "the factors make no difference here"


async def test_a_kept_prefix_is_not_taken_over_longropes_border(tmp_path: Path) -> None:
    loaded, prompt = load(stretched(tmp_path), dtype="float32"), draw(100).tolist()
    backends = Backends({"own": own_backend(loaded.model)}, "own")
    found: list[list[list[int]]] = []
    for order in ((8, 60), (60, 8)):
        async with world.running(loaded.model, backends, tokenizer=loaded.tokenizer, chunk_tokens=32) as engine:
            answers = {count: await world.tokens_of(engine, world.completion(prompt, max_tokens=count)) for count in order}
            again = await world.tokens_of(engine, world.completion(prompt, max_tokens=order[0]))
            assert again == answers[order[0]] and engine._prefixes.hits == 1
        found.append([answers[8], answers[60]])
    assert found[0] == found[1] and found[0][0] != found[0][1][:8]


def test_a_length_beyond_the_context_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_length is 513, the checkpoint's context 512"):
        load(write(tmp_path, "llama"), max_length=513)
