"""Differentiable forms of the backends that the embedded model is trained under.

The backends themselves are inference only. These compute the same functions with autograd over equal-length sequences
laid side by side; `tests/training` holds each to its backend. Cost: block matrix products, scores kept for the way back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention.backends.performer import projection
from service.model.transformer import Attend

BLOCK = 256  # query rows at a time: as small as matrix products of full speed allow, so little is masked away


def softmax_attention(length: int, window: int | None = None, sinks: int = 0) -> Attend:
    """Causal softmax attention over sequences of `length` tokens: dense, or `window` earlier tokens and `sinks` first ones."""

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = _grouped(q, k, v, length)
        q = q * q.shape[-1] ** -0.5
        answers = [_block(q, k, v, start, min(start + BLOCK, length), window, sinks) for start in range(0, length, BLOCK)]
        return _packed(torch.cat(answers, dim=3))

    return attend


def _block(q: Tensor, k: Tensor, v: Tensor, start: int, end: int, window: int | None, sinks: int) -> Tensor:
    """Answers of query rows start to end."""
    first = 0 if window is None else max(0, start - window)
    keys = torch.arange(first, end)
    if first > 0 and sinks > 0:
        keys = torch.cat((torch.arange(min(sinks, first)), keys))
        k_seen, v_seen = k[:, :, keys], v[:, :, keys]
    else:
        k_seen, v_seen = k[:, :, first:end], v[:, :, first:end]
    rows = torch.arange(start, end)[:, None]
    hidden = keys > rows
    if window is not None:
        hidden |= (rows - keys > window) & (keys >= sinks)
    batch, groups, repeat, _, width = q.shape
    scores = q[:, :, :, start:end].flatten(2, 3) @ k_seen.transpose(-1, -2)  # (B, G, R * rows, keys)
    bias = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, float("-inf"))
    scores.view(batch, groups, repeat, end - start, -1).add_(bias)
    return (scores.softmax(-1) @ v_seen).view(batch, groups, repeat, end - start, width)


def performer_attention(length: int, features: int, seed: int, block: int = 128) -> Attend:
    """Causal FAVOR+ over sequences of `length` tokens (a multiple of `block`), in blocks with a running fp32 state."""

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = projection(features, q.shape[-1], seed).to(q.dtype)
        q, k, v = _grouped(q, k, v, length)
        v = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)  # the last column sums the weights
        phi_q = _features(q, rows, (-1,)).unflatten(3, (-1, block))  # (B, G, R, n, c, m)
        phi_k = _features(k, rows, (-2, -1)).unflatten(2, (-1, block))  # (B, G, n, c, m)
        v = v.unflatten(2, (-1, block))  # (B, G, n, c, D + 1)
        states = (phi_k.transpose(-1, -2) @ v).float()
        before = (states.cumsum(2) - states).to(q.dtype)  # (B, G, n, m, D + 1)
        weights = (phi_q @ phi_k.unsqueeze(2).transpose(-1, -2)).tril()  # (B, G, R, n, c, c)
        total = phi_q @ before.unsqueeze(2) + weights @ v.unsqueeze(2)
        return _packed((total[..., :-1] / total[..., -1:].clamp_min(1e-30)).flatten(3, 4))

    return attend


def _features(x: Tensor, rows: Tensor, stable_over: tuple[int, ...]) -> Tensor:
    """exp(W x' - |x'|^2 / 2) up to a factor that cancels between numerator and denominator."""
    x = x * x.shape[-1] ** -0.25
    logits = (x @ rows.T).float() - x.float().square().sum(-1, keepdim=True) / 2
    return (logits - logits.detach().amax(stable_over, keepdim=True)).exp().to(x.dtype)


def _grouped(q: Tensor, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """(T, H, D), (T, G, D) twice -> (B, G, R, L, D), (B, G, L, D) twice."""
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
    return q.unflatten(1, (k.shape[1], -1)), k, v


def _packed(x: Tensor) -> Tensor:  # (B, G, R, L, D) -> (T, H, D)
    return x.flatten(1, 2).transpose(1, 2).flatten(0, 1)
