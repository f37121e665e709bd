"""What a model's layers take while they compute, against the law that admission reserves by: for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attention.memory import peak_bytes
from service.model.checkpoint import load
from service.model.transformer import Transformer
from tests.model import encoders
from tests.model.checkpoints import DECODERS, write

WIDE = {"hidden_size": 256, "intermediate_size": 704, "head_dim": 64, "num_hidden_layers": 2}
ENCODER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "max_position_embeddings": 2048}
DISTILLED = {"dim": 256, "hidden_dim": 1024, "n_layers": 2, "max_position_embeddings": 2048}
SLACK = 1 << 20  # the libraries' own scratch, and the allocator's rounding


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", (*DECODERS, *encoders.SHAPES))
def test_layers_take_no_more_than_their_law_states_and_not_much_less(tmp_path: Path, family: str, dtype: str) -> None:
    shape = {"n_embd": 256, "n_layer": 2, "n_positions": 2048} if family == "gpt2" else WIDE | {"max_position_embeddings": 2048}
    if family in ("gemma2", "gemma3_text"):
        shape["query_pre_attn_scalar"] = 144
    if family in encoders.SHAPES:
        wide = DISTILLED if family == "distilbert" else ENCODER | ({"attention_window": 64} if family == "longformer" else {})
        directory = encoders.write(tmp_path, family, **wide)
    else:
        directory = write(tmp_path, family, **shape)
    hold_to_law(load(directory, dtype=dtype).model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "gemma3_text"])
def test_layers_whose_matrices_are_in_fewer_bits_do_so_too(tmp_path: Path, family: str, weights: str, dtype: str) -> None:
    shape = WIDE | {"max_position_embeddings": 2048}
    hold_to_law(load(write(tmp_path, family, **shape), dtype=dtype, weights=weights).model)


def hold_to_law(model: Transformer) -> None:
    positions = torch.arange(1024)
    ids = positions % model.config.vocab_size
    model.rotation(positions)  # its table is made once
    answer = torch.zeros(len(ids), model.config.num_attention_heads, model.config.head_dim, dtype=model.dtype)
    with torch.inference_mode():
        model.hidden(ids, positions, lambda layer, q, k, v: answer)
        measured = peak_bytes(lambda: model.hidden(ids, positions, lambda layer, q, k, v: answer))
    law = model.workspace_bytes(len(ids), 0)
    assert measured - law <= 0.1 * law + SLACK, (measured, law)
    assert law - measured <= 0.35 * law + SLACK, (measured, law)
