"""What the loader takes and what it refuses: every field, file and tensor is read, known to be harmless, or refused by name."""

from __future__ import annotations

import itertools
import json
import math
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from service.model import families, rotary
from service.model.checkpoint import EMBEDDED, choose_dtype, id_of, load, save
from service.model.config import Fields, ModelConfig
from service.model.projection import can_pack
from service.model.transformer import Transformer
from tests.model.checkpoints import DECODERS, TINY, VOCABULARY, change, draw, our_logits, their_logits, theirs, write

Tensors = dict[str, Tensor]


def edit(directory: Path, how: Callable[[Tensors], object]) -> None:
    """Rewrite a checkpoint's tensors."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    how(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def in_shards(directory: Path) -> dict[str, str]:
    """Split a checkpoint into two files with an index; returns the index's map."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(places.values()):
        save_file({name: tensors[name] for name in places if places[name] == shard}, directory / shard, {"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return places


def answers_like_transformers(directory: Path) -> bool:
    tokens = draw(100)
    return bool(
        (our_logits(load(directory, dtype="float32").model, tokens) - their_logits(directory, tokens)).abs().max() < 1e-4
    )


# ---- configs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "fields", "says"),
    [
        ("qwen3", {"model_type": "mamba"}, "model_type must be one of .*qwen3.*'mamba'"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        (
            "qwen3",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 1e4},
            "rope_type must be one of .*'dynamic'",
        ),
        (
            "qwen3",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mrope_section": [1]}, "rope_theta": 1e4},
            "mrope_section",
        ),
        ("qwen3", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}, "rope_theta": 1e4}, "low_freq_factor"),
        ("qwen3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_theta"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        ("llama", {"is_causal": False}, "is_causal must be True"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantized .gptq.*take the files that are not"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}}, "code of its own .*OddForCausalLM"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures must name LlamaForCausalLM"),
        ("llama", {"residual_multiplier": 0.5}, "does not know .residual_multiplier: 0.5"),
        ("llama", {"num_key_value_heads": 3}, "4 and 3"),
        ("llama", {"hidden_size": "48"}, "hidden_size must be a whole number above 0.*'48'"),
        ("llama", {"rms_norm_eps": -1}, "rms_norm_eps must be a number above 0"),
        ("llama", {"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be a whole number above 1"),
        ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types must say"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": False}, "sliding_window must be"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping must be None"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention must be False"),
        ("llama", {"head_dim": 9}, "head_dim 9 has 9 coordinates that turn"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 0}}, "factor must be a number above 0"),
        ("llama", {"rope_parameters": {"rope_theta": None}}, "rope_theta must be a number above 1"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]}},
            "a list of 8 numbers",
        ),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be False"),
    ],
)
def test_a_config_that_is_not_computed_is_refused_by_its_field(
    tmp_path: Path, family: str, fields: dict[str, Any], says: str
) -> None:
    write(tmp_path, family, **({"head_dim": 12} if family == "qwen2" else {}))
    change(tmp_path, **fields)
    with pytest.raises(ValueError, match=says) as refusal:
        load(tmp_path)
    assert str(tmp_path / "config.json") in str(refusal.value)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5000.0}),
        ("llama", {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": None}, "rope_theta": 5000.0}),
        ("llama", {"rope_parameters": None, "rope_theta": 777.0}),
        ("llama", {"rope_parameters": None}),
        ("mistral", {"sliding_window": ...}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 0, "layer_types": None}),
        ("smollm3", {"use_sliding_window": False, "sliding_window": 40}),
        ("gemma", {"hidden_act": "gelu"}),
        ("gemma3_text", {"layer_types": None, "_sliding_window_pattern": 1, "sliding_window": 20}),
        ("gpt2", {"activation_function": "relu"}),
        ("phi3", {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}}),
        ("llama", {"pruned_heads": {}, "use_odd_thing": False, "odd": None, "num_beams": 1, "id2label": {"0": "a"}}),
        ("llama", {"architectures": None, "num_key_value_heads": 2}),
    ],
)
def test_a_config_in_any_of_its_forms_means_what_transformers_takes_it_for(
    tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    write(tmp_path, family, **({"head_dim": 12} if family in ("qwen2", "phi3") else {}))
    change(tmp_path, **{name: None if value is ... else value for name, value in fields.items()})
    assert answers_like_transformers(tmp_path)


ROPE = ("rope_type", "rope_theta", "factor", "short_factor", "mscale", "truncate", "partial_rotary_factor", "full_attention")
LEAVES = (
    st.none() | st.booleans() | st.integers(-2, 70) | st.just(10**30) | st.floats() | st.sampled_from(["", "yarn", "longrope"])
)
ANYTHING = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(ROPE), x, max_size=4))


