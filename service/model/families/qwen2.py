"""Qwen2 and 2.5 (arXiv 2407.10671): Llama with biases on q, k, v, and windows in the last layers where a file asks."""

from __future__ import annotations

from typing import Any

from service.model import rotary
from service.model.config import Fields, ModelConfig, windows
from service.model.families.llama import shape
from service.model.families.llama import weights as weights

ARCHITECTURE = "Qwen2ForCausalLM"
PREFIX = "model."


def stated_alike(fields: Fields, **defaults: Any) -> dict[str, Any]:
    """What Qwen2 and Qwen3 state alike."""
    fields.is_one("hidden_act", "silu")
    stated = shape(fields, longest=32768, vocabulary=151936, intermediate=22016, groups=32, **defaults)
    layers, longest = stated["num_hidden_layers"], stated["max_position_embeddings"]
    window, full = fields.get("sliding_window", 4096), fields.count("max_window_layers", 28, least=0)
    window = window if fields.flag("use_sliding_window") else None
    kinds = ["sliding_attention" if window is not None and i >= full else "full_attention" for i in range(layers)]
    stated["windows"] = windows(fields, layers, window, kinds, longest)
    stated["ropes"] = (rotary.read(fields, 10000.0, longest),) * layers
    return stated


def read(fields: Fields) -> ModelConfig:
    fields.get("attention_bias")  # the biases are there whatever it says
    return ModelConfig(model_type="qwen2", **stated_alike(fields), attention_bias=True)
