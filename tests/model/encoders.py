"""Small seeded encoders of every family, made by transformers, and what transformers answers with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

import attention
from attention import Segments
from service.engine.allowlist import Backends
from service.model.checkpoint import Checkpoint
from service.model.transformer import Transformer

WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdefghijklmnopqrstuvwxyz",
    *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
)
VOCABULARY = len(WORDS)
LENGTH = 160
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": LENGTH,
}
SHAPES: Mapping[str, dict[str, Any]] = {
    "bert": TINY,
    "roberta": TINY | {"max_position_embeddings": LENGTH + 2, "type_vocab_size": 1, "hidden_act": "gelu_new"},
    "xlm-roberta": TINY | {"max_position_embeddings": LENGTH + 2, "type_vocab_size": 1},
    "distilbert": {
        "vocab_size": VOCABULARY,
        "dim": 48,
        "n_layers": 3,
        "n_heads": 4,
        "hidden_dim": 80,
        "max_position_embeddings": LENGTH,
    },
    "mpnet": TINY | {"max_position_embeddings": LENGTH + 2, "pad_token_id": 1},
    "big_bird": TINY | {"block_size": 8, "num_random_blocks": 8},  # up to 21 blocks of 8 all is seen, as by transformers
    "longformer": TINY
    | {"max_position_embeddings": LENGTH + 2, "type_vocab_size": 1, "attention_window": [8, 20, 40], "pad_token_id": 1},
    "modernbert": TINY
    | {"num_hidden_layers": 4, "local_attention": 20}
    | dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 0),
}


def write(directory: Path, family: str, kind: str = "AutoModel", **changes: Any) -> Path:
    """A random checkpoint of a family, with a tokenizer of letters beside it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **(SHAPES[family] | changes))
    model = getattr(transformers, kind).from_config(config)
    for name, parameter in model.named_parameters():  # fresh norms and biases are all alike and would hide a mix-up
        is_small = "norm" in name.lower() or name.endswith("bias")
        torch.nn.init.normal_(parameter, mean=0.5 if is_small else 0, std=0.3 if is_small else 0.12)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.add_special_tokens(list(WORDS[:5]))
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    core.save(str(directory / "tokenizer.json"))


def write_modules(directory: Path, pooling: str = "mean_tokens", normalize: bool = True, **settings: Any) -> None:
    """sentence-transformers' files beside a model. settings: of `config_sentence_transformers.json`."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    modes = {f"pooling_mode_{mode}": mode == pooling for mode in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 48, **modes}))
    (directory / "config_sentence_transformers.json").write_text(json.dumps(settings))


def draw(count: int, seed: int = 1) -> Tensor:
    """Some ids of letters."""
    return torch.randint(5, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def backends_of(model: Transformer, **others: dict[str, Any]) -> Backends:
    """The backend of its own and others, for an engine."""
    native = model.config.native
    options: dict[str, Any] = {"dense": {}} if native is None else {"native": native}
    built = {name: attention.build(name, each, model.head_shape()) for name, each in (options | others).items()}
    return Backends(built, next(iter(built)), is_causal=False)


def our_hidden(
    model: Transformer, texts: Sequence[Tensor], types: Tensor | None = None, backend: str | None = None, **options: Any
) -> list[Tensor]:
    """Hidden states of each text, all packed into one call, under the checkpoint's own backend or another."""
    made = backends_of(model, **({backend: options} if backend else {})).by_name
    serving = attention.whole(made[backend] if backend else next(iter(made.values())))
    pool, segments = serving.new_pool(model.config.num_hidden_layers, 0), Segments(tuple(map(len, texts)))
    slots = [pool.allocate(length) for length in segments.lengths]
    with torch.inference_mode():
        hidden = model.hidden(
            torch.cat(list(texts)),
            segments.positions(),
            lambda layer, q, k, v: pool.backends[layer].extend(q, k, v, segments, pool, layer, slots),
            types,
        )
    return [hidden[start:end] for start, end, _ in segments.spans()]


def theirs(directory: Path, kind: str = "AutoModel", **options: Any) -> Any:
    """The model as transformers loads it."""
    transformers = pytest.importorskip("transformers")
    options = {"attn_implementation": "eager"} | options
    return getattr(transformers, kind).from_pretrained(directory, dtype=torch.float32, **options).eval()


def their_hidden(model: Any, texts: Sequence[Tensor], types: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The same of a batch, padded, as transformers computes it."""
    pad = model.config.pad_token_id or 0
    ids = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True, padding_value=pad)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    more = {} if types is None else {"token_type_ids": torch.nn.utils.rnn.pad_sequence(list(types), batch_first=True)}
    with torch.inference_mode():
        hidden = model(ids, attention_mask=mask, **more).last_hidden_state
    return [each[: len(text)] for each, text in zip(hidden, texts, strict=True)]


def their_vector(hidden: Tensor) -> Tensor:
    """The mean at length one."""
    return torch.nn.functional.normalize(hidden.mean(0), dim=0)


def encoded(loaded: Checkpoint, text: str) -> list[int]:
    return loaded.tokenizer.encode(text, add_special_tokens=True)
