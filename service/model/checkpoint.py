"""Checkpoints on disk: a directory in Hugging Face format, `config.json`, `*.safetensors`, `tokenizer.json`.

safetensors only: nothing is ever unpickled, nothing is fetched. The one thing that differs from the files is that
q, k, v and gate, up are held as one matrix each (one large product instead of several small ones).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from service.model.tokenizer import Tokenizer
from service.model.transformer import ModelConfig, Transformer

EMBEDDED = Path(__file__).parent / "embedded"
"""The default model's directory."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Checkpoint:
    """A model ready to serve. `dtype_reason` says how its dtype was chosen."""

    id: str
    model: Transformer
    tokenizer: Tokenizer
    dtype_reason: str

    @property
    def max_length(self) -> int:
        """Most tokens a sequence may have, prompt and answer together."""
        return self.model.config.max_position_embeddings


def load(directory: str | Path = EMBEDDED, dtype: str = "auto", device: str = "cpu", name: str | None = None) -> Checkpoint:
    """Load a checkpoint directory.

    Args:
        dtype: `auto` takes bfloat16 where this machine multiplies it faster than float32 (measured now), else float32.
        name: the id it is served under; by default the `_name_or_path` of its config, else the directory's name.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an architecture, dtype or tensor that this service cannot serve, named.
    """
    directory = Path(directory)
    raw = _read_json(directory / "config.json")
    config = ModelConfig.from_dict(raw)
    chosen, reason = choose_dtype(dtype, device)
    model = Transformer(config)
    model.load_state_dict(_merged(config, _read_tensors(directory)), assign=False)
    model = model.to(device=device, dtype=chosen).requires_grad_(False).eval()
    model.pack()
    tokenizer = Tokenizer.load(directory, config.eos_token_id)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")
    return Checkpoint(name or raw.get("_name_or_path") or directory.resolve().name, model, tokenizer, reason)


def save(model: Transformer, directory: str | Path, extra: dict[str, Any] | None = None) -> None:
    """Write `config.json` and `model.safetensors` (bfloat16) so that transformers loads them too.

    `extra` is added to the config. The tokenizer's files are the caller's to place beside them.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in _split(model)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # save_file leaves it readable to its owner alone
    (directory / "config.json").write_text(json.dumps(_config_json(model.config) | (extra or {}), indent=2) + "\n")


def choose_dtype(dtype: str, device: str) -> tuple[torch.dtype, str]:
    """The dtype to serve in, and why. Raises ValueError for a name outside `auto` and DTYPES, or float16 on CPU."""
    if dtype != "auto":
        if dtype not in DTYPES or (dtype == "float16" and torch.device(device).type == "cpu"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or (on CUDA) float16, received {dtype!r} for {device}")
        return DTYPES[dtype], "set in the config"
    seconds = {kind: _product_seconds(kind, device) for kind in (torch.float32, torch.bfloat16)}
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    chosen = torch.bfloat16 if ratio > 1.2 else torch.float32
    return chosen, f"auto: bfloat16 products run at {ratio:.1f} times the speed of float32 ones here"


def _product_seconds(dtype: torch.dtype, device: str) -> float:
    """Median seconds of a 512-cubed matrix product."""
    a, b = (torch.ones(512, 512, dtype=dtype, device=device) for _ in range(2))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # .item() waits for an accelerator
        times.append(time.perf_counter() - start)
    return median(times[2:])


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    return dict(json.loads(path.read_text()))


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of `model.safetensors`, or of the shards that its index names."""
    index = directory / "model.safetensors.index.json"
    files = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for name in files:
        if not (directory / name).is_file():
            raise FileNotFoundError(f"no {name} in {directory}; only safetensors are loaded")
        with safe_open(directory / name, framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    return tensors


def _names(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(our parameter, the file's tensors it is the concatenation of), for every parameter."""
    yield "embed.weight", ("model.embed_tokens.weight",)
    yield "final_norm", ("model.norm.weight",)
    if not config.tie_word_embeddings:
        yield "head.weight", ("lm_head.weight",)
    for i in range(config.num_hidden_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        yield f"{ours}.attention_norm", (f"{theirs}.input_layernorm.weight",)
        yield f"{ours}.mlp_norm", (f"{theirs}.post_attention_layernorm.weight",)
        if config.qk_norm:
            yield f"{ours}.q_norm", (f"{theirs}.self_attn.q_norm.weight",)
            yield f"{ours}.k_norm", (f"{theirs}.self_attn.k_norm.weight",)
        for name, parts, bias in (
            ("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), config.attention_bias),
            ("out", ("self_attn.o_proj",), config.output_bias),
            ("gate_up", ("mlp.gate_proj", "mlp.up_proj"), config.mlp_bias),
            ("down", ("mlp.down_proj",), config.mlp_bias),
        ):
            for kind in ("weight", "bias") if bias else ("weight",):
                yield f"{ours}.{name}.{kind}", tuple(f"{theirs}.{part}.{kind}" for part in parts)


def _merged(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from the file's tensors. Raises ValueError naming tensors that are missing or left over."""
    wanted = dict(_names(config))
    expected = {theirs for names in wanted.values() for theirs in names}
    spare = {"lm_head.weight"} if config.tie_word_embeddings else set()  # some files repeat the tied embedding
    if missing := sorted(expected - tensors.keys()):
        raise ValueError(f"the checkpoint lacks {len(missing)} tensors, first {missing[:3]}")
    if unknown := sorted(tensors.keys() - expected - spare):
        raise ValueError(f"the checkpoint has {len(unknown)} tensors this architecture does not know, first {unknown[:3]}")
    return {ours: torch.cat([tensors[name] for name in names]) for ours, names in wanted.items()}


def _split(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The file's tensors from our parameters."""
    config, parameters = model.config, dict(model.named_parameters())
    heads, groups, depth = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    sizes = {3: [heads * depth, groups * depth, groups * depth], 2: [config.intermediate_size] * 2}
    for ours, names in _names(config):
        tensor = parameters[ours].detach().to_dense()  # a loaded model's matrices are packed
        yield from zip(names, tensor.split(sizes[len(names)]) if len(names) > 1 else (tensor,), strict=True)


def _config_json(config: ModelConfig) -> dict[str, Any]:
    assert config.model_type == "qwen3", "only the embedded family is written"
    rope = dict(config.rope)
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "hidden_act": "silu",
        "eos_token_id": config.eos_token_id,
        "bos_token_id": config.eos_token_id,  # as service.training.corpus has it
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
