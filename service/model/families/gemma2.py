"""Gemma 2 (arXiv 2408.00118): windows in every other layer, norms on both sides of its parts, capped scores and logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from service.model import rotary
from service.model.config import Fields, ModelConfig, windows
from service.model.families import gemma
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


def _cap(fields: Fields, name: str, default: float | None) -> float | None:
    return None if fields.get(name, default) is None else fields.number(name, default or 0.0)


def block(fields: Fields, stated: dict[str, Any], score_cap: float | None, logit_cap: float | None) -> dict[str, Any]:
    """How Gemma 2 and 3 compute. The caps are those where the file says none."""
    fields.is_one("hidden_activation", "gelu_pytorch_tanh")
    fields.get("hidden_act")  # older files have it, wrong, beside the other
    return {
        **gemma.block(fields, stated),
        "is_sandwiched": True,
        "query_scale": (stated["head_dim"] / fields.number("query_pre_attn_scalar", 256)) ** 0.5,
        "score_cap": _cap(fields, "attn_logit_softcapping", score_cap),
        "logit_cap": _cap(fields, "final_logit_softcapping", logit_cap),
    }


def read(fields: Fields) -> ModelConfig:
    stated = stated_alike(fields, longest=8192, vocabulary=256000)
    layers, longest = stated["num_hidden_layers"], stated["max_position_embeddings"]
    fields.is_one("sliding_window_size", None, fields.get("sliding_window", 4096))  # some files say it twice
    kinds = ["sliding_attention" if (i + 1) % 2 else "full_attention" for i in range(layers)]
    stated["windows"] = windows(fields, layers, fields.get("sliding_window", 4096), kinds, longest)
    stated["ropes"] = (rotary.read(fields, 10000.0, longest),) * layers
    return ModelConfig(model_type="gemma2", **stated, **block(fields, stated, score_cap=50.0, logit_cap=30.0))


def weights(config: ModelConfig) -> Iterator[Weight]:
    return decoder(config, NORMS)
