"""Gemma 3, its text models (arXiv 2503.19786): windows in five layers of six, where positions turn faster."""

from __future__ import annotations

from collections.abc import Iterator

from service.model import rotary
from service.model.config import Fields, ModelConfig, Rope, windows
from service.model.families.gemma2 import NORMS, block, stated_alike
from service.model.layout import Weight, decoder

ARCHITECTURE = "Gemma3ForCausalLM"
PREFIX = "model."


def read(fields: Fields) -> ModelConfig:
    fields.is_one("attn_logit_softcapping", None)  # transformers never applies it here
    stated = stated_alike(fields, longest=131_072, vocabulary=262_208)
    layers, longest = stated["num_hidden_layers"], stated["max_position_embeddings"]
    fields.get("_sliding_window_pattern")  # newer files have it beside layer_types, nothing reads it
    every = fields.count("sliding_window_pattern", 6)
    kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    stated["windows"] = windows(fields, layers, fields.get("sliding_window", 4096), kinds, longest)
    turns = {kind: _rope(fields, kind, longest) for kind in ("full_attention", "sliding_attention")}
    stated["ropes"] = tuple(turns[kind] for kind in fields.get("layer_types") or kinds)
    return ModelConfig(
        model_type="gemma3_text", **stated, **block(fields, stated, score_cap=None, logit_cap=None), qk_norm=True
    )


def _rope(fields: Fields, kind: str, longest: int) -> Rope:
    """The rotary positions of one kind of layer. `rope_scaling`, in older files, is of the layers without a window."""
    is_full = kind == "full_attention"
    base = fields.get("rope_theta", 1_000_000.0) if is_full else fields.get("rope_local_base_freq", 10000.0)
    both = fields.mapping("rope_parameters")
    if both and not set(both) <= {"full_attention", "sliding_attention"}:
        raise ValueError(f"rope_parameters must be those of full_attention and of sliding_attention, received {both}")
    stated = fields.mapping("rope_scaling") if is_full else {}
    return rotary.normal({"rope_theta": base} | rotary.of_kind(both, kind) | stated, longest)


def weights(config: ModelConfig) -> Iterator[Weight]:
    return decoder(config, NORMS)
