"""A short encoder made to read long texts: Longformer's conversion (arXiv 2004.05150, section 5) of BERT and RoBERTa.

Learned positions are laid side by side again and again, each layer gets a window, and the first token sees all and is seen by
all, by projections that are copies of its own. Without training this is nearly what the encoder was (Table 5: 1.96 bits a
character where RoBERTa has 1.85, and 10.3 where positions are not copied), which is no promise for what lies beyond its old
context: the report tells how far texts that fit it have moved, and long ones want a test of one's own.

What is written is a Longformer checkpoint, which transformers loads, too; `global_first_token` is a field of ours.
"""

from __future__ import annotations

import json
import pydoc_data.topics
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import attention
from attention import Segments
from service.model import checkpoint, families, files
from service.model.checkpoint import Checkpoint
from service.model.families import longformer
from service.model.layout import Part
from service.model.pooler import gathered, pooled
from service.model.sentence import Folder
from service.model.weights import Tensors

BODIES = {"bert": "bert.", "roberta": "roberta.", "xlm-roberta": "roberta."}
"""What may be converted, and what stands before the names of its body's tensors."""

HEADS = {"bert": {"bert.pooler.dense": "classifier.dense", "classifier": "classifier.out_proj"}}
"""Tensors of a classifier whose names are others in Longformer, by family."""

KEPT = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("modules.json", "config_sentence_transformers.json"),
)
REPORT = "conversion.json"
TEXTS, LENGTHS = 24, (32, 128, 512, 2048)  # of the report: texts of each length that both read


def convert(source: Path, target: Path, length: int, window: int) -> Iterator[str]:
    """Write a long encoder; yields lines of a report, which is written beside it.

    Args:
        length: tokens of the longest text it will read. window: tokens that a token sees on both sides together.

    Raises:
        ValueError: another family, a length that is not beyond the old one, a window that is odd or 2; what `checkpoint.load`
            refuses.
        FileNotFoundError: no checkpoint. FileExistsError: `target` is there.
    """
    old = checkpoint.load(source, dtype="float32")
    config = old.model.config
    if config.model_type not in BODIES:
        raise ValueError(f"only {', '.join(BODIES)} can be converted, the checkpoint is {config.model_type}")
    if length <= config.max_position_embeddings:
        raise ValueError(f"length must be above the old context of {config.max_position_embeddings} tokens, received {length}")
    if window < 4 or window % 2:  # transformers computes no smaller one
        raise ValueError(f"window must be an even number above 2, received {window}")
    target.mkdir(parents=True)
    raw = files.read_json(source / "config.json")
    save_file(dict(_tensors(source, old, length)), target / "model.safetensors", metadata={"format": "pt"})
    written = _config(raw, old, length, window, _pad(source))
    (target / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    _copy_others(source, target, length)
    new = checkpoint.load(target, dtype="float32")
    yield f"{target}: texts of up to {length} tokens, was {config.max_position_embeddings}; {window} tokens seen, and the first"
    report = {str(tokens): found for tokens in LENGTHS if (found := _agreement(old, new, tokens))}
    (target / REPORT).write_text(json.dumps({"cosines": report, "window": window, "length": length}, indent=2) + "\n")
    for tokens, (least, mean) in report.items():
        yield f"texts of {tokens:>5} tokens: cosine to the old one's vectors {mean:.4f} on average, {least:.4f} at least"


def _tensors(source: Path, old: Checkpoint, length: int) -> Iterator[tuple[str, Tensor]]:
    """Longformer's tensors: the old ones under new names, positions laid side by side, projections of the first token."""
    config, body = old.model.config, BODIES[old.model.config.model_type]
    tensors = Tensors(source, body)
    for name in {part.name: None for _, parts in families.of(config.model_type).weights(config) for part in parts}:
        tensor = tensors.read((Part(name, tensors.shapes[name]),), torch.float32, "cpu")
        new = _renamed(name, config.model_type)
        if name.endswith("position_embeddings.weight"):
            rows = tensor[config.first_position :]
            before = rows.new_zeros(
                _pad(source) + 1, rows.shape[1]
            )  # no position: in Longformer they begin behind the padding's
            tensor = torch.cat((before, rows.repeat(-(-length // len(rows)), 1)[:length]))
        yield new, tensor
        for part in ("query", "key", "value"):
            if f".self.{part}." in name:
                yield new.replace(f".self.{part}.", f".self.{part}_global."), tensor.clone()


def _pad(source: Path) -> int:
    """The padding token, which transformers wants to know."""
    raw = files.read_json(source / "config.json")
    return int(raw.get("pad_token_id") or (0 if raw["model_type"] == "bert" else 1))


def _renamed(name: str, family: str) -> str:
    for old, new in HEADS.get(family, {}).items():
        if name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    body = BODIES[family]
    return longformer.PREFIX + name.removeprefix(body) if name.startswith(body) else name


def _config(raw: dict[str, Any], old: Checkpoint, length: int, window: int, pad: int) -> dict[str, Any]:
    config = old.model.config
    kind = "ForSequenceClassification" if config.pooled.labels else "Model"
    return {
        **raw,
        "architectures": [f"Longformer{kind}"],
        "model_type": "longformer",
        "attention_window": [window] * config.num_hidden_layers,
        "global_first_token": True,
        "max_position_embeddings": length + pad + 1,
        "pad_token_id": pad,
    }


def _copy_others(source: Path, target: Path, length: int) -> None:
    """Tokenizer and sentence-transformers' files, whose lengths are the new one."""
    for name in KEPT:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for folder in Folder(source).folders:
        shutil.copytree(source / folder, target / folder)
    for name, field in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        if (source / name).is_file():
            (target / name).write_text(json.dumps(files.read_json(source / name) | {field: length}, indent=2) + "\n")


def _agreement(old: Checkpoint, new: Checkpoint, tokens: int) -> tuple[float, float] | None:
    """The least and the mean cosine of both vectors of texts of so many tokens; None where the old one reads no such."""
    if tokens > old.model.config.max_position_embeddings:
        return None
    texts = list(pydoc_data.topics.topics.values())[:TEXTS]
    cut = [old.tokenizer.encode(text * (1 + 8 * tokens // len(text)), add_special_tokens=True)[:tokens] for text in texts]
    found = torch.stack([torch.cosine_similarity(_vector(old, each), _vector(new, each), dim=0) for each in cut])
    return round(found.min().item(), 5), round(found.mean().item(), 5)


@torch.inference_mode()
def _vector(loaded: Checkpoint, tokens: Sequence[int]) -> Tensor:
    """A text's pooled hidden states under the checkpoint's own backend."""
    model, segments = loaded.model, Segments((len(tokens),))
    native = model.config.native
    backend = attention.whole(attention.build("native" if native else "dense", native, model.head_shape()))
    pool = backend.new_pool(model.config.num_hidden_layers, 0)
    slots, pooling = [pool.allocate(len(tokens))], model.config.pooled.pooling
    hidden = model.hidden(
        torch.tensor(tokens),
        segments.positions(),
        lambda layer, q, k, v: pool.backends[layer].extend(q, k, v, segments, pool, layer, slots),
    )
    return pooled(gathered(None, hidden, pooling), pooling, len(tokens))
