"""What a decoder layer does between its products, in C for CPUs with AVX-512; `Layer` in `transformer.py` is the slow reading.

`csrc/layer.c` computes, built at install. A packed model uses it where it can (`Transformer.pack`); no gradient passes here.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

WORDS = {torch.float32: 1, torch.bfloat16: 2}  # the dtypes, by the bits with which cpu.h names them


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, None where the package was installed without a C compiler."""
    beside = (Path(__file__).with_name("_native" + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    found = next((path for path in beside if path.exists()), None)
    if found is None:
        return None
    loaded, pointer, number = ctypes.CDLL(str(found)), ctypes.c_void_p, ctypes.c_int64
    some, last = (pointer, pointer, number, number), (pointer, ctypes.c_int, ctypes.c_int)
    loaded.norm.argtypes, loaded.norm.restype = (*some, ctypes.c_float, *last), None
    turning = (pointer, number, pointer, number, number, number, ctypes.c_float, pointer, pointer, number)
    loaded.turn.argtypes, loaded.turn.restype = (*turning, *last), None
    loaded.gate.argtypes, loaded.gate.restype = (pointer, number, number, *last), None
    return loaded


def suits(dtype: torch.dtype, device: torch.device, hidden_size: int, intermediate_size: int, head_dim: int) -> bool:
    """Whether layers of these widths can be computed here."""
    whole = hidden_size % 16 == 0 and intermediate_size % 16 == 0 and head_dim % 32 == 0 and head_dim <= 256
    loaded = library() if device.type == "cpu" and dtype in WORDS and whole else None
    return loaded is not None and bool(loaded.supported() & WORDS[dtype])


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of x (T, C)."""
    out = torch.empty_like(x)
    rows, width = x.shape
    assert x.is_contiguous() and weight.is_contiguous()
    _loaded().norm(x.data_ptr(), weight.data_ptr(), rows, width, epsilon, out.data_ptr(), *_how(x))
    return out


def turn(x: Tensor, weights: Tensor | None, heads: int, depth: int, epsilon: float, cos: Tensor, sin: Tensor) -> Tensor:
    """The first heads of projected x (T, any), normed where there are weights (heads, D) and rotated: (T, heads, D).

    cos, sin: (T, 1, D), as of `Transformer.rotation`.
    """
    out = x.new_empty(len(x), heads, depth)
    assert x.stride(1) == cos.stride(2) == sin.stride(2) == 1 and cos.stride(0) == sin.stride(0)
    angles = (cos.data_ptr(), sin.data_ptr(), cos.stride(0))
    scales = None if weights is None else weights.data_ptr()
    _loaded().turn(x.data_ptr(), x.stride(0), scales, len(x), heads, depth, epsilon, *angles, out.data_ptr(), *_how(x))
    return out


def gate(x: Tensor) -> Tensor:
    """silu(gate) up of x (T, 2 F), gate and up side by side: (T, F)."""
    rows, width = x.shape[0], x.shape[1] // 2
    out = x.new_empty(rows, width)
    assert x.is_contiguous()
    _loaded().gate(x.data_ptr(), rows, width, out.data_ptr(), *_how(x))
    return out


def _how(x: Tensor) -> tuple[bool, int]:
    return x.dtype == torch.float32, torch.get_num_threads()


def _loaded() -> ctypes.CDLL:
    found = library()
    assert found is not None, "`suits` tells whether it can be called"
    return found
