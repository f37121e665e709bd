"""Long encoders at 4,096 tokens beside transformers' own classes: `python -m service.benchmark --parts long`.

Longformer and BigBird of the published bases' widths and patterns, with random weights, the same for both: windows of 256 on
either side; blocks of 64 with three drawn, which transformers draws all alike outside training. One text at a time, in turns:
the engine in its own dtype, transformers in float32 and in bfloat16, of which the faster counts. The cosine between both sides'
mean states tells that Longformer is the same function; BigBird's draws are others, as many.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from service.benchmark.bare import report
from service.benchmark.encoder import EngineByTurns, Load, Sorted, in_turns, transformers_in
from service.model.checkpoint import EMBEDDED, load
from service.threads import in_passing_thread

TOKENS, TEXTS, LAYERS, VOCABULARY = 4096, 1, 2, 4096
WIDTHS = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": LAYERS}
FAMILIES: dict[str, dict[str, Any]] = {
    "longformer": {"attention_window": 512, "max_position_embeddings": TOKENS + 2, "type_vocab_size": 1, "pad_token_id": 1},
    "big_bird": {"block_size": 64, "num_random_blocks": 3, "max_position_embeddings": TOKENS},
}


def measure_long() -> dict[str, Any]:
    """Seconds per text by family and who computes. ImportError where transformers is not installed."""
    found = dict[str, Any]()
    for family, shape in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            in_passing_thread(lambda: _write(path, family, shape))  # noqa: B023
            found[family] = _measure(path, family)
    return found


def _measure(path: Path, family: str) -> dict[str, float]:
    words = random.Random(0)
    texts: Load = [words.choices(range(5, VOCABULARY), k=TOKENS) for _ in range(TEXTS)]
    checkpoint = in_passing_thread(lambda: load(path, name=family))
    contestants = {"longserve": EngineByTurns(checkpoint).run}
    for name, dtype in (("transformers fp32", torch.float32), ("transformers bf16", torch.bfloat16)):
        peer = in_passing_thread(lambda: transformers_in(dtype)(path))  # noqa: B023
        contestants[name] = Sorted(peer, texts, (1,)).run
    seconds, vectors = in_turns(contestants, texts)
    for name, own in seconds.items():
        cosine = min(float(a @ b) for a, b in zip(vectors[name], vectors["transformers fp32"], strict=True))
        told = f"{own / TEXTS:6.2f} s a text, cosines at least {cosine:.4f}, {own / seconds['longserve']:5.2f} x"
        report(f"{family}, {LAYERS} layers, {TOKENS} tokens", name, told)
    return {name: own / TEXTS for name, own in seconds.items()}


def _write(path: Path, family: str, shape: dict[str, Any]) -> None:
    """A random checkpoint, with the embedded model's tokenizer beside it."""
    library = import_module("transformers")
    torch.manual_seed(0)
    config = library.AutoConfig.for_model(family, **WIDTHS, **shape, vocab_size=VOCABULARY)
    library.AutoModel.from_config(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, path / name)
