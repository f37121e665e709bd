"""SmolLM3: Llama with layers that turn nothing (NoPE, arXiv 2501.18795), by default every fourth, which may have windows."""

from __future__ import annotations

from service.model import rotary
from service.model.config import Fields, ModelConfig, windows
from service.model.families.llama import shape
from service.model.families.llama import weights as weights

ARCHITECTURE = "SmolLM3ForCausalLM"
PREFIX = "model."


def read(fields: Fields) -> ModelConfig:
    fields.is_one("hidden_act", "silu")
    widths = {"hidden": 2048, "layers": 36, "heads": 16, "groups": 4}
    stated = shape(fields, longest=32768, vocabulary=128256, intermediate=11008, tied=True, eos=128001, **widths)
    layers, longest = stated["num_hidden_layers"], stated["max_position_embeddings"]
    fields.get("max_window_layers")  # files have it from Qwen2, nothing reads it
    interval = fields.count("no_rope_layer_interval", 4)
    turns = fields.listed("no_rope_layers", int, bool) or [(i + 1) % interval for i in range(layers)]  # 0: this layer does not
    if len(turns) < layers:
        raise ValueError(f"no_rope_layers must speak of {layers} layers, the checkpoint says {turns}")
    window = fields.get("sliding_window")
    window = window if fields.flag("use_sliding_window") else None
    kinds = ["full_attention" if window is None or turn else "sliding_attention" for turn in turns[:layers]]
    stated["windows"] = windows(fields, layers, window, kinds, longest)
    rope = rotary.read(fields, 2_000_000.0, longest)
    bias = fields.flag("attention_bias")
    return ModelConfig(
        model_type="smollm3",
        **stated,
        ropes=tuple(rope if turn else rotary.NONE for turn in turns[:layers]),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
    )
