"""XLM-RoBERTa (arXiv 1911.02116): RoBERTa of many languages. BGE-M3 and most multilingual embedding models are it."""

from __future__ import annotations

from collections.abc import Iterator

from service.model.config import Fields, ModelConfig
from service.model.families import roberta
from service.model.layout import Weight

ARCHITECTURE = "XLMRobertaForMaskedLM"
PREFIX = "roberta."
UNUSED = roberta.UNUSED


def read(fields: Fields) -> ModelConfig:
    return roberta.stated(fields, "xlm-roberta")


def weights(config: ModelConfig) -> Iterator[Weight]:
    return roberta.layout(config, PREFIX)
