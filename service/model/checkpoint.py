"""Checkpoints on disk: a directory in Hugging Face format, `config.json`, `*.safetensors`, `tokenizer.json`.

safetensors only: nothing is ever unpickled, nothing is fetched. How a config is read and where parameters stand is its family's
(`families`); in which files, `weights`.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from service.model import families, files
from service.model.config import Kv, ModelConfig, eos_token_ids
from service.model.layout import Weight
from service.model.quantized import Weights, bits_of
from service.model.sentence import Folder
from service.model.tokenizer import Tokenizer
from service.model.transformer import Transformer
from service.model.weights import Tensors, check, fill, is_filled

EMBEDDED = Path(__file__).parent / "embedded"
"""The default model's directory."""
EMBEDDED_ID = "longserve-stdlib-5m"
HEAD = "lm_head.weight"

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
        return self.model.config.max_length


def load(
    directory: str | Path = EMBEDDED,
    dtype: str = "auto",
    device: str = "cpu",
    name: str | None = None,
    max_length: int | None = None,
    weights: str = "auto",
    kv: str = "auto",
) -> Checkpoint:
    """Load a checkpoint directory.

    Args:
        dtype: `auto` takes bfloat16 where this machine multiplies it faster than float32 (measured now), else float32.
        max_length: tokens of the longest sequence that will be served; by default the checkpoint's context.
        name: the id it is served under; by default the directory's name, or the repository's in a hub's cache.
        weights, kv: in which it keeps its matrices, and keys and values, see `check_kept`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file that is damaged, or a config or tensor that this service cannot serve, named.
    """
    directory = files.find(Path(directory))
    config, layout = read_layout(directory)
    chosen, reason = choose_dtype(dtype, device)
    check_kept(chosen, weights, kv)
    model = outline(config.up_to(max_length).keeping(kv))
    for parameters, tensors in layout:
        fill(model, parameters, tensors, chosen, device, partial(bits_of, weights))
    assert is_filled(model), f"the layout of {config.model_type} leaves parameters without a value"
    model.eval().pack()
    tokenizer = Tokenizer.load(directory, config.eos_token_id, config.vocab_size)
    return Checkpoint(name or id_of(directory), model, tokenizer, reason)


def outline(config: ModelConfig) -> Transformer:
    """A model whose parameters have shapes and no memory."""
    with torch.device("meta"):
        return Transformer(config)


Layout = list[tuple[list[Weight], Tensors]]
"""Parameters, and the files that they stand in."""


def read_layout(directory: Path) -> tuple[ModelConfig, Layout]:
    """What the directory's configs say and where the tensors they ask for are, all of them there in the right shape.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    config = read_config(directory)
    tensors = Tensors(directory, families.of(config.model_type).PREFIX)
    config = families.complete(_with_head(config, tensors), tensors)
    body = list(families.of(config.model_type).weights(config))
    check(body, tensors, families.unused(config.model_type))
    behind = list(Folder(directory).weights()) if not config.pooled.labels else []
    for weights, others in behind:
        check(weights, others)
    return config, [*behind, (body, tensors)]


def read_config(directory: Path) -> ModelConfig:
    """What the directory's `config.json` says, and what counts where it is: the ends of text of its `generation_config.json`,
    sentence-transformers' modules.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    path, raw = directory / "config.json", files.read_json(directory / "config.json")
    ends = files.read_json_if_there(directory / "generation_config.json").get("eos_token_id")
    try:
        config = Folder(directory).applied(families.read(raw))
        ids = config.eos_token_ids if ends is None else eos_token_ids(ends)
        return replace(config, eos_token_ids=tuple(each for each in ids if 0 <= each < config.vocab_size))  # others never come
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def id_of(directory: Path) -> str:
    """A model's id: its directory's name; in a hub's cache, `models--owner--name/snapshots/commit`, the repository's."""
    if directory == EMBEDDED:
        return EMBEDDED_ID
    whole = directory.resolve()
    repository = whole.parent.parent.name
    if whole.parent.name == "snapshots" and repository.startswith("models--"):
        return "/".join(repository.split("--")[1:])
    return whole.name


def _with_head(config: ModelConfig, tensors: Tensors) -> ModelConfig:
    """The config as its files have the head: one that is there and differs from the embeddings is not tied to them."""
    (_, embeddings), *_ = families.of(config.model_type).weights(config)
    if not config.is_causal or not config.tie_word_embeddings or HEAD not in tensors.shapes:
        return config
    if embeddings[0].name not in tensors.shapes:
        tensors.rename(HEAD, embeddings[0].name)
    elif tensors.are_equal(HEAD, embeddings[0].name):
        tensors.drop(HEAD)
    else:
        return replace(config, tie_word_embeddings=False)
    return config


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
    if multiplies_bfloat16(device):
        return torch.bfloat16, "auto: this machine has instructions for products of bfloat16"
    return torch.float32, "auto: this machine has no instructions for products of bfloat16"


def check_kept(dtype: torch.dtype, weights: str, kv: str) -> None:
    """In which a model of a dtype keeps its matrices, and keys and values: `auto`, that dtype; `bf16`; `int8`, matrices also in
    `int4`: see `quantized`, and `attention.kernels.int8`.

    Raises:
        ValueError: another name; `bf16` where the dtype is another.
    """
    for field, value, known in (("weights", weights, get_args(Weights)), ("kv", kv, get_args(Kv))):
        if value not in known:
            raise ValueError(f"{field} must be one of {', '.join(known)}, received {value!r}")
        if value == "bf16" and dtype != torch.bfloat16:
            others = " and ".join(each for each in known if each != "bf16")
            raise ValueError(f"{field}: bf16 needs dtype: bfloat16, which here is {dtype}; {others} go with any")


def multiplies_bfloat16(device: str) -> bool:
    """Whether a device has instructions for products of bfloat16. Asked, not timed: a busy machine would answer otherwise, and
    two replicas of one service would give different answers."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if platform.machine() in ("x86_64", "AMD64"):
        return bool(torch.cpu._is_avx512_bf16_supported())  # AMX comes with it
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _split(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The file's tensors from our parameters."""
    config, parameters = model.config, dict(model.named_parameters())
    if model.embed.packed is not None:
        parameters["embed.weight"] = nn.Parameter(model.embed.packed.dense(), requires_grad=False)
    for ours, parts in families.of(config.model_type).weights(config):
        tensor = parameters[ours].detach().to_dense()  # a loaded model's matrices are packed
        pieces = tensor.split([part.shape[0] for part in parts])
        yield from ((part.name, piece) for part, piece in zip(parts, pieces, strict=True))


def _config_json(config: ModelConfig) -> dict[str, Any]:
    assert config.model_type == "qwen3", "only the embedded family is written"
    rope = dict(config.ropes[0])
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
        "rms_norm_eps": config.norm_eps,
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