@pytest.mark.parametrize("family", families.names())
@given(data=st.data())
def test_a_field_of_any_kind_is_read_or_refused_in_words(family: str, data: st.DataObject) -> None:
    known = Fields({})
    families.of(family).read(known)
    name = data.draw(st.sampled_from(sorted(known._read | {"architectures", "auto_map"})))
    try:
        config = families.read({"model_type": family, name: data.draw(ANYTHING)})
    except ValueError as refusal:
        assert str(refusal)
        return
    lengths = (2, config.max_length + 1)
    assert all(rotary.frequencies(r, config.head_dim, n).isfinite().all() for r in set(config.ropes) for n in lengths)


@pytest.mark.parametrize("family", DECODERS)
def test_an_absent_field_has_the_default_transformers_gives_it(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(family)
    ours = families.read({"model_type": family})
    pairs = {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_hidden_layers": "num_hidden_layers",
        "num_attention_heads": "num_attention_heads",
        "max_position_embeddings": "max_position_embeddings",
        "tie_word_embeddings": "tie_word_embeddings",
        "norm_eps": "layer_norm_epsilon" if family == "gpt2" else "rms_norm_eps",
    }
    assert {name: getattr(ours, name) for name in pairs} == {name: getattr(theirs, their) for name, their in pairs.items()}
    if family != "gpt2":
        width = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
        found = (ours.head_dim, ours.num_key_value_heads, ours.intermediate_size, ours.eos_token_id)
        assert found == (width, theirs.num_key_value_heads, theirs.intermediate_size, theirs.eos_token_id)
        if family == "gemma2":
            assert (ours.score_cap, ours.logit_cap) == (theirs.attn_logit_softcapping, theirs.final_logit_softcapping)
        window = getattr(theirs, "sliding_window", None)
        kinds = getattr(theirs, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * 32
        assert ours.windows == tuple(window - 1 if kind == "sliding_attention" else None for kind in kinds)[: len(ours.windows)]


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_ends_of_text_that_the_model_has_no_token_for_never_come(tmp_path: Path, file: str) -> None:
    """As of a GPT-2 of another vocabulary, whose file keeps the default; `min_tokens` would bar a row that is not there."""
    (write(tmp_path, "gpt2") / "generation_config.json").unlink()
    change(tmp_path, file, eos_token_id=[VOCABULARY, VOCABULARY - 1, -1])
    assert load(tmp_path).model.config.eos_token_ids == (VOCABULARY - 1,)


PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen2.5-7B-Instruct": {
        **{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "num_attention_heads": 28},
        **{"num_key_value_heads": 4, "max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False},
        **{"use_mrope": False, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16", "bos_token_id": 151643},
    },
    "SmolLM2-135M": {
        **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "is_llama_config": True, "rope_interleaved": False},
        **{"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "transformers.js_config": {"dtype": {}}},
        **{"pretraining_tp": 1, "mlp_bias": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True},
    },
    "SmolLM3-3B": {
        **{"model_type": "smollm3", "max_window_layers": 28, "no_rope_layer_interval": 4, "pretraining_tp": 2},
        **{"no_rope_layers": [1, 1, 1, 0] * 9, "layer_types": ["full_attention"] * 36, "sliding_window": None},
        **{"use_sliding_window": False, "rope_theta": 5e6, "attention_bias": False, "mlp_bias": False},
    },
    "gemma-2-9b": {
        **{"model_type": "gemma2", "hidden_size": 3584, "num_attention_heads": 16, "cache_implementation": "hybrid"},
        **{"hidden_act": "gelu_pytorch_tanh", "sliding_window": 4096, "sliding_window_size": 4096, "rope_theta": 10000.0},
    },
    "gemma-3-1b-it": {
        **{"model_type": "gemma3_text", "eos_token_id": [1, 106], "rope_local_base_freq": 10000, "rope_scaling": None},
        **{"rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "cache_implementation": "hybrid"},
    },
    "Phi-4-mini-instruct": {
        **{"model_type": "phi3", "partial_rotary_factor": 0.75, "interpolate_factor": 1, "full_attn_mod": 1},
        **{"lm_head_bias": False, "mlp_bias": False, "max_position_embeddings": 131072, "sliding_window": 262144},
        **{
            "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
        },
        **{"original_max_position_embeddings": 4096, "tie_word_embeddings": True, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
        **{"hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 8},
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48},
    },
    "distilgpt2": {
        **{"model_type": "gpt2", "_num_labels": 1, "n_ctx": 1024, "n_layer": 6, "id2label": {"0": "LABEL_0"}},
        **{"summary_type": "cls_index", "task_specific_params": {"text-generation": {"max_length": 50}}, "attn_pdrop": 0.1},
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_as_it_is_published_is_read(name: str) -> None:
    config = families.read(PUBLISHED[name])
    assert (config.native is not None) == (name in ("gemma-2-9b", "gemma-3-1b-it"))
    frequencies = [rotary.frequencies(rope, config.head_dim, config.max_length) for rope in config.ropes]
    assert all(each.isfinite().all() for each in frequencies)


def test_longrope_keeps_a_factor_that_a_file_states() -> None:
    stated = {**PUBLISHED["Phi-4-mini-instruct"]["rope_scaling"], "factor": 2.0}
    ropes = [families.read(PUBLISHED["Phi-4-mini-instruct"] | {"rope_scaling": each}).ropes[0] for each in (stated, None)]
    derived = families.read(PUBLISHED["Phi-4-mini-instruct"]).ropes[0]
    trained = math.log(4096)
    assert rotary.attention_factor(ropes[0]) == pytest.approx(math.sqrt(1 + math.log(2) / trained))
    assert rotary.attention_factor(derived) == pytest.approx(math.sqrt(1 + math.log(32) / trained))
    assert rotary.attention_factor(ropes[1]) == 1


def test_only_a_checkpoint_with_windows_of_its_own_makes_other_backends_lossy(tmp_path: Path) -> None:
    directories = (write(tmp_path / str(window), "mistral", sliding_window=window) for window in (32, None))
    windowed, full = (load(directory).model.config for directory in directories)
    assert windowed.native == {"windows": [31, 31]} and windowed.lossy("native") is None
    assert "windows of its own" in (windowed.lossy("dense") or "")
    assert full.native is None and full.lossy("dense") is None


def test_the_ends_of_text_are_those_of_the_generation_config_where_it_names_some(tmp_path: Path) -> None:
    write(tmp_path, "llama", eos_token_id=5)
    (tmp_path / "generation_config.json").unlink()
    assert load(tmp_path).model.config.eos_token_ids == (5,)
    change(tmp_path, "generation_config.json", temperature=0.6)
    assert load(tmp_path).model.config.eos_token_ids == (5,)
    change(tmp_path, "generation_config.json", eos_token_id=[7, 9])
    assert load(tmp_path).model.config.eos_token_ids == (7, 9)


# ---- tensors ----------------------------------------------------------------------------------------------------------------


def test_missing_and_unknown_tensors_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, "qwen3")
    kept = load_file(tmp_path / "model.safetensors")["model.norm.weight"]
    edit(tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 tensors.*model\.norm\.weight"):
        load(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"model.norm.weight": kept, "stranger": kept.clone()}))
    with pytest.raises(ValueError, match="stranger"):
        load(tmp_path)


def _swap_heights(tensors: Tensors) -> None:
    """q as high as k should be and the other way round: together they are as high as they must be."""
    q, k = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    tensors[q], tensors[k] = tensors[k], tensors[q]


def _poison(value: float, name: str = "model.layers.1.mlp.up_proj.weight") -> Callable[[Tensors], None]:
    return lambda tensors: tensors[name].view(-1)[7:8].fill_(value)  # type: ignore[return-value]


def _requantize(tensors: Tensors) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (_swap_heights, r"k_proj.weight must have shape \(32, 48\).*\(64, 48\)|q_proj.weight must have shape"),
        (_poison(float("nan")), "up_proj.weight in .*model.safetensors holds NaN or infinity"),
        (
            lambda t: t.update({EMBEDDING: t[EMBEDDING].double() * 1e300}),
            "embed_tokens.weight in .*or numbers beyond torch",
        ),
        (_poison(float("-inf")), "up_proj.weight in .*model.safetensors holds NaN or infinity"),
        (_requantize, "F8_E4M3: quantized to FP8"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.zeros(3, dtype=torch.int32)}), "GPTQ or AWQ"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight.absmax": torch.zeros(3)}), "bitsandbytes"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.zeros(3)}), "FP8"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(48, dtype=torch.int32)}), "dtype I32"),
    ],
)
def test_weights_that_cannot_be_right_are_refused_by_name(tmp_path: Path, how: Callable[[Tensors], object], says: str) -> None:
    write(tmp_path, "llama")
    edit(tmp_path, how)
    with pytest.raises(ValueError, match=says):
        load(tmp_path)


def _with_tables(tensors: Tensors) -> None:
    tensors.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)})


