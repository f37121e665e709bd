"""The model families, decoders and encoders: one file each, named as its `model_type`, `_` for `-`.

A file says how a config is read and where parameters stand: `read` makes a `ModelConfig` of a `config.json`, `weights` its
layout in the files. Nothing registers a family.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Protocol, cast

from service.model import rotary
from service.model.config import Fields, ModelConfig
from service.model.layout import Weight
from service.model.weights import Tensors


class Family(Protocol):
    """What a family's file holds."""

    ARCHITECTURE: str
    """The class of transformers that computes it."""
    PREFIX: str
    """What stands before the names of the body's tensors, unless a file leaves it out."""
    UNUSED: str
    """Pattern of tensors that a file may have and nothing here computes with; a family without such leaves it out."""

    def read(self, fields: Fields) -> ModelConfig:
        """The config in this service's words. Raises ValueError for what the block does not compute."""

    def weights(self, config: ModelConfig) -> Iterator[Weight]:
        """Every parameter, and the file's tensors that it is made of."""


@cache
def names() -> tuple[str, ...]:
    """The families there are: the file names of this folder, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def of(model_type: str) -> Family:
    """A family by its `model_type`."""
    return cast(Family, importlib.import_module(f"{__name__}.{model_type.replace('-', '_')}"))


def complete(config: ModelConfig, tensors: Tensors) -> ModelConfig:
    """A config with what its family reads from the weights, where it does. Raises ValueError."""
    reading = getattr(of(config.model_type), "complete", None)
    return config if reading is None else cast(ModelConfig, reading(config, tensors))


def unused(model_type: str) -> str | None:
    """The pattern of tensors that a family passes over; None: it passes over none."""
    return getattr(of(model_type), "UNUSED", None)


def read(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a `config.json`.

    Raises:
        ValueError: a family, or in its config anything, that is not computed here; the message names it.
    """
    name = raw.get("model_type")
    if not isinstance(name, str) or name.replace("-", "_") not in names():
        raise ValueError(f"model_type must be one of {', '.join(names())}, the checkpoint says {name!r}")
    family, fields = of(name), Fields(raw)
    _check_common(family, raw, fields)
    config = family.read(fields)
    fields.settle()
    if config.num_attention_heads % config.num_key_value_heads:
        heads = f"{config.num_attention_heads} and {config.num_key_value_heads}"
        raise ValueError(f"num_attention_heads must be a multiple of num_key_value_heads, the checkpoint says {heads}")
    for rope in set(config.ropes):
        rotary.check_heads(rope, config.head_dim)
    return config


def _check_common(family: Family, raw: Mapping[str, Any], fields: Fields) -> None:
    """Raise ValueError for what no family computes."""
    if method := fields.get("quantization_config"):
        kind = method.get("quant_method", method) if isinstance(method, dict) else method
        raise ValueError(f"quantization_config: the weights are quantized ({kind}); take the files that are not")
    custom = fields.mapping("auto_map").items()
    if strange := sorted(f"{k}: {v}" for k, v in custom if k == "AutoModelForCausalLM" and not _names(v, family)):
        raise ValueError(f"auto_map: the checkpoint brings code of its own ({', '.join(strange)}), and none is run here")
    architectures = fields.listed("architectures", str) or [family.ARCHITECTURE]
    known = _architectures(family)
    if not set(known) & set(architectures):
        raise ValueError(f"architectures must name {' or '.join(known)}, the checkpoint says {architectures}")
    is_encoder = family.ARCHITECTURE.endswith(MASKED)
    fields.is_one("is_causal", not is_encoder, None)
    for off in ("is_encoder_decoder", "add_cross_attention"):
        fields.is_one(off, False, None)


MASKED = "ForMaskedLM"
"""What the architecture of an encoder ends with, as it was trained."""


def _architectures(family: Family) -> tuple[str, ...]:
    """The names under which transformers saves what is computed here."""
    trained = family.ARCHITECTURE
    if not trained.endswith(MASKED):
        return trained, trained.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model")
    return tuple(trained.replace(MASKED, end) for end in ("Model", MASKED, "ForPreTraining", "ForSequenceClassification"))


def _names(reference: Any, family: Family) -> bool:
    """Whether custom code only repeats the class that transformers itself has."""
    return isinstance(reference, str) and reference.rsplit(".", 1)[-1] == family.ARCHITECTURE
