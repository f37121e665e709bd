"""Longformer (arXiv 2004.05150): RoBERTa with a window in every layer. A classifier's first token sees all and is seen by all.

It does so by projections of its own. A checkpoint that embeds has no such token, as in transformers without a
`global_attention_mask`, unless its config has `global_first_token`, as those of `longserve convert` do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from service.model.config import Fields, ModelConfig
from service.model.families import roberta
from service.model.layout import Weight, linear

ARCHITECTURE = "LongformerForMaskedLM"
PREFIX = "longformer."
UNUSED = r"(longformer\.pooler|lm_head)\.|longformer\..*\.(query|key|value)_global\."
GLOBAL = ("query_global", "key_global", "value_global")


def read(fields: Fields) -> ModelConfig:
    fields.is_one("attention_mode", "longformer")
    for unread in ("ignore_attention_mask", "onnx_export"):
        fields.get(unread)
    config = roberta.stated(fields, "longformer")
    layers, stated = config.num_hidden_layers, fields.get("attention_window", 512)
    widths = stated if isinstance(stated, list) else [stated] * layers
    if len(widths) != layers or not all(isinstance(each, int) and each > 1 and each % 2 == 0 for each in widths):
        raise ValueError(f"attention_window must be even and above 1 for {layers} layers, the checkpoint says {stated}")
    is_global = fields.flag("global_first_token") or bool(config.pooled.labels)
    return replace(config, windows=tuple(each // 2 for each in widths), has_global_first=is_global)


def weights(config: ModelConfig) -> Iterator[Weight]:
    yield from roberta.layout(config, PREFIX)
    if not config.has_global_first:
        return
    width = config.hidden_size
    for i in range(config.num_hidden_layers):
        theirs = [f"{PREFIX}encoder.layer.{i}.attention.self.{name}" for name in GLOBAL]
        yield from linear(f"layers.{i}.global_qkv", theirs, width, width)
