"""RoBERTa (arXiv 1907.11692): BERT with one token type and positions that begin behind the padding token's."""

from __future__ import annotations

from collections.abc import Iterator

from service.model.config import Fields, ModelConfig
from service.model.families.bert import NAMES, classifier, shape
from service.model.layout import Names, Weight, encoder, pooler

ARCHITECTURE = "RobertaForMaskedLM"
PREFIX = "roberta."
UNUSED = r"(roberta\.pooler|lm_head)\."


def stated(fields: Fields, name: str, types: int = 2, first: int | None = None) -> ModelConfig:
    """A config of RoBERTa's kind. first: the row of its first token's position; None: the one behind the padding token's."""
    first = fields.count("pad_token_id", 1, least=0) + 1 if first is None else first
    found = shape(fields, first, types)
    return ModelConfig(model_type=name, **found, pooled=classifier(fields, found["hidden_size"]))


def layout(config: ModelConfig, body: str, names: Names = NAMES) -> Iterator[Weight]:
    """Its parameters, the classifier's included."""
    yield from encoder(config, body, names)
    if config.pooled.labels:
        yield from pooler(config, ("classifier.dense", "classifier.out_proj"))


def read(fields: Fields) -> ModelConfig:
    return stated(fields, "roberta")


def weights(config: ModelConfig) -> Iterator[Weight]:
    return layout(config, PREFIX)
