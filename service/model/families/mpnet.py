"""MPNet (arXiv 2004.09297), as all-mpnet-base-v2: RoBERTa whose scores have a bias by distance, the same in every layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from service.model.config import Fields, ModelConfig
from service.model.families import roberta
from service.model.layout import Names, Part, Weight
from service.model.weights import Tensors

ARCHITECTURE = "MPNetForMaskedLM"
PREFIX = "mpnet."
BIASES = "mpnet.encoder.relative_attention_bias.weight"
UNUSED = r"(mpnet\.pooler|lm_head)\.|" + BIASES
NAMES = Names(
    layers="encoder.layer",
    qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    out="attention.attn.o",
    attention_norm="attention.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    mlp_norm="output.LayerNorm",
)


def read(fields: Fields) -> ModelConfig:
    fields.is_one("relative_attention_num_buckets", 32)
    return roberta.stated(fields, "mpnet", types=0, first=2)  # whatever the padding token


def complete(config: ModelConfig, tensors: Tensors) -> ModelConfig:
    """With the biases, which stand in the file. Raises ValueError where they do not."""
    wanted = (32, config.num_attention_heads)
    if tensors.shapes.get(BIASES) != wanted:
        raise ValueError(f"{BIASES} must have shape {wanted}, the file has {tensors.shapes.get(BIASES)}")
    biases = tensors.read((Part(BIASES, wanted),), torch.float32, "cpu")
    return replace(config, score_bias=tuple(map(tuple, biases.T.tolist())))


def weights(config: ModelConfig) -> Iterator[Weight]:
    return roberta.layout(config, PREFIX, NAMES)