def _with_masks(tensors: Tensors) -> None:
    tensors.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 9, 9), "transformer.h.0.attn.masked_bias": torch.ones(())})


def _with_head(head: Callable[[Tensors], Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({"lm_head.weight": head(tensors)})


EMBEDDING = "model.embed_tokens.weight"


def _without_prefix(prefix: str) -> Callable[[Tensors], None]:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix(prefix)] = tensors.pop(name)

    return rename


@pytest.mark.parametrize(
    ("family", "fields", "how"),
    [
        ("llama", {}, _with_tables),
        ("llama", {"tie_word_embeddings": True}, _without_prefix("model.")),
        ("gpt2", {}, _without_prefix("transformer.")),
        (
            "gpt2",
            {},
            lambda t: t.update(
                {"transformer.h.0.attn.bias": torch.ones(1, 1, 9, 9), "transformer.h.0.attn.masked_bias": torch.ones(())}
            ),
        ),
        ("llama", {"tie_word_embeddings": True}, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 0.5})),
        (
            "llama",
            {"tie_word_embeddings": True},
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
        ),
        ("llama", {"tie_word_embeddings": True}, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")})),
    ],
    ids=["tables", "no prefix", "no prefix in gpt2", "masks", "another head", "a repeated head", "the head alone"],
)
def test_files_as_people_have_them_load_as_in_transformers(
    tmp_path: Path, family: str, fields: dict[str, Any], how: Callable[[Tensors], object]
) -> None:
    write(tmp_path, family, **fields)
    edit(tmp_path, how)
    assert answers_like_transformers(tmp_path)


