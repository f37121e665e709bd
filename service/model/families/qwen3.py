"""Qwen3 (arXiv 2505.09388), the embedded model's family: Llama with norms on each head's queries and keys."""

from __future__ import annotations

from service.model.config import Fields, ModelConfig
from service.model.families.llama import weights as weights
from service.model.families.qwen2 import stated_alike

ARCHITECTURE = "Qwen3ForCausalLM"
PREFIX = "model."


def read(fields: Fields) -> ModelConfig:
    stated, bias = stated_alike(fields, head_dim=128), fields.flag("attention_bias")
    return ModelConfig(model_type="qwen3", **stated, attention_bias=bias, output_bias=bias, qk_norm=True)
