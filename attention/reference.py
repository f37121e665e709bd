"""The slow, exact oracle: attention in float64, straight from a backend's own definition (`visible` or `kernel`).

Cost O(rows x n) in time and memory, one (rows, n) matrix per head: for tests and for the served-truth check.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attention import relative
from attention.interface import AttentionBackend
from attention.kernels import int8


def answer(backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, rows: Tensor | None = None) -> Tensor:
    """What a backend should answer to one whole sequence.

    Args:
        q: (n, H, D). k, v: (n, G, D). Any dtype.
        rows: int64 positions whose answers are wanted; None: all n.

    Returns:
        float64 (rows, H, D). A row that sees nothing is zeros.
    """
    found = weights(backend, q, k, v, causal=causal, rows=rows)
    _, v = told(backend, k, v)
    answers: Tensor = found @ v.double().transpose(0, 1).repeat_interleave(backend.shape.group, 0)
    return answers.transpose(0, 1)


def weights(backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, rows: Tensor | None = None) -> Tensor:
    """What each key weighs in each answer of `answer`, float64 (H, rows, n): a row sums to 1, or 0 if it sees nothing."""
    rows = torch.arange(len(q)) if rows is None else rows
    k, v = told(backend, k, v)
    queries, keys, values = (x.double().transpose(0, 1) for x in (q[rows], k, v))
    keys, values = (x.repeat_interleave(backend.shape.group, 0) for x in (keys, values))  # (H, n, D)
    found = torch.where(visible(backend, rows, len(q), causal), _weights(backend, queries, keys, values, rows), 0.0)
    total = found.sum(-1, keepdim=True)
    return found / torch.where(total == 0, 1.0, total)


def told(backend: AttentionBackend, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What a backend's states tell of keys and values (n, G, D): themselves, unless they are kept in 8 bits."""
    if backend.shape.kv is None:
        return k, v
    kept_k, kept_v = int8.quantize(k, v, "torch")
    return int8.dequantize(kept_k, torch.float64), int8.dequantize(kept_v, torch.float64)


def visible(backend: AttentionBackend, rows: Tensor, length: int, causal: bool) -> Tensor:
    """Bool (rows, length): which positions the positions `rows` of one sequence see."""
    i, j = rows[:, None], torch.arange(length)[None, :]
    before = (j <= i) if causal else torch.ones(len(rows), length, dtype=torch.bool)
    if not backend.exact:
        return before
    return before & backend.visible(i, j, i + 1 if causal else length)


def _weights(backend: AttentionBackend, queries: Tensor, keys: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """Weights (H, rows, n) up to a factor per row."""
    if not backend.exact:
        return backend.kernel(queries, keys, values, rows[:, None], torch.arange(keys.shape[1])[None, :])
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    if backend.score_cap is not None:
        scores = backend.score_cap * (scores / backend.score_cap).tanh()
    if backend.score_bias is not None:
        scores = scores + relative.bias(backend.score_bias.cpu().double(), rows[:, None], torch.arange(keys.shape[1]))
    return (scores - scores.amax(-1, keepdim=True)).exp()
