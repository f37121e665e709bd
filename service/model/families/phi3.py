"""Phi-3 and Phi-4-mini (arXiv 2404.14219): Llama with fused q, k, v and gate, up, and positions stretched by LongRoPE.

Where only the first coordinates of a head turn, they are laid beside their partners as where all do: a head's queries and keys
are permuted alike, which no product of the two can tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from service.model import rotary
from service.model.config import Fields, ModelConfig, windows
from service.model.families.llama import shape
from service.model.layout import Weight, decoder

ARCHITECTURE = "Phi3ForCausalLM"
PREFIX = "model."
_OLD_NAMES = {"su": "longrope", "yarn": "longrope"}


def read(fields: Fields) -> ModelConfig:
    fields.is_one("hidden_act", "silu")
    fields.is_one("attention_bias", False, None)
    for unused in ("interpolate_factor", "full_attn_mod"):  # of Phi-4-mini's own code, which transformers' does not read
        fields.is_one(unused, 1, None)
    defaults = {"hidden": 3072, "eps": 1e-5, "eos": 32000}
    stated = shape(fields, longest=4096, vocabulary=32064, intermediate=8192, **defaults)
    layers, longest, window = stated["num_hidden_layers"], stated["max_position_embeddings"], fields.get("sliding_window")
    kind = "full_attention" if window is None else "sliding_attention"
    stated["windows"] = windows(fields, layers, window, (kind,) * layers, longest)
    trained = fields.count("original_max_position_embeddings", 4096)
    rope = rotary.read(fields, 10000.0, longest, renamed=_OLD_NAMES, trained=trained, is_partial=True)
    return ModelConfig(model_type="phi3", **stated, ropes=(rope,) * layers)


def weights(config: ModelConfig) -> Iterator[Weight]:
    rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    fused = decoder(config, qkv=(("self_attn.qkv_proj", rows),), gate_up=(("mlp.gate_up_proj", 2 * config.intermediate_size),))
    for name, parts in fused:
        is_partial = rotary.turned_width(config.ropes[0], config.head_dim) < config.head_dim
        if name.endswith("qkv.weight") and is_partial:
            parts = tuple(replace(part, turn=lambda x: _beside_partners(x, config)) for part in parts)
        yield name, parts


def _beside_partners(qkv: Tensor, config: ModelConfig) -> Tensor:
    """Fused rows with the turning coordinates of queries and keys at (i, i + D / 2)."""
    depth, half = config.head_dim, rotary.turned_width(config.ropes[0], config.head_dim) // 2
    turning, still = torch.arange(2 * half).chunk(2), torch.arange(2 * half, depth).chunk(2)
    order = torch.cat((turning[0], still[0], turning[1], still[1]))
    rows = (config.num_attention_heads + config.num_key_value_heads) * depth
    heads = qkv[:rows].unflatten(0, (-1, depth))[:, order]
    return torch.cat((heads.flatten(0, 1), qkv[rows:]))
