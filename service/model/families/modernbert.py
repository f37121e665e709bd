"""ModernBERT (arXiv 2412.13663): rotary positions, a gated feed-forward, norms before its parts, windows in most layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from service.model import rotary
from service.model.config import Fields, ModelConfig, Rope
from service.model.families.bert import ACTIVATIONS, classifier, heads
from service.model.layout import Part, Weight, linear, norm, pooler
from service.model.pooling import Pooled

ARCHITECTURE = "ModernBertForMaskedLM"
PREFIX = "model."
UNUSED = r"(head|decoder)\."
FULL, SLIDING = "full_attention", "sliding_attention"
BASES = {FULL: ("global_rope_theta", 160_000.0), SLIDING: ("local_rope_theta", 10_000.0)}


def read(fields: Fields) -> ModelConfig:
    fields.is_one("hidden_activation", "gelu", *ACTIVATIONS)
    for unread in ("hidden_act", "tie_word_embeddings", "eos_token_id", "decoder_bias", "sparse_prediction", "layer_norm_eps"):
        fields.get(unread)
    for unread in ("sparse_pred_ignore_index", "deterministic_flash_attn", "reference_compile", "repad_logits_with_grad"):
        fields.get(unread)
    fields.is_one("position_embedding_type", "absolute", "sans_pos", None)  # which nothing reads
    sizes, layers, longest = heads(fields), fields.count("num_hidden_layers", 22), fields.count("max_position_embeddings", 8192)
    every, window = fields.count("global_attn_every_n_layers", 3), fields.count("local_attention", 128) // 2
    kinds = fields.listed("layer_types", str) or [SLIDING if i % every else FULL for i in range(layers)]
    if len(kinds) != layers or not set(kinds) <= {FULL, SLIDING}:
        raise ValueError(f"layer_types must say {FULL} or {SLIDING} for {layers} layers, received {kinds}")
    turns = {kind: _rope(fields, kind, longest) for kind in BASES}
    bias = fields.flag("attention_bias")
    eps = fields.number("norm_eps", 1e-5)
    return ModelConfig(
        model_type="modernbert",
        **(sizes | {"vocab_size": fields.count("vocab_size", 50368)}),
        intermediate_size=fields.count("intermediate_size", 1152),
        num_hidden_layers=layers,
        max_position_embeddings=longest,
        norm_eps=eps,
        norm="layer",
        has_norm_bias=fields.flag("norm_bias"),
        has_first_norm=False,
        has_embed_norm=True,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
        activation=ACTIVATIONS[fields.get("hidden_activation", "gelu")],  # type: ignore[arg-type]
        is_causal=False,
        tie_word_embeddings=True,
        eos_token_ids=(),
        ropes=tuple(turns[kind] for kind in kinds),
        windows=tuple(window if kind == SLIDING and window < longest - 1 else None for kind in kinds),
        pooled=_pooled(fields, sizes["hidden_size"], eps),
    )


def _rope(fields: Fields, kind: str, longest: int) -> Rope:
    name, base = BASES[kind]
    stated = rotary.of_kind(fields.mapping("rope_parameters"), kind) | fields.mapping("rope_scaling")
    return rotary.normal({"rope_theta": fields.number(name, base)} | stated, longest)


def _pooled(fields: Fields, width: int, eps: float) -> Pooled:
    fields.is_one("classifier_pooling", "cls", "mean")
    fields.is_one("classifier_activation", "gelu")
    found = classifier(fields, width, "gelu", has_bias=fields.flag("classifier_bias"), norm_eps=eps)
    if not found.labels:
        return found
    fields.is_one("norm_bias", False)  # the head's norm has none either
    return replace(found, pooling=fields.get("classifier_pooling", "cls"))


def weights(config: ModelConfig) -> Iterator[Weight]:
    width, wide, has_bias = config.hidden_size, config.intermediate_size, config.has_norm_bias
    yield "embed.weight", (Part("model.embeddings.tok_embeddings.weight", (config.vocab_size, width)),)
    yield from norm("embed_norm", "model.embeddings.norm", width, has_bias)
    yield from norm("final_norm", "model.final_norm", width, has_bias)
    for i in range(config.num_hidden_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        if i:
            yield from norm(f"{ours}.attention_norm", f"{theirs}.attn_norm", width, has_bias)
        yield from linear(f"{ours}.qkv", [f"{theirs}.attn.Wqkv"], 3 * width, width, config.attention_bias)
        yield from linear(f"{ours}.out", [f"{theirs}.attn.Wo"], width, width, config.output_bias)
        yield from norm(f"{ours}.mlp_norm", f"{theirs}.mlp_norm", width, has_bias)
        yield from linear(f"{ours}.gate_up", [f"{theirs}.mlp.Wi"], 2 * wide, width, config.mlp_bias)
        yield from linear(f"{ours}.down", [f"{theirs}.mlp.Wo"], width, wide, config.mlp_bias)
    if config.pooled.labels:
        yield from pooler(config, ("head.dense", "classifier"), {0: "head.norm"})
