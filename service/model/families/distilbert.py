"""DistilBERT (arXiv 1910.01108): BERT with half the layers and no token types, under names of its own."""

from __future__ import annotations

from collections.abc import Iterator

from service.model import rotary
from service.model.config import Fields, ModelConfig
from service.model.families.bert import ACTIVATIONS, POST_NORMED, classifier, heads
from service.model.layout import Names, Weight, encoder, pooler

ARCHITECTURE = "DistilBertForMaskedLM"
PREFIX = "distilbert."
UNUSED = r"vocab_(transform|layer_norm|projector)\."
NAMES = Names(
    layers="transformer.layer",
    qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    out="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    mlp_norm="output_layer_norm",
)


def read(fields: Fields) -> ModelConfig:
    fields.is_one("activation", "gelu", *ACTIVATIONS)
    for unread in ("tie_word_embeddings", "tie_weights_", "eos_token_id", "sinusoidal_pos_embds"):  # the table is in the file
        fields.get(unread)
    sizes, layers = heads(fields, "dim", "n_heads"), fields.count("n_layers", 6)
    return ModelConfig(
        model_type="distilbert",
        **sizes,
        intermediate_size=fields.count("hidden_dim", 3072),
        num_hidden_layers=layers,
        max_position_embeddings=fields.count("max_position_embeddings", 512),
        norm_eps=1e-12,
        activation=ACTIVATIONS[fields.get("activation", "gelu")],  # type: ignore[arg-type]
        ropes=(rotary.NONE,) * layers,
        windows=(None,) * layers,
        pooled=classifier(fields, sizes["hidden_size"], "relu"),
        **POST_NORMED,
    )


def weights(config: ModelConfig) -> Iterator[Weight]:
    yield from encoder(config, PREFIX, NAMES)
    if config.pooled.labels:
        yield from pooler(config, ("pre_classifier", "classifier"))
