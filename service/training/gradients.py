"""Differentiable forms of the backends that the embedded model is trained under.

The backends themselves are inference only. These compute the same functions with autograd over equal-length sequences
laid side by side; `tests/training` holds each to its backend. Cost: block matrix products, scores kept for the way back.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attention.projection import projection
from service.model.transformer import Attend

KEYS = 1024  # keys at a time where tiles are streamed: a tile of scores stays in the cache
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
    return _masked(q[:, :, :, start:end], k_seen, v_seen, hidden)


def _masked(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, far: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Softmax of q (B, G, R, C, D) over k and v (B, G, N, D), without the keys that `hidden` (C, N) names.

    `far` stands beside the keys as one more: the log of its weight, (B, G, RC, 1), and its value, (B, G, RC, D).
    """
    scores = q.flatten(2, 3) @ k.transpose(-1, -2)  # (B, G, RC, N)
    bias = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, float("-inf"))
    scores.unflatten(2, q.shape[2:4]).add_(bias)
    if far is None:
        return (scores.softmax(-1) @ v).view_as(q)
    weights = torch.cat((scores, far[0].to(scores.dtype)), dim=-1).softmax(-1)
    return (weights[..., :-1] @ v + weights[..., -1:] * far[1]).to(q.dtype).view_as(q)


def streamed_attention(length: int) -> Attend:
    """Causal dense attention that keeps no scores: tiles are computed again on the way back (Dao, arXiv 2307.08691, §3).

    Scores are not shifted before exp: the QK-norm's scales bound them (at most 8 * scale^2 for heads of 64).
    """

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = _grouped(q, k, v, length)
        out: Tensor = _Streamed.apply(q * q.shape[-1] ** -0.5, k, v)  # type: ignore[no-untyped-call]
        return _packed(out)

    return attend


class _Streamed(torch.autograd.Function):
    """q (B, G, R, L, D) already scaled, k and v (B, G, L, D) -> (B, G, R, L, D)."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)  # type: ignore[untyped-decorator]
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, sums = torch.empty_like(q), torch.empty(*q.shape[:-1], 1)
        for rows in _ranges(0, q.shape[3], BLOCK):
            total = torch.zeros(*q.shape[:3], rows.stop - rows.start, q.shape[-1])
            weight = torch.zeros(*total.shape[:-1], 1)
            for keys in _ranges(0, rows.stop, KEYS):
                p = _weights(q, k, rows, keys)
                weight.add_(p.sum(-1, keepdim=True, dtype=torch.float32).view_as(weight))
                total.add_((p @ v[:, :, keys]).view_as(total))
            out[:, :, :, rows], sums[:, :, :, rows] = total / weight, weight
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, sums = ctx.saved_tensors
        slope = (grads[0] / sums).to(q.dtype)  # the weights' common factor is taken here once
        level = (slope * out).sum(-1, keepdim=True, dtype=torch.float32).to(q.dtype)
        dq, dk, dv = torch.empty_like(q), torch.zeros(k.shape), torch.zeros(v.shape)
        for rows in _ranges(0, q.shape[3], BLOCK):
            q_rows, slope_rows, level_rows = (x[:, :, :, rows].flatten(2, 3) for x in (q, slope, level))
            dq_rows = torch.zeros(q_rows.shape)
            for keys in _ranges(0, rows.stop, KEYS):
                p = _weights(q, k, rows, keys)
                dv[:, :, keys] += p.transpose(-1, -2) @ slope_rows
                p *= (slope_rows @ v[:, :, keys].transpose(-1, -2)).sub_(level_rows)
                dq_rows += p @ k[:, :, keys]
                dk[:, :, keys] += p.transpose(-1, -2) @ q_rows
            dq[:, :, :, rows] = dq_rows.view_as(dq[:, :, :, rows])
        return dq, dk.to(k.dtype), dv.to(v.dtype)


def _weights(q: Tensor, k: Tensor, rows: slice, keys: slice) -> Tensor:
    """exp(q k') of a tile, later keys at zero: (B, G, R * rows, keys)."""
    p = (q[:, :, :, rows].flatten(2, 3) @ k[:, :, keys].transpose(-1, -2)).exp_()
    if keys.stop > rows.start:
        seen = torch.arange(rows.start, rows.stop)[:, None] >= torch.arange(keys.start, keys.stop)
        p.unflatten(2, (q.shape[2], -1)).mul_(seen)
    return p


def _ranges(start: int, stop: int, size: int) -> list[slice]:
    return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]


def performer_attention(length: int, features: int, seed: int, chunk: int) -> Attend:
    """Causal FAVOR+ over sequences of `length` tokens: the keys of a query's own and the previous chunk weigh exactly, older
    ones through the features, summed chunk by chunk in float32."""

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = projection(features, q.shape[-1], seed).to(q.dtype)
        q, k, v = _grouped(q, k, v, length)
        phi_k, level_k = _features(k, rows, (-2, -1))
        ones = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)  # the last column sums the weights
        scaled, s = q * q.shape[-1] ** -0.5, torch.zeros(*k.shape[:2], features, ones.shape[-1])
        answers = []
        for here in _ranges(0, length, chunk):
            first = max(0, here.start - chunk)
            near = scaled[:, :, :, here], k[:, :, first : here.stop], v[:, :, first : here.stop]
            hidden = torch.arange(first, here.stop) > torch.arange(here.start, here.stop)[:, None]
            if first == 0:
                answers.append(_masked(*near, hidden))
                continue
            s = s + phi_k[:, :, first - chunk : first].transpose(-1, -2) @ ones[:, :, first - chunk : first]
            phi_q, level_q = _features(q[:, :, :, here].flatten(2, 3), rows, (-1,))  # (B, G, RC, m)
            both = (phi_q @ s.to(q.dtype)).float()
            weight = both[..., -1:].clamp_min(1e-30)
            log_weight = weight.log() + level_q + level_k - math.log(features)
            answers.append(_masked(*near, hidden, (log_weight, both[..., :-1] / weight)))
        return _packed(torch.cat(answers, dim=3))

    return attend


def _features(x: Tensor, rows: Tensor, stable_over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """exp(W x' - |x'|^2 / 2 - level), and that level, float32: the largest exponent over the dimensions named."""
    x = x * x.shape[-1] ** -0.25
    logits = (x @ rows.T).float() - x.float().square().sum(-1, keepdim=True) / 2
    level = logits.detach().amax(stable_over, keepdim=True)
    return (logits - level).exp().to(x.dtype), level


def _grouped(q: Tensor, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """(T, H, D), (T, G, D) twice -> (B, G, R, L, D), (B, G, L, D) twice."""
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
    return q.unflatten(1, (k.shape[1], -1)), k, v


def _packed(x: Tensor) -> Tensor:  # (B, G, R, L, D) -> (T, H, D)
    return x.flatten(1, 2).transpose(1, 2).flatten(0, 1)
