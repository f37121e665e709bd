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


@pytest.mark.parametrize(("weights", "share"), [("bf16", 0.1), ("int8", 0.25)])  # of the logits' deviation
def test_both_sides_answer_alike(weights: str, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("num_hidden_layers", 2), ("vocab_size", VOCABULARY)):
        monkeypatch.setitem(fewer.SHAPE, name, value)
    fewer.write(tmp_path, fewer.SHAPE)
    ours, theirs = fewer.Ours(tmp_path, weights, 64), fewer.Theirs(tmp_path, fewer.PEERS[weights], 64)
    ids, segments = torch.arange(3, 3 + 20), Segments((20,))
    with torch.inference_mode():
        hidden = ours.model.hidden(
            ids, torch.arange(20), lambda layer, q, k, v: ours.backend.attend(q, k, v, segments, causal=True)
        )
        found = ours.model.logits(hidden[-1:])[0]
    theirs._extend(ids.tolist())
    told = theirs.lib.llama_get_logits_ith(theirs.context, -1)
    wanted = torch.tensor(ctypes.cast(told, ctypes.POINTER(ctypes.c_float))[:VOCABULARY])
    assert float((found - wanted).abs().max()) <= share * float(wanted.std())
