"""Keys and values in 8 bits: of each token and head D whole numbers, and behind them their scale.

    x (T, G, D)  ->  int8 (T, G, D + 4):   | D numbers of -127 .. 127 | the scale, a float32 |

A number tells itself times the scale, which is the head's largest magnitude over 127: symmetric and by rows, as in LLM.int8()
(Dettmers et al., arXiv 2208.07339, section 2.1). So an element is off by half a scale at most, 1/254 of its head's largest, and
a token takes (D + 4) / 2 D of bfloat16's bytes: 52 % at a width of 128. Numbers and scale stand side by side, so a history is
read in one stream. What is attended to is what was kept, by a token's own chunk, too: how a text is cut changes nothing.

A head with a NaN or an infinite element is NaN in all of them.

`quantize` goes by a backend's implementation; the native one (int8.c) makes the same numbers to the bit, in one call.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from attention.kernels.library import (
    HERE,
    INT,
    POINTER,
    Kernel,
    numbers,
    packing,
    room,
    rooms,
    threads,
    view,
    views,
)
from attention.parts import spread
from attention.shapes import SCALE_BYTES, HeadShape

MOST = 127  # the largest number; -128 has no counterpart
TOGETHER = 1 << 16  # elements that are looked at together in torch: what stands between stays small


class Rounding(ctypes.Structure):
    """`Rounding` of int8.c."""

    _fields_ = [*views("k", "v"), *rooms("out"), *numbers("wide")]


KERNEL = Kernel(HERE, "int8_layout", {"quantize": (POINTER, INT)}, (), (Rounding,))
_rounding = packing(Rounding)


def quantize(k: Tensor, v: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """k and v (T, G, D) in 8 bits, int8 (T, G, D + 4) each. impl: who computes, see `implementation`."""
    out = torch.empty(2, *k.shape[:2], k.shape[2] + SCALE_BYTES, dtype=torch.int8, device=k.device)
    if impl == "native":
        KERNEL.call("quantize", _rounding(*view(k), *view(v), *room(out), k.dtype == torch.float32), threads())
    else:
        for x, into in ((k, out[0]), (v, out[1])):
            for first, last in spread(0, len(x), _rows(x)):
                round_off(x[first:last], into[first:last])
    return out[0], out[1]


def round_off(x: Tensor, out: Tensor) -> None:
    """The definition: x (T, G, D) in 8 bits into out (T, G, D + 4)."""
    wide, width = x.float(), x.shape[-1]
    scale = wide.abs().amax(-1, keepdim=True) / MOST
    usable = scale.isfinite() & (scale > 0)
    told = torch.where(usable, wide / scale, 0.0).round_().clamp_(-MOST, MOST)
    out[..., :width] = told.to(torch.int8)
    out[..., width:].view(torch.float32).copy_(torch.where(scale.isfinite(), scale, math.nan))


def dequantize(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """What is told by keys or values (N, ..., D + 4) in 8 bits, tight (N, ..., D) in a dtype; others are left as they are."""
    if kept.dtype != torch.int8:
        return kept
    width = kept.shape[-1] - SCALE_BYTES
    out = torch.empty(*kept.shape[:-1], width, dtype=dtype, device=kept.device)
    for first, last in spread(0, len(kept), _rows(out)):
        part = kept[first:last]
        out[first:last] = part[..., :width] * part[..., width:].view(torch.float32).to(
            torch.promote_types(dtype, torch.float32)
        )
    return out


def told_bytes(shape: HeadShape, keys: int) -> int:
    """Bytes of `dequantize` of so many tokens' keys and values; 0 where a shape does not keep them in 8 bits."""
    if shape.kv is None:
        return 0
    width = shape.key_value_heads * shape.head_width
    return 2 * keys * width * shape.itemsize + min(keys * width, TOGETHER) * 8  # on the way to them


def _rows(x: Tensor) -> int:
    """Rows of x that are looked at together."""
    return max(1, TOGETHER // math.prod(x.shape[1:]))
