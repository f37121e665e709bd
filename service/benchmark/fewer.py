"""A decoder of Qwen3-0.6B's shape by how its matrices are kept, beside llama.cpp: `python -m service.benchmark --weights`.

The weights are random and the same for all. Ours in bfloat16, 8 and 4 bits, each also with keys and values in 8; llama.cpp's,
where `llama_cpp` and `gguf` are installed, in BF16, Q8_0 and Q4_0, its own defaults else, on as many threads, without its flash
attention and with it; transformers' in bfloat16. Of texts of more than `SHORT` tokens, since all states together would not fit
24 GiB, no 4 bits, and keys and values in 8 behind 8-bit weights only. In turns, chunk by chunk, one process. A prefill is told
beside its products, a decode step beside what the machine reads: the seconds of adding up as many bytes as it has weights and
state.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

import attention
from service.benchmark.bare import BACKENDS, CHUNK, report
from service.machine import trim
from service.model import checkpoint, families
from service.model.checkpoint import EMBEDDED
from service.model.continuation import Continuation
from service.model.transformer import Transformer

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
}
LONG_PEERS = {"bf16": "BF16", "int8": "Q8_0"}  # bits of ours and of theirs that read long texts, too
PEERS = LONG_PEERS | {"int4": "Q4_0"}
SHORT = 4096  # tokens of a text that all of them read
STEPS = 16  # of decoding, at each length
REPEATS = 3
READ = 3072  # tokens that each reads at least, in whole texts
ROUNDS = 2  # of steps, in turns
MOST_READ = 2**28  # numbers that are summed up for the machine's rate: many times its caches
ROOM = 256  # tokens behind the longest text, for rounds of steps


def measure_weights(lengths: Sequence[int]) -> dict[str, dict[str, float]]:
    """Prefill tokens per second and decode seconds by contestant and length; who reads a long text reads it once."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write(directory, SHAPE)
        contestants: dict[str, Callable[[], Contestant]] = {}
        is_short = max(lengths) <= SHORT
        for weights, kind in (PEERS if is_short else LONG_PEERS).items():
            contestants[weights] = partial(Ours, directory, weights, max(lengths))
            if is_short or weights == "int8":
                contestants[f"{weights}, kv int8"] = partial(Ours, directory, weights, max(lengths), kv="int8")
            if has_peer():
                contestants |= peers(directory, kind, max(lengths))
        if not has_peer():
            print("llama.cpp: not installed (pip install llama-cpp-python gguf), left out")
        made = {name: make() for name, make in contestants.items()} | {"transformers bf16": Reference(directory)}
        for length in lengths:
            speeds: dict[str, list[float]] = {name: [] for name in made}
            steps: dict[str, list[float]] = {name: [] for name in made}
            for _ in range(-(-READ // length)):
                for name, seconds in read_in_turns(made, length).items():
                    speeds[name].append(length / seconds)
                for _ in range(ROUNDS):
                    for name, each in made.items():
                        steps[name].append(each.step())
            for name, each in made.items():
                speed, step = median(speeds[name]), median(steps[name])
                found.setdefault(name, {}).update({f"prefill_{length}": speed, f"decode_{length}": step})
                prefill, decode = f"{speed:8.0f} tokens/s", f"decode step {step * 1e3:6.2f} ms"
                if isinstance(each, Ours):
                    prefill += f" ({each.multiplying_seconds() / CHUNK * speed:.0%} of the time in products)"
                    decode += f" ({each.reading_seconds() / step:.0%} of the rate of reading its bytes)"
                kept = "{:.0f} + {:.0f} MiB of weights and state".format(*(part / 2**20 for part in each.kept_bytes))
                report(f"weights, behind {length} tokens", name, f"{prefill}, {decode}, {kept}")
    return found


def read_in_turns(made: Mapping[str, Contestant], length: int) -> dict[str, float]:
    """Seconds that each takes for a text of so many tokens, a chunk at a time in turns."""
    seconds = dict.fromkeys(made, 0.0)
    for each in made.values():
        each.begin()
    for end in range(CHUNK, length + CHUNK, CHUNK):
        for name, each in made.items():
            seconds[name] += each.read(min(end, length))
        trim()  # what transformers' growing caches leave of the heap never fits them again
    return seconds


def write(directory: Path, shape: Mapping[str, int]) -> None:
    """A checkpoint of the embedded model's family but for its shape, and with its tokenizer."""
    config = json.loads((EMBEDDED / "config.json").read_text()) | shape
    with torch.device("meta"):
        model = Transformer(families.read(config))
    model = model.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1.0)
    checkpoint.save(model, directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, directory / name)


class Contestant(ABC):
    """Reads a text, and takes steps behind it."""

    past = 0  # tokens of the text so far

    @abstractmethod
    def begin(self) -> None:
        """Begin a text."""

    @property
    @abstractmethod
    def kept_bytes(self) -> tuple[int, int]:
        """Memory of the weights, and of the text's keys and values; of ours all that is reserved for these."""

    @abstractmethod
    def _extend(self, count: int) -> None:
        """Read random tokens, until the logits behind the last are there."""

    def read(self, length: int) -> float:
        """Seconds of prefilling random tokens until the text has so many."""
        start = time.perf_counter()
        while self.past < length:
            self._extend(min(CHUNK, length - self.past))
        return time.perf_counter() - start

    def step(self) -> float:
        """Seconds of the median of some decode steps."""
        return median(self._step() for _ in range(STEPS))

    def _step(self) -> float:
        start = time.perf_counter()
        self._extend(1)
        return time.perf_counter() - start


class Ours(Contestant):
    """A model of ours under a backend, dense unless told."""

    def __init__(self, directory: Path, weights: str, longest: int, name: str = "dense", kv: str = "auto") -> None:
        self.model = checkpoint.load(directory, "bfloat16", weights=weights, kv=kv).model
        self.backend = attention.build(name, BACKENDS[name], self.model.head_shape())
        self.longest = longest
        self.begin()

    def begin(self) -> None:
        """Begin a text of up to `longest` tokens and some rounds of steps."""
        self.text, self.past = Continuation(self.model, self.backend, self.longest + ROOM), 0

    def _extend(self, count: int) -> None:
        self.text.read(torch.randint(self.model.config.vocab_size, (count,)))
        self.past = self.text.past

    @property
    def kept_bytes(self) -> tuple[int, int]:
        return self.model.weight_bytes, self.text.state_bytes

    @torch.inference_mode()
    def multiplying_seconds(self) -> float:
        """Of the products of a chunk alone: those of one layer, as often as there are layers."""
        layer, seconds = self.model.stack[0], []
        products = (layer.qkv, layer.out, layer.gate_up, layer.down)
        inputs = [(each, torch.randn(CHUNK, each.in_features).bfloat16()) for each in products]
        for _ in range(REPEATS):
            start = time.perf_counter()
            for _ in range(len(self.model.stack)):
                for each, x in inputs:
                    each(x)
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    def reading_seconds(self) -> float:
        """Of summing up as many bytes as a step reads: of the state what has tokens."""
        weights, state = self.kept_bytes
        count = (weights + state * self.past // (self.longest + ROOM)) // 4
        read, seconds = torch.ones(min(count, MOST_READ)), []
        for _ in range(REPEATS):
            start = time.perf_counter()
            read.sum()
            seconds.append(time.perf_counter() - start)
        return min(seconds) * count / len(read)


class Reference(Contestant):
    """The same weights in transformers, in bfloat16 by its own attention of torch's."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        self.begin()

    def begin(self) -> None:
        from transformers import DynamicCache

        self.cache, self.past = DynamicCache(config=self.model.config), 0

    @property
    def kept_bytes(self) -> tuple[int, int]:
        kept = [each for layer in self.cache.layers for each in (layer.keys, layer.values)]
        return self.model.get_memory_footprint(), sum(each.nbytes for each in kept)

    @torch.inference_mode()
    def _extend(self, count: int) -> None:
        ids = torch.randint(self.model.config.vocab_size, (1, count))
        self.model(ids, cache=self.cache, use_cache=True, logits_to_keep=1)
        self.past += count


def has_peer() -> bool:
    """Whether llama.cpp is installed, and what writes its files."""
    return all(importlib.util.find_spec(name) is not None for name in ("llama_cpp", "gguf"))


def peers(directory: Path, kind: str, longest: int, texts: int = 1) -> dict[str, Callable[[], Theirs]]:
    """llama.cpp at some bits without its flash attention and with it: which is faster depends on the length."""
    return {
        f"llama.cpp {kind}{' flash' * is_flash}": partial(Theirs, directory, kind, longest, is_flash, texts)
        for is_flash in (False, True)
    }


class Theirs(Contestant):
    """The same weights in llama.cpp, with room for some texts."""

    def __init__(self, directory: Path, kind: str, longest: int, is_flash: bool, texts: int = 1) -> None:
        self.lib: Any = import_module("llama_cpp")
        self.lib.llama_log_set(_SILENT, ctypes.c_void_p(0))
        path = directory / f"{kind}.gguf"
        if not path.exists():
            _write_gguf(directory, path, kind)
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        assert self.model, f"llama.cpp does not load {path}"
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = texts * (longest + ROOM), CHUNK, CHUNK
        params.n_seq_max = texts
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.flash_attn_type = getattr(self.lib, f"LLAMA_FLASH_ATTN_TYPE_{'ENABLED' if is_flash else 'DISABLED'}")
        self.context = self.lib.llama_init_from_model(self.model, params)
        assert self.context, f"llama.cpp refuses a context of {params.n_ctx} tokens"
        self.vocab_size = json.loads((directory / "config.json").read_text())["vocab_size"]
        self.begin()

    def begin(self) -> None:
        """As `Ours.begin`."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self.past = 0

    @property
    def kept_bytes(self) -> tuple[int, int]:
        return self.lib.llama_model_size(self.model), self.lib.llama_state_seq_get_size(self.context, 0)

    def take_over(self, other: Theirs) -> None:
        """Go on from the text that another has read, with matrices of other bits: its keys and values are of the same."""
        size = self.lib.llama_state_seq_get_size(other.context, 0)
        state = (ctypes.c_uint8 * size)()
        taken = self.lib.llama_state_seq_get_data(other.context, state, size, 0)
        assert taken == size == self.lib.llama_state_seq_set_data(self.context, state, size, 0), "llama.cpp keeps its state"
        self.past = other.past

    def repeat(self, texts: int) -> None:
        """Have that text so many times."""
        memory = self.lib.llama_get_memory(self.context)
        for i in range(1, texts):
            self.lib.llama_memory_seq_cp(memory, 0, i, -1, -1)

    def _extend(self, count: int) -> None:
        self.feed(torch.randint(self.vocab_size, (count,)).tolist())

    def feed_each(self, ids: Sequence[int]) -> None:
        """Read a token of each of as many texts, until the logits behind all of them are there."""
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, self.past, 1, i, 1
        code = self.lib.llama_decode(self.context, batch)
        assert code == 0, f"llama.cpp answers {code}"
        self.lib.llama_get_logits_ith(self.context, -1)  # waits for them
        self.lib.llama_batch_free(batch)
        self.past += 1

    def feed(self, ids: Sequence[int]) -> None:
        """Read these tokens."""
        tokens = (self.lib.llama_token * len(ids))(*ids)
        code = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(tokens, len(ids)))
        assert code == 0, f"llama.cpp answers {code}"
        self.lib.llama_get_logits_ith(self.context, -1)  # waits for them
        self.past += len(ids)


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)

GGUF = {
    "embed_tokens": "token_embd",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{part}_norm": f"attn_{part}_norm" for part in "qk"},
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}
"""Names of a layer's tensors, and of the embeddings, in llama.cpp's files."""


def _write_gguf(directory: Path, path: Path, kind: str) -> None:
    gguf: Any = import_module("gguf")
    config = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    matrix, vector = getattr(gguf.GGMLQuantizationType, kind), gguf.GGMLQuantizationType.F32
    for name, tensor in load_file(directory / "model.safetensors").items():
        parts = name.removeprefix("model.").split(".")
        layer, rest = (f"blk.{parts[1]}.", parts[2:-1]) if parts[0] == "layers" else ("", parts[:-1])
        theirs = layer + ("output_norm" if name == "model.norm.weight" else GGUF[".".join(rest)]) + ".weight"
        kept = vector if tensor.dim() == 1 else matrix
        writer.add_tensor(theirs, gguf.quants.quantize(tensor.float().numpy(), kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
