"""BigBird (arXiv 2007.14062): BERT whose tokens see window, first, last and drawn blocks; of a short text everything.

The drawn blocks are ours, seeded, while transformers draws none outside training and lets the first block weigh once more for
each: the two agree up to (5 + 2 r) blocks, and beyond over an equal pattern.
"""

from __future__ import annotations

from collections.abc import Iterator

from service.model.config import Fields, ModelConfig
from service.model.families.bert import ACTIVATIONS, NAMES, classifier, shape
from service.model.layout import Weight, encoder, pooler

ARCHITECTURE = "BigBirdForMaskedLM"
PREFIX = "bert."
UNUSED = r"(bert\.pooler|cls)\."


def read(fields: Fields) -> ModelConfig:
    fields.is_one("use_bias", True)
    fields.is_one("rescale_embeddings", False)
    fields.is_one("attention_type", "block_sparse", "original_full")
    block, drawn = fields.count("block_size", 64), fields.count("num_random_blocks", 3, least=0)
    stated = shape(fields, vocabulary=50358, longest=4096, activation="gelu_new")
    is_sparse = fields.get("attention_type", "block_sparse") == "block_sparse"
    activation = ACTIVATIONS[fields.get("hidden_act", "gelu_new")]
    return ModelConfig(
        model_type="big_bird",
        **stated,
        blocks=(block, drawn) if is_sparse else None,
        pooled=classifier(fields, stated["hidden_size"], activation),  # type: ignore[arg-type]
    )


def weights(config: ModelConfig) -> Iterator[Weight]:
    yield from encoder(config, PREFIX, NAMES)
    if config.pooled.labels:
        yield from pooler(config, ("classifier.dense", "classifier.out_proj"))
