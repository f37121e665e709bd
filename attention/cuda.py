"""Dense and windowed attention on CUDA through xformers (0.0.35), over the packed batch as it is.

`kernels/implementation.py` chooses it. xformers has no CPU operator, so it is imported on CUDA only. The masks are tested on
CPU against our own definitions; the kernels themselves have been run on no GPU yet (the tests marked `gpu` await one).
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attention.shapes import HeadShape, Segments


def obstacle(shape: HeadShape) -> str | None:
    """Why xformers cannot answer heads of a shape here; None when it can."""
    return _probe(shape.device.type, shape.dtype, shape.head_width)


@cache
def _probe(device: str, dtype: torch.dtype, width: int) -> str | None:
    """Why xformers cannot answer here, None when one tiny call with a packed mask was answered."""
    if device != "cuda":
        return f"xformers has no operator for device {device}"
    try:
        tiny = torch.zeros(1, 3, 1, width, dtype=dtype, device=device)
        attend(tiny[0], tiny[0], tiny[0], Segments((2, 1)), causal=True)
    except (ImportError, AttributeError, NotImplementedError, RuntimeError) as error:
        return f"the probe of xformers failed: {error}"
    return None


def bias(segments: Segments, *, causal: bool, window: int | None = None) -> Any:
    """xformers' mask of a packed batch; `window` (causal only) counts earlier tokens, the token itself not counted."""
    masks = importlib.import_module("xformers.ops.fmha.attn_bias")
    blocks = masks.BlockDiagonalMask.from_seqlens(list(segments.lengths))
    if not causal:
        return blocks
    return blocks.make_causal() if window is None else blocks.make_causal().make_local_attention(window + 1)


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, window: int | None = None) -> Tensor:
    """Whole sequences: q (T, H, D), k and v (T, G, D) to (T, H, D)."""
    fmha = importlib.import_module("xformers.ops.fmha")
    tokens, heads, width = q.shape
    groups = k.shape[1]
    queries = q.view(1, tokens, groups, heads // groups, width)  # xformers' BMGHK: batch, token, group, head of group, width
    keys, values = (x.view(1, tokens, groups, 1, width).expand(queries.shape) for x in (k, v))
    mask = bias(segments, causal=causal, window=window)
    answer: Tensor = fmha.memory_efficient_attention_forward(queries, keys, values, attn_bias=mask)
    return answer.reshape(tokens, heads, width)
