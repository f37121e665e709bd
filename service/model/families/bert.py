"""BERT (arXiv 1810.04805), as most embedding models: learned positions, token types, LayerNorm behind each sum."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from service.model import rotary
from service.model.config import Fields, ModelConfig
from service.model.layout import Names, Weight, encoder, pooler
from service.model.pooling import Activation, Dense, Pooled

ARCHITECTURE = "BertForMaskedLM"
PREFIX = "bert."
UNUSED = r"(bert\.pooler|cls)\."
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
POST_NORMED: dict[str, Any] = {
    "norm": "layer",
    "is_post_normed": True,
    "has_embed_norm": True,
    "attention_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "is_gated": False,
    "has_position_table": True,
    "is_causal": False,
    "tie_word_embeddings": True,  # there is no other head
    "eos_token_ids": (),
}
NAMES = Names(
    layers="encoder.layer",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    mlp_norm="output.LayerNorm",
)


def heads(
    fields: Fields, hidden: str = "hidden_size", count: str = "num_attention_heads", vocabulary: int = 30522
) -> dict[str, Any]:
    """Width and heads under the names that a family has for them."""
    width, number = fields.count(hidden, 768), fields.count(count, 12)
    if width % number:
        raise ValueError(f"{hidden} must be a multiple of {count}, the checkpoint says {width} and {number}")
    sizes = {"hidden_size": width, "num_attention_heads": number, "num_key_value_heads": number, "head_dim": width // number}
    return {"vocab_size": fields.count("vocab_size", vocabulary), **sizes}


def shape(
    fields: Fields,
    first_position: int = 0,
    types: int = 2,
    vocabulary: int = 30522,
    longest: int = 512,
    activation: str = "gelu",
) -> dict[str, Any]:
    """What BERT's kin state alike, with the defaults of transformers."""
    fields.is_one("position_embedding_type", "absolute", None)
    fields.is_one("hidden_act", activation, *ACTIVATIONS)
    fields.is_one("is_decoder", False, None)
    for unread in ("tie_word_embeddings", "eos_token_id"):  # of heads that draw tokens
        fields.get(unread)
    layers = fields.count("num_hidden_layers", 12)
    rows = fields.count("max_position_embeddings", longest, least=first_position + 1)
    return {
        **heads(fields, vocabulary=vocabulary),
        "intermediate_size": fields.count("intermediate_size", 3072),
        "num_hidden_layers": layers,
        "max_position_embeddings": rows - first_position,
        "first_position": first_position,
        "norm_eps": fields.number("layer_norm_eps", 1e-12),
        "activation": ACTIVATIONS[fields.get("hidden_act", activation)],
        "num_token_types": fields.count("type_vocab_size", types) if types else 0,
        "ropes": (rotary.NONE,) * layers,
        "windows": (None,) * layers,
        **POST_NORMED,
    }


def classifier(fields: Fields, width: int, activation: Activation = "tanh", **first: Any) -> Pooled:
    """The head of a classifier, two products on the first token's state, and its labels; of another checkpoint the mean."""
    if not any(name.endswith("ForSequenceClassification") for name in fields.listed("architectures", str)):
        return Pooled()
    labels = _labels(fields)
    layers = (Dense(width, width, activation, **first), Dense(len(labels), width))
    return Pooled("cls", layers, labels=labels, activation=_activation(fields, len(labels)))


def _labels(fields: Fields) -> tuple[str, ...]:
    named = fields.get("id2label")
    if named is None:
        return tuple(f"LABEL_{i}" for i in range(fields.count("num_labels", fields.count("_num_labels", 2))))
    if not isinstance(named, dict) or sorted(named, key=str) != sorted(map(str, range(len(named))), key=str) or not named:
        raise ValueError(f"id2label must name labels 0 to n - 1, the checkpoint says {str(named)[:200]}")
    return tuple(str(named[str(i)]) for i in range(len(named)))


def _activation(fields: Fields, labels: int) -> Activation:
    """What makes scores of a classifier's numbers: as sentence-transformers and transformers' pipeline have it."""
    stated = fields.mapping("sentence_transformers").get("activation_fn")
    stated = fields.get("sbert_ce_default_activation_function", None) or stated
    if stated is not None:
        name = str(stated).rsplit(".", 1)[-1].lower()
        if name not in ("identity", "sigmoid", "tanh"):
            raise ValueError(f"the activation of scores must be Identity, Sigmoid or Tanh, the checkpoint says {stated}")
        return name  # type: ignore[return-value]
    kind = fields.get("problem_type")
    if kind == "regression":
        return "identity"
    return "sigmoid" if labels == 1 or kind == "multi_label_classification" else "softmax"


def read(fields: Fields) -> ModelConfig:
    stated = shape(fields)
    return ModelConfig(model_type="bert", **stated, pooled=classifier(fields, stated["hidden_size"]))


def weights(config: ModelConfig) -> Iterator[Weight]:
    yield from encoder(config, PREFIX, NAMES)
    if config.pooled.labels:
        yield from pooler(config, ("bert.pooler.dense", "classifier"))
