"""The architecture is Qwen3's: the same directory opened by transformers gives the same logits. And the loader's refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import attention
from attention import Segments
from service.model.checkpoint import EMBEDDED, choose_dtype, load, save
from service.model.transformer import ModelConfig, Transformer, can_pack, rotary_frequencies

TINY = {
    "vocab_size": 4096,
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
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def our_logits(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    backend = attention.build("dense", None, model.head_shape())
    segments = Segments((len(tokens),))
    with torch.inference_mode():
        hidden = model.hidden(
            tokens, torch.arange(len(tokens)), lambda layer, q, k, v: backend.attend(q, k, v, segments, causal=True)
        )
        return model.logits(hidden)


def their_logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        return theirs(tokens[None]).logits[0]


def write_random(directory: Path, family: str, **changes: object) -> None:
    """A random checkpoint of a family, made by transformers, with a tokenizer beside it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **(TINY | changes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):  # fresh ones are all ones or zeros and would hide a mix-up
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((EMBEDDED / name).read_bytes())


def test_the_embedded_checkpoint_gives_the_logits_transformers_gives() -> None:
    checkpoint = load(EMBEDDED, dtype="float32")
    text = Path(json.__file__).read_text()
    tokens = torch.tensor(checkpoint.tokenizer.encode(text)[:600])
    torch.testing.assert_close(our_logits(checkpoint.model, tokens), their_logits(EMBEDDED, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {}),
        ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
        ("qwen2", {"head_dim": 12}),
        ("llama", {"rope_parameters": LLAMA3_ROPE}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, "mlp_bias": True}),
        ("mistral", {"sliding_window": None}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_each_family_gives_the_logits_transformers_gives(tmp_path: Path, family: str, changes: dict[str, object]) -> None:
    write_random(tmp_path, family, **changes)
    tokens = torch.randint(0, 4096, (200,), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        our_logits(load(tmp_path, dtype="float32").model, tokens), their_logits(tmp_path, tokens), rtol=0, atol=1e-4
    )


def test_a_saved_model_loads_with_equal_weights(tmp_path: Path) -> None:
    original = load(EMBEDDED, dtype="bfloat16").model
    save(original, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((EMBEDDED / name).read_bytes())
    again = load(tmp_path, dtype="bfloat16").model
    pairs = list(zip(original.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a.to_dense(), b.to_dense()) for a, b in pairs)


def test_packed_weights_give_the_same_products_to_the_bit() -> None:
    loaded = load(EMBEDDED, dtype="bfloat16").model
    for layer in loaded.decoder:
        layer.is_native = False  # whose roundings are others, see test_native.py
    plain = Transformer(loaded.config).to(torch.bfloat16)
    plain.load_state_dict({name: weight.to_dense() for name, weight in loaded.state_dict().items()})
    assert can_pack(plain.decoder[0].qkv.weight) == loaded.decoder[0].qkv.weight.is_mkldnn
    for count in (1, 3, 64, 700):
        tokens = torch.randint(0, 4096, (count,), generator=torch.Generator().manual_seed(count))
        assert torch.equal(our_logits(loaded, tokens), our_logits(plain, tokens)), count


def test_a_sharded_checkpoint_loads_like_a_whole_one(tmp_path: Path) -> None:
    write_random(tmp_path, "qwen3")
    whole = load(tmp_path, dtype="float32").model
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    again = load(tmp_path, dtype="float32").model
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
    ],
)
def test_an_architecture_we_do_not_compute_is_refused_by_name(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ModelConfig.from_dict(TINY | {"model_type": "qwen3"} | change)


def test_missing_and_unknown_tensors_are_refused_by_name(tmp_path: Path) -> None:
    write_random(tmp_path, "qwen3")
    tensors = load_file(tmp_path / "model.safetensors")
    lost = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        load(tmp_path)
    save_file(tensors | {"model.norm.weight": lost, "stranger": lost.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="stranger"):
        load(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    write_random(tmp_path, "qwen3")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="only safetensors"):
        load(tmp_path)


def test_float16_is_refused_on_cpu() -> None:
    with pytest.raises(ValueError, match="float16"):
        choose_dtype("float16", "cpu")


def test_rotary_frequencies_fall_from_one_to_almost_nothing() -> None:
    frequencies = rotary_frequencies({"rope_type": "default", "rope_theta": 10000.0}, 64)
    assert frequencies[0] == 1.0
    assert torch.all(frequencies[1:] < frequencies[:-1])


def test_a_bfloat16_model_turns_far_positions_by_the_same_angles_as_a_float32_one() -> None:
    config = ModelConfig.from_dict({**TINY, "model_type": "qwen3", "max_position_embeddings": 32_768})
    positions = torch.tensor([0, 1, config.max_position_embeddings // 2, config.max_position_embeddings - 1])
    wide, narrow = (Transformer(config).to(dtype).rotation(positions) for dtype in (torch.float32, torch.bfloat16))
    for expected, received in zip(wide, narrow, strict=True):
        torch.testing.assert_close(received.float(), expected, atol=2**-8, rtol=0)  # rounding of a number up to 1