def test_a_head_that_differs_from_the_embeddings_it_should_be_tied_to_counts(tmp_path: Path) -> None:
    write(tmp_path, "llama", tie_word_embeddings=True)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 0.5}))
    model = load(tmp_path, dtype="float32").model
    assert not model.config.tie_word_embeddings and not torch.equal(model.head.weight, model.embed.weight)
    assert torch.equal(model.head.weight, theirs(tmp_path).lm_head.weight)


# ---- files ------------------------------------------------------------------------------------------------------------------


def test_a_sharded_checkpoint_loads_like_a_whole_one(tmp_path: Path) -> None:
    whole = load(write(tmp_path, "qwen3"), dtype="float32").model
    in_shards(tmp_path)
    again = load(tmp_path, dtype="float32").model
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_leftover_index_beside_the_whole_file_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, "qwen3")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}})
    )
    assert answers_like_transformers(tmp_path)


@pytest.mark.parametrize(
    "place",
    ["../elsewhere.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", 3, ["a"], f"{'a' * 300}.safetensors"],
)
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, place: object) -> None:
    places = in_shards(write(tmp_path, "qwen3"))
    change(tmp_path, "model.safetensors.index.json", weight_map=places | {"model.norm.weight": place})
    with pytest.raises(ValueError, match=r"names .*no \.safetensors file of its folder"):
        load(tmp_path)


def test_an_index_that_says_another_file_than_a_tensor_is_in_is_refused(tmp_path: Path) -> None:
    places = in_shards(write(tmp_path, "qwen3"))
    other = {"model-0.safetensors": "model-1.safetensors", "model-1.safetensors": "model-0.safetensors"}
    moved = places | {"model.norm.weight": other[places["model.norm.weight"]]}
    change(tmp_path, "model.safetensors.index.json", weight_map=moved)
    with pytest.raises(ValueError, match="is not in model"):
        load(tmp_path)


