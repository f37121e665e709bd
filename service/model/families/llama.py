"""Llama 1 to 3, SmolLM2 and what else says `llama`: RMSNorm, rotary positions, grouped queries, SwiGLU (arXiv 2302.13971)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from service.model import rotary
from service.model.config import Fields, ModelConfig, eos_token_ids
from service.model.layout import Weight, decoder

ARCHITECTURE = "LlamaForCausalLM"
PREFIX = "model."


def shape(fields: Fields, **defaults: Any) -> dict[str, Any]:
    """The widths, counts and rotary positions that all of Llama's kin state alike, with transformers' defaults."""
    heads = fields.count("num_attention_heads", defaults.get("heads", 32))
    hidden = fields.count("hidden_size", defaults.get("hidden", 4096))
    layers = fields.count("num_hidden_layers", defaults.get("layers", 32))
    longest = fields.count("max_position_embeddings", defaults["longest"])
    is_null = fields.get("num_key_value_heads", defaults.get("groups")) is None
    groups = heads if is_null else fields.count("num_key_value_heads", defaults.get("groups", heads))
    if not fields.has("head_dim") and "head_dim" not in defaults and hidden % heads:
        raise ValueError(f"hidden_size must be a multiple of num_attention_heads, the checkpoint says {hidden} and {heads}")
    return {
        "vocab_size": fields.count("vocab_size", defaults["vocabulary"]),
        "hidden_size": hidden,
        "intermediate_size": fields.count("intermediate_size", defaults["intermediate"]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": fields.count("head_dim", defaults.get("head_dim", hidden // heads)),
        "max_position_embeddings": longest,
        "norm_eps": fields.number("rms_norm_eps", defaults.get("eps", 1e-6)),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", defaults.get("tied", False)),
        "eos_token_ids": eos_token_ids(fields.get("eos_token_id", defaults.get("eos"))),
        "windows": (None,) * layers,
    }


def read(fields: Fields) -> ModelConfig:
    fields.is_one("hidden_act", "silu")
    stated = shape(fields, longest=2048, vocabulary=32000, intermediate=11008, eos=2)
    rope = rotary.read(fields, 10000.0, stated["max_position_embeddings"])
    bias = fields.flag("attention_bias")
    return ModelConfig(
        model_type="llama",
        **stated,
        ropes=(rope,) * stated["num_hidden_layers"],
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
    )


def weights(config: ModelConfig) -> Iterator[Weight]:
    return decoder(config)
