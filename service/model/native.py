"""What a decoder layer does between its products, in C for CPUs with AVX-512; `Layer` in `transformer.py` is the slow reading.

`csrc/layer.c` computes, built at install. A packed model uses it where it can (`Transformer.pack`); no gradient passes here.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from attention.kernels.library import FLOAT, INT, NUMBER, POINTER, VIEW, WIDEST, Kernel, pack_view, room, threads

_ROOM, _LAST = (POINTER, NUMBER), (POINTER, NUMBER, INT, INT)
KERNEL = Kernel(
    Path(__file__).parent,
    "layer_layout",
    {
        "norm": (POINTER, *_ROOM, FLOAT, *_LAST),
        "turn": (POINTER, *_ROOM, NUMBER, NUMBER, FLOAT, POINTER, POINTER, *_LAST),
        "gate": (POINTER, *_LAST),
    },
    (len(VIEW),),
)


def suits(dtype: torch.dtype, device: torch.device, hidden_size: int, intermediate_size: int, head_dim: int) -> bool:
    """Whether layers of these widths can be computed here."""
    whole = hidden_size % 16 == 0 and intermediate_size % 16 == 0 and head_dim % 32 == 0 and head_dim <= WIDEST
    return whole and KERNEL.obstacle(dtype, device) is None


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of x (T, C)."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    KERNEL.call("norm", _view(x), *_room(weight, x), epsilon, *_last(out))
    return out


def turn(x: Tensor, weights: Tensor | None, heads: int, depth: int, epsilon: float, cos: Tensor, sin: Tensor) -> Tensor:
    """The first heads of projected x (T, any), normed where there are weights (heads, D) and rotated: (T, heads, D).

    cos, sin: (T, 1, D), as of `Transformer.rotation`.
    """
    out = x.new_empty(len(x), heads, depth)
    KERNEL.call("turn", _view(x), *_room(weights, x), heads, depth, epsilon, _view(cos), _view(sin), *_last(out))
    return out


def gate(x: Tensor) -> Tensor:
    """silu(gate) up of x (T, 2 F), gate and up side by side: (T, F)."""
    out = x.new_empty(x.shape[0], x.shape[1] // 2)
    KERNEL.call("gate", _view(x), *_last(out))
    return out


def _view(x: Tensor) -> bytes:
    """A tensor (T, width) or (T, 1, width) as given.h describes it."""
    (rows, *_, width), (row, *_, element) = x.shape, x.stride()
    return pack_view(x.data_ptr(), x.itemsize, rows, x.numel() // (rows * width or 1), width, row, 0, element)


def _room(x: Tensor | None, like: Tensor) -> tuple[int, int]:
    """Tight memory of the same dtype, and its bytes."""
    if x is not None and x.dtype != like.dtype:
        raise RuntimeError(f"weights must be {like.dtype}, received {x.dtype}")
    return room(x)


def _last(out: Tensor) -> tuple[int, int, bool, int]:
    """What all three are told last: where the answer goes, whether it is float32, and the threads."""
    return out.data_ptr(), out.nbytes, out.dtype == torch.float32, threads()