def _cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _pointer(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (_cut, r"model\.safetensors is cut short or damaged.*download it again"),
        (_pointer("model.safetensors"), r"model\.safetensors is a pointer of Git LFS.*git lfs pull"),
        (_pointer("config.json"), r"config\.json is a pointer of Git LFS"),
        (_pointer("tokenizer.json"), r"tokenizer\.json is a pointer of Git LFS"),
        (lambda d: (d / "config.json").write_text("{"), r"config\.json is no JSON.*download it again"),
        (lambda d: (d / "config.json").write_text("[" * 100_000), r"config\.json is no JSON.*download it again"),
        (lambda d: (d / "config.json").write_text("[]"), r"config\.json must hold a JSON object"),
        (lambda d: (d / "config.json").unlink(), "no config.json in .*Hugging Face format"),
        (lambda d: (d / "config.json").rename(d / "adapter_config.json"), "adapter_config.json is another format"),
        (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors in .*only safetensors"),
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pytorch_model.bin is not.*save_pretrained"),
        (
            lambda d: (d / "tokenizer.json").rename(d / "tokenizer.model"),
            "tokenizer.model, of which .*AutoTokenizer",
        ),
        (lambda d: (d / in_shards(d)["model.norm.weight"]).unlink(), r"no model-\d\.safetensors in"),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_named_with_what_to_do(
    tmp_path: Path, how: Callable[[Path], object], says: str
) -> None:
    how(write(tmp_path, "qwen3"))
    with pytest.raises((FileNotFoundError, ValueError), match=says):
        load(tmp_path)


def test_a_repository_of_a_hub_in_the_place_of_a_directory_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Qwen/Qwen3-0\.6B is a repository of a hub, download it"):
        load(tmp_path / "Qwen" / "Qwen3-0.6B")
    with pytest.raises(FileNotFoundError, match="no directory"):
        load(tmp_path / "nowhere")


def test_the_id_is_the_name_of_directory_or_repository(tmp_path: Path) -> None:
    cached = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "0123abc"
    plain = tmp_path / "my-model"
    for directory in (cached, plain):
        directory.mkdir(parents=True)
    assert [id_of(each) for each in (cached, plain, EMBEDDED)] == ["Qwen/Qwen3-0.6B", "my-model", "longserve-stdlib-5m"]
    write(plain, "qwen3")
    change(plain, _name_or_path="/home/somebody/run-17")
    assert load(plain).id == "my-model"


LOADING = """
import sys, threading, time
from pathlib import Path
from service.model import checkpoint

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous"))

def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return int(fields["VmRSS"].split()[0])

checkpoint.load(checkpoint.EMBEDDED, "float32")  # what loading anything takes
before, most, is_over = resident(), 0, False

def watch():
    global most
    while not is_over:
        most = max(most, resident())
        time.sleep(0.0005)

watcher = threading.Thread(target=watch)
watcher.start()
loaded = checkpoint.load(Path(sys.argv[1]), sys.argv[2])
is_over = True
watcher.join()
print((most - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident bytes are read from Linux")
@pytest.mark.parametrize("is_sharded", [False, True])
def test_loading_never_holds_much_more_than_the_file(tmp_path: Path, is_sharded: bool) -> None:
    write(tmp_path, "llama", hidden_size=1024, intermediate_size=2048, num_hidden_layers=5, num_attention_heads=16, head_dim=64)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 150e6
    if is_sharded:
        in_shards(tmp_path)
    told = subprocess.run([sys.executable, "-c", LOADING, tmp_path, "float32"], capture_output=True, text=True, check=True)
    assert int(told.stdout) <= 1.3 * size


# ---- what is loaded ---------------------------------------------------------------------------------------------------------


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
    for layer in loaded.stack:
        layer.is_native = False  # whose roundings are others, see test_native.py
    plain = Transformer(loaded.config).to(torch.bfloat16)
    weights = {name: weight.to_dense() for name, weight in loaded.state_dict().items()}
    plain.load_state_dict(weights | {"embed.weight": loaded.embed(torch.arange(loaded.config.vocab_size))})
    assert can_pack(plain.stack[0].qkv.weight) == loaded.stack[0].qkv.weight.is_mkldnn
    for count in (1, 3, 64, 700):
        tokens = draw(count, seed=count)
        assert torch.equal(our_logits(loaded, tokens), our_logits(plain, tokens)), count


@pytest.mark.parametrize(("has_it", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_dtype_is_that_of_the_machine_however_busy_it_is(
    monkeypatch: pytest.MonkeyPatch, has_it: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_it)
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: random.Random(next(ticks)).random())  # as of a machine that stands still
    assert {choose_dtype("auto", "cpu")[0] for _ in range(20)} == {dtype}


def test_float16_is_refused_on_cpu() -> None:
    with pytest.raises(ValueError, match="float16"):
        choose_dtype("float16", "cpu")


def test_a_bfloat16_model_turns_far_positions_by_the_same_angles_as_a_float32_one() -> None:
    config: ModelConfig = families.read({**TINY, "model_type": "qwen3", "max_position_embeddings": 32_768})
    positions = torch.tensor([0, 1, config.max_position_embeddings // 2, config.max_position_embeddings - 1])
    (wide,), (narrow,) = (Transformer(config).to(dtype).rotation(positions) for dtype in (torch.float32, torch.bfloat16))
    for expected, received in zip(wide, narrow, strict=True):
        torch.testing.assert_close(received.float(), expected, atol=2**-8, rtol=0)  # rounding of a number up to 1


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2"])
def test_a_family_that_the_layer_kernel_does_not_compute_is_computed_by_torch_and_says_so(tmp_path: Path, family: str) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32} if family != "gpt2" else {"n_embd": 128}
    assert load(write(tmp_path, family, **shape), dtype="float32").model.impl == "torch"
