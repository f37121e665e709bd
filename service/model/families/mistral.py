"""Mistral 7B (arXiv 2310.06825): Llama with a window in every layer, up to version 0.1; later files say `null`."""

from __future__ import annotations

from service.model import rotary
from service.model.config import Fields, ModelConfig, windows
from service.model.families.llama import shape
from service.model.families.llama import weights as weights

ARCHITECTURE = "MistralForCausalLM"
PREFIX = "model."


def read(fields: Fields) -> ModelConfig:
    fields.is_one("hidden_act", "silu")
    stated = shape(fields, longest=4096 * 32, vocabulary=32000, intermediate=14336, groups=8, eos=2)
    layers, longest, window = stated["num_hidden_layers"], stated["max_position_embeddings"], fields.get("sliding_window", 4096)
    kind = "full_attention" if window is None else "sliding_attention"
    stated["windows"] = windows(fields, layers, window, (kind,) * layers, longest)
    return ModelConfig(model_type="mistral", **stated, ropes=(rotary.read(fields, 10000.0, longest),) * layers)
