"""Gemma (arXiv 2403.08295): Llama with norms that multiply by one more than their weight, GELU, and embeddings scaled by √C."""

from __future__ import annotations

from typing import Any

from service.model import rotary
from service.model.config import Fields, ModelConfig
from service.model.families.llama import shape
from service.model.families.llama import weights as weights

ARCHITECTURE = "GemmaForCausalLM"
PREFIX = "model."


def block(fields: Fields, stated: dict[str, Any]) -> dict[str, Any]:
    """How all Gemmas compute."""
    fields.is_one("use_bidirectional_attention", False, None)
    bias = fields.flag("attention_bias")
    return {
        "attention_bias": bias,
        "output_bias": bias,
        "norm": "gemma",
        "activation": "gelu_tanh",
        "embed_scale": stated["hidden_size"] ** 0.5,
    }


def read(fields: Fields) -> ModelConfig:
    fields.is_one("hidden_act", "gelu_pytorch_tanh", "gelu")  # the first files say gelu, and mean the other
    fields.is_one("hidden_activation", "gelu_pytorch_tanh", None)  # which nothing reads
    widths = {"hidden": 3072, "layers": 28, "heads": 16, "groups": 16, "head_dim": 256, "intermediate": 24576}
    stated = shape(fields, longest=8192, vocabulary=256000, tied=True, eos=1, **widths)
    rope = rotary.read(fields, 10000.0, stated["max_position_embeddings"])
    return ModelConfig(model_type="gemma", **stated, ropes=(rope,) * stated["num_hidden_layers"], **block(fields, stated))
