"""Gemma 2 (arXiv 2408.00118): windows in every other layer, norms on both sides of its parts, capped logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from service.model import rotary
from service.model.config import Fields, ModelConfig, windows
from service.model.families.llama import shape
from service.model.layout import Weight, decoder

ARCHITECTURE = "Gemma2ForCausalLM"
PREFIX = "model."
NORMS = {
    "attention_norm": "input_layernorm",
    "attention_end_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_end_norm": "post_feedforward_layernorm",
}


def stated_alike(fields: Fields, **defaults: Any) -> dict[str, Any]:
    """The widths and counts that Gemma 2 and 3 state alike."""
    widths = {"hidden": 2304, "layers": 26, "heads": 8, "groups": 4, "head_dim": 256, "intermediate": 9216}
    return shape(fields, tied=True, eos=1, **widths, **defaults)


def block(fields: Fields, stated: dict[str, Any], cap: float | None) -> dict[str, Any]:
    """How Gemma 2 and 3 compute. cap: of the logits, where the file does not say it."""
    fields.is_one("hidden_activation", "gelu_pytorch_tanh")
    fields.get("hidden_act")  # older files have it, wrong, beside the other
    fields.is_one("use_bidirectional_attention", False, None)
    bias, scalar = fields.flag("attention_bias"), fields.number("query_pre_attn_scalar", 256)
    is_capped = fields.get("final_logit_softcapping", cap) is not None
    return {
        "attention_bias": bias,
        "output_bias": bias,
        "norm": "gemma",
        "is_sandwiched": True,
        "activation": "gelu_tanh",
        "query_scale": (stated["head_dim"] / scalar) ** 0.5,
        "embed_scale": stated["hidden_size"] ** 0.5,
        "logit_cap": fields.number("final_logit_softcapping", cap or 0.0) if is_capped else None,
    }


def read(fields: Fields) -> ModelConfig:
    if fields.get("attn_logit_softcapping", 50.0) is not None:
        raise ValueError("attn_logit_softcapping: attention here does not cap its scores; without the cap answers differ")
    stated = stated_alike(fields, longest=8192, vocabulary=256000)
    layers, longest = stated["num_hidden_layers"], stated["max_position_embeddings"]
    kinds = ["sliding_attention" if (i + 1) % 2 else "full_attention" for i in range(layers)]
    stated["windows"] = windows(fields, layers, fields.get("sliding_window", 4096), kinds, longest)
    stated["ropes"] = (rotary.read(fields, 10000.0, longest),) * layers
    return ModelConfig(model_type="gemma2", **stated, **block(fields, stated, cap=30.0))


def weights(config: ModelConfig) -> Iterator[Weight]:
    return decoder(config, NORMS)
