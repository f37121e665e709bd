"""What a decoder layer does between its products, in C for CPUs with AVX-512; `Layer` in `transformer.py` is the slow reading.

`csrc/layer.c` computes, built at install. A packed model uses it where it can (`Transformer.pack`); no gradient passes here.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import struct
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

VIEW_WORDS = 8  # a tensor, as in given.h
_pack = struct.Struct(f"{VIEW_WORDS}q").pack
WORDS = {torch.float32: 1, torch.bfloat16: 2}  # the dtypes, by the bits with which cpu.h names them


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, None where the package was installed without a C compiler."""
    beside = (Path(__file__).with_name("_native" + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    found = next((path for path in beside if path.exists()), None)
    if found is None:
        return None
    loaded, pointer, number = ctypes.CDLL(str(found)), ctypes.c_void_p, ctypes.c_int64
    if not hasattr(loaded, "layer_layout") or number.in_dll(loaded, "layer_layout").value != 8 * VIEW_WORDS:
        raise RuntimeError(f"{found} was built from other sources than these: install the package again")
    room, last = (pointer, number), (pointer, number, ctypes.c_int, ctypes.c_int)
    loaded.norm.argtypes = (pointer, *room, ctypes.c_float, *last)
    loaded.turn.argtypes = (pointer, *room, number, number, ctypes.c_float, pointer, pointer, *last)
    loaded.gate.argtypes = (pointer, *last)
    for function in (loaded.norm, loaded.turn, loaded.gate):
        function.restype = ctypes.c_char_p  # null, or what was wrong
    return loaded


def suits(dtype: torch.dtype, device: torch.device, hidden_size: int, intermediate_size: int, head_dim: int) -> bool:
    """Whether layers of these widths can be computed here."""
    whole = hidden_size % 16 == 0 and intermediate_size % 16 == 0 and head_dim % 32 == 0 and head_dim <= 256
    loaded = library() if device.type == "cpu" and dtype in WORDS and whole else None
    return loaded is not None and bool(loaded.supported() & WORDS[dtype])


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of x (T, C)."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _done(_loaded().norm(_view(x), *_room(weight, x), epsilon, *_last(out)))
    return out


def turn(x: Tensor, weights: Tensor | None, heads: int, depth: int, epsilon: float, cos: Tensor, sin: Tensor) -> Tensor:
    """The first heads of projected x (T, any), normed where there are weights (heads, D) and rotated: (T, heads, D).

    cos, sin: (T, 1, D), as of `Transformer.rotation`.
    """
    out = x.new_empty(len(x), heads, depth)
    _done(_loaded().turn(_view(x), *_room(weights, x), heads, depth, epsilon, _view(cos), _view(sin), *_last(out)))
    return out


def gate(x: Tensor) -> Tensor:
    """silu(gate) up of x (T, 2 F), gate and up side by side: (T, F)."""
    out = x.new_empty(x.shape[0], x.shape[1] // 2)
    _done(_loaded().gate(_view(x), *_last(out)))
    return out


def _view(x: Tensor) -> bytes:
    """A tensor (T, width) or (T, 1, width) as given.h describes it."""
    (rows, *_, width), (row, *_, element) = x.shape, x.stride()
    return _pack(x.data_ptr(), x.itemsize, rows, x.numel() // (rows * width or 1), width, row, 0, element)


def _room(x: Tensor | None, like: Tensor) -> tuple[int | None, int]:
    """Tight memory, and its bytes."""
    if x is None:
        return None, 0
    if not x.is_contiguous() or x.dtype != like.dtype:
        raise RuntimeError(f"weights must be tight and {like.dtype}, received {x.dtype} of strides {x.stride()}")
    return x.data_ptr(), x.nbytes


def _last(out: Tensor) -> tuple[int, int, bool, int]:
    """What all three are told last: where the answer goes, whether it is float32, and the threads."""
    return out.data_ptr(), out.nbytes, out.dtype == torch.float32, torch.get_num_threads()


def _done(reason: bytes | None) -> None:
    """Raise RuntimeError where the kernel refused what it was given, before it touched any of it."""
    if reason is not None:
        raise RuntimeError(f"the layer's kernel was given what it cannot take: {reason.decode()}")


def _loaded() -> ctypes.CDLL:
    found = library()
    assert found is not None, "`suits` tells whether it can be called"
    return found
