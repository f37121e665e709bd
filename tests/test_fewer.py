"""The benchmark beside llama.cpp gives both sides the same weights."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from attention import Segments
from service.benchmark import fewer

pytestmark = pytest.mark.skipif(not fewer.has_peer(), reason="llama_cpp and gguf are not installed")
VOCABULARY = 4096
SHAPE = fewer.SHAPE | {"num_hidden_layers": 2, "vocab_size": VOCABULARY}


@pytest.mark.parametrize("is_flash", [False, True])
@pytest.mark.parametrize(("weights", "share"), [("bf16", 0.1), ("int8", 0.25)])  # of the logits' deviation
def test_both_sides_answer_alike(weights: str, share: float, is_flash: bool, tmp_path: Path) -> None:
    fewer.write(tmp_path, SHAPE)
    ours, theirs = fewer.Ours(tmp_path, weights, 64), fewer.Theirs(tmp_path, fewer.PEERS[weights], 64, is_flash)
    ids, segments = torch.arange(3, 3 + 20), Segments((20,))
    with torch.inference_mode():
        hidden = ours.model.hidden(
            ids, torch.arange(20), lambda layer, q, k, v: ours.backend.attend(q, k, v, segments, causal=True)
        )
        found = ours.model.logits(hidden[-1:])[0]
    theirs.feed(ids.tolist())
    wanted = told(theirs)
    assert float((found - wanted).abs().max()) <= share * float(wanted.std())


@pytest.mark.parametrize("is_flash", [False, True])
def test_a_text_that_is_taken_over_goes_on_as_where_it_was_read(is_flash: bool, tmp_path: Path) -> None:
    fewer.write(tmp_path, SHAPE)
    reader, taker = (fewer.Theirs(tmp_path, "BF16", 64, is_flash) for _ in range(2))
    reader.feed(list(range(3, 40)))
    taker.take_over(reader)
    for each in (reader, taker):
        each.feed([7])
    assert torch.equal(told(reader), told(taker))
    assert reader.past == taker.past == 38


@pytest.mark.parametrize("is_flash", [False, True])
def test_texts_together_go_on_as_one_of_them_alone(is_flash: bool, tmp_path: Path) -> None:
    fewer.write(tmp_path, SHAPE)
    alone, together = fewer.Theirs(tmp_path, "BF16", 64, is_flash), fewer.Theirs(tmp_path, "BF16", 64, is_flash, texts=3)
    for each in (alone, together):
        each.feed(list(range(3, 40)))
    together.repeat(3)
    for ids in ([9, 7, 7], [8, 7]):  # the last of each go as the one alone does
        together.feed_each(ids)
        alone.feed([7])
        assert torch.allclose(told(alone), told(together), atol=0.05 * float(told(alone).std()))


def told(theirs: fewer.Theirs) -> torch.Tensor:
    """The logits behind the last token that was read."""
    at = theirs.lib.llama_get_logits_ith(theirs.context, -1)
    return torch.tensor(ctypes.cast(at, ctypes.POINTER(ctypes.c_float))[:VOCABULARY])
