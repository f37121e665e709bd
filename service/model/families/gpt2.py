"""GPT-2 (Radford et al. 2019): LayerNorm, learned positions, a feed-forward without a gate, matrices across."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from service.model import rotary
from service.model.config import Fields, ModelConfig, eos_token_ids
from service.model.families.bert import ACTIVATIONS
from service.model.layout import Part, Weight, norm

ARCHITECTURE = "GPT2LMHeadModel"
PREFIX = "transformer."


def read(fields: Fields) -> ModelConfig:
    fields.is_one("activation_function", "gelu_new", *ACTIVATIONS)
    fields.is_one("scale_attn_weights", True)
    fields.is_one("scale_attn_by_inverse_layer_idx", False)
    fields.get("reorder_and_upcast_attn")  # scores in float32, as they always are here where it tells
    width, heads, layers = fields.count("n_embd", 768), fields.count("n_head", 12), fields.count("n_layer", 12)
    if width % heads:
        raise ValueError(f"n_embd must be a multiple of n_head, the checkpoint says {width} and {heads}")
    return ModelConfig(
        model_type="gpt2",
        vocab_size=fields.count("vocab_size", 50257),
        hidden_size=width,
        intermediate_size=fields.count("n_inner", 4 * width),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=fields.count("n_positions", 1024),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        ropes=(rotary.NONE,) * layers,
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        eos_token_ids=eos_token_ids(fields.get("eos_token_id", 50256)),
        windows=(None,) * layers,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        norm="layer",
        activation=ACTIVATIONS[fields.get("activation_function", "gelu_new")],  # type: ignore[arg-type]
        is_gated=False,
        has_position_table=True,
    )


def weights(config: ModelConfig) -> Iterator[Weight]:
    width, wide, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    yield "embed.weight", (Part("transformer.wte.weight", (vocabulary, width)),)
    yield "positions.weight", (Part("transformer.wpe.weight", (config.max_position_embeddings, width)),)
    yield from norm("final_norm", "transformer.ln_f", width)
    if not config.tie_word_embeddings:
        yield "head.weight", (Part("lm_head.weight", (vocabulary, width)),)
    for i in range(config.num_hidden_layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        yield from norm(f"{ours}.attention_norm", f"{theirs}.ln_1", width)
        yield from norm(f"{ours}.mlp_norm", f"{theirs}.ln_2", width)
        for name, part, rows, columns in (
            ("qkv", "attn.c_attn", 3 * width, width),
            ("out", "attn.c_proj", width, width),
            ("gate_up", "mlp.c_fc", wide, width),
            ("down", "mlp.c_proj", width, wide),
        ):
            yield f"{ours}.{name}.weight", (Part(f"{theirs}.{part}.weight", (columns, rows), Tensor.t),)
            yield f"{ours}.{name}.bias", (Part(f"{theirs}.{part}.bias", (rows,)),)
