"""Tensors of a checkpoint's safetensors files, and a model filled with them, one parameter at a time.

Names, shapes and dtypes are checked from the files' headers before anything is read. A file is mapped for one parameter and let
go, so that loading holds the model, one parameter and no second copy of the whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from service.model import files
from service.model.layout import Part, Weight
from service.model.projection import Projection, Table

DTYPES = {"F64", "F32", "F16", "BF16"}
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(bias|masked_bias)|embeddings\.(position_ids|token_type_ids))$")
"""Tensors that a file may repeat although the config says them: tables of angles, masks."""
RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Parts of names as the oldest files have them."""
QUANTIZED = {
    r"\.qweight$": "GPTQ or AWQ",
    r"\.(absmax|quant_map|quant_state\..*|SCB)$": "bitsandbytes",
    r"\.(weight_scale|weight_scale_inv|input_scale|weight_packed)$": "FP8 or compressed",
}


class Tensors:
    """The tensors of a directory by the names a family gives them. `shapes` says what there is."""

    def __init__(self, directory: Path, prefix: str) -> None:
        """Read the headers.

        prefix: of the body's tensors; put before all names where no name has it, as in files saved from the body alone.

        Raises:
            FileNotFoundError, ValueError: a file is missing, damaged or holds something else than floats.
        """
        self._directory = directory
        self._places: dict[str, tuple[str, str]] = {}  # our name to file and name there
        self.shapes: dict[str, tuple[int, ...]] = {}
        found = self._headers(files.weight_files(directory))
        has_prefix = any(name.startswith(prefix) for name in found)
        for name, (file, shape, dtype) in found.items():
            if BUFFERS.search(name):
                continue
            _check_dtype(directory / file, name, dtype)
            ours = name if has_prefix or name.startswith("lm_head.") else prefix + name
            for old, new in RENAMED.items():
                ours = ours.replace(old, new)
            self._places[ours], self.shapes[ours] = (file, name), shape

    def _headers(self, index: Mapping[str, str | None]) -> dict[str, tuple[str, tuple[int, ...], str]]:
        """(file, shape, dtype) of every tensor."""
        found: dict[str, tuple[str, tuple[int, ...], str]] = {}
        for file in sorted({file or name for name, file in index.items()}):
            with _opened(self._directory / file) as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
                found |= {name: (file, tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}
        if strays := sorted(name for name, file in index.items() if file is not None and found.get(name, ("",))[0] != file):
            raise ValueError(f"{strays[0]} is not in {index[strays[0]]}, where model.safetensors.index.json has it")
        return found

    def rename(self, old: str, new: str) -> None:
        """Know a tensor by another name."""
        self._places[new], self.shapes[new] = self._places.pop(old), self.shapes.pop(old)

    def drop(self, name: str) -> None:
        """Know a tensor no more."""
        del self._places[name], self.shapes[name]

    def are_equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers."""
        return torch.equal(*(self._tensor(name) for name in (one, other)))

    def _tensor(self, name: str) -> Tensor:
        file, theirs = self._places[name]
        with _opened(self._directory / file) as opened:
            return cast(Tensor, opened.get_tensor(theirs))

    def read(self, parts: Sequence[Part], dtype: torch.dtype, device: str) -> Tensor:
        """A parameter of ours. Raises ValueError for a number in it that is none."""
        turned = []
        for part in parts:
            tensor = self._tensor(part.name)
            low, high = torch.aminmax(tensor) if tensor.numel() else (tensor.new_zeros(()),) * 2
            if not (low.to(dtype).isfinite() and high.to(dtype).isfinite()):
                path = self._directory / self._places[part.name][0]
                raise ValueError(f"{part.name} in {path} holds NaN or infinity, or numbers beyond {dtype}: the file is damaged")
            turned.append(tensor if part.turn is None else part.turn(tensor))
            del tensor
        rows = sum(len(each) for each in turned)
        whole = torch.empty(rows, *turned[0].shape[1:], dtype=dtype, device=device)
        return torch.cat(turned, out=whole) if turned[0].dtype == dtype else _cast(turned, whole)


def _cast(parts: Iterable[Tensor], whole: Tensor) -> Tensor:
    start = 0
    for part in parts:
        whole[start : start + len(part)] = part
        start += len(part)
    return whole


def _opened(path: Path) -> Any:
    try:
        return safe_open(files.whole(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or damaged ({error}): download it again") from error


def _check_dtype(path: Path, name: str, dtype: str) -> None:
    for pattern, kind in QUANTIZED.items():
        if re.search(pattern, name):
            raise ValueError(f"{path} holds {name}: its weights are quantized ({kind}); take the files that are not")
    if dtype not in DTYPES:
        kind = "quantized to FP8" if dtype.startswith("F8") else "quantized, or no weights"
        raise ValueError(f"{name} in {path} is of dtype {dtype}: {kind}; float weights are needed")


def check(weights: Sequence[Weight], tensors: Tensors, unused: str | None = None) -> None:
    """Raise ValueError naming tensors that are missing, left over, or of another shape than the config says.

    unused: a pattern of names that may be left over.
    """
    parts = {part.name: part for _, parts in weights for part in parts}
    if missing := sorted(parts.keys() - tensors.shapes.keys()):
        raise ValueError(f"the checkpoint lacks {len(missing)} tensors, first {missing[:3]}")
    left = tensors.shapes.keys() - parts.keys()
    if unknown := sorted(name for name in left if unused is None or not re.match(unused, name)):
        raise ValueError(f"the checkpoint has {len(unknown)} tensors this architecture does not know, first {unknown[:3]}")
    for name, part in parts.items():
        if tensors.shapes[name] != part.shape:
            raise ValueError(f"{name} must have shape {part.shape} by config.json, the file has {tensors.shapes[name]}")


def fill(
    model: nn.Module,
    weights: Iterable[Weight],
    tensors: Tensors,
    dtype: torch.dtype,
    device: str,
    bits: Callable[[str], int | None] = lambda name: None,
) -> None:
    """Give a model made on the meta device its parameters. bits: in which one is kept, by its name; None: the dtype's."""
    for name, parts in weights:
        owner, _, leaf = name.rpartition(".")
        kept = torch.float32 if name.startswith("pooler.") else dtype
        parameter = nn.Parameter(tensors.read(parts, kept, device), requires_grad=False)
        module = model.get_submodule(owner)
        assert getattr(module, leaf).shape == parameter.shape, f"{name} is of another shape"
        setattr(module, leaf, parameter)
        if (fewer := bits(name)) is not None:
            assert isinstance(module, Projection | Table), f"{name} is no matrix that may be quantized"
            module.quantize(fewer)


def is_filled(model: nn.Module) -> bool:
    """Whether every parameter has a value."""
    return not any(parameter.is_meta for parameter in model.parameters())
