"""Logits to tokens: temperature, top-k, nucleus (Holtzman et al., arXiv 1904.09751), and log-probabilities.

A row is drawn by inverting its cumulative distribution at one uniform number, a function of its request's seed and of its
place, and by the operations that its own settings ask for. So a seed gives the same answer whatever else is in the batch,
and again when a step has to be repeated.
Cost: one pass over the vocabulary per row; a sort for rows with top_k or top_p.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from service.engine.request import Sampling, TokenLogprob


@dataclass(frozen=True)
class Drawn:
    """A drawn token, with its log-probability when asked for."""

    token: int
    logprob: TokenLogprob | None = None


def uniform(seed: int, index: int, place: int) -> float:
    """The number in [0, 1) by which sample `index` of a request draws its token at `place`.

    Nothing is advanced: each number is hashed from its own place (counter-based, as in Salmon et al., SC 2011).
    """
    key = blake2b(struct.pack("<qqq", seed, index, place), digest_size=8).digest()
    return float((int.from_bytes(key, "little") >> 11) * 2.0**-53)


def bytes_per_logit(settings: Sampling) -> int:
    """Peak bytes of temporaries of `draw` per entry of a row, the logits themselves included. Held to the ops by a test."""
    if settings.temperature > 0:
        return 68 if _is_filtered(settings) else 44
    return 6 if settings.logprobs is None else 12


def draw(logits: Tensor, settings: Sequence[Sampling], numbers: Sequence[float]) -> list[Drawn]:
    """Draw one token per row of logits (N, V), float32, at each row's number from [0, 1). A logit of -inf is never drawn."""
    tokens = logits.argmax(-1)
    plain = [i for i, s in enumerate(settings) if s.temperature > 0 and not _is_filtered(s)]
    filtered = [i for i, s in enumerate(settings) if s.temperature > 0 and _is_filtered(s)]
    for rows, pick in ((plain, _pick_plain), (filtered, _pick_filtered)):
        if rows:
            chosen, share = [settings[i] for i in rows], _column([numbers[i] for i in rows], logits)
            temperature = _column([s.temperature for s in chosen], logits)  # float64 holds all above zero, float32 does not
            scaled = (logits[rows] - logits[rows].amax(-1, keepdim=True)).double().div_(temperature)  # 0 for the likeliest
            tokens[rows] = pick(scaled, share, chosen)
    ids = tokens.tolist()
    asked = [i for i, s in enumerate(settings) if s.logprobs is not None]
    if not asked:
        return [Drawn(token) for token in ids]
    told = dict(zip(asked, logprobs(logits[asked], [ids[i] for i in asked], [_top(settings[i]) for i in asked]), strict=True))
    return [Drawn(token, told.get(i)) for i, token in enumerate(ids)]


def logprobs(logits: Tensor, tokens: Sequence[int], top: Sequence[int]) -> list[TokenLogprob]:
    """Log-probabilities of given tokens and of the `top` likeliest, from logits (N, V) before temperature and filters."""
    logs = torch.log_softmax(logits, -1)
    own = logs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = logs.topk(min(max(top, default=0), logits.shape[-1]), -1)
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprob(token, value, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
        for token, value, count, (row_ids, row_values) in zip(tokens, own, top, pairs, strict=True)
    ]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _top(settings: Sampling) -> int:
    return settings.logprobs or 0


def _is_filtered(settings: Sampling) -> bool:
    return settings.top_k > 0 or settings.top_p < 1


def _pick_plain(scaled: Tensor, share: Tensor, settings: Sequence[Sampling]) -> Tensor:
    return _invert(scaled.softmax(-1), share)


def _pick_filtered(scaled: Tensor, share: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """Keep the top_k likeliest, of those the smallest set that reaches top_p, and draw among them."""
    values, ids = scaled.sort(stable=True, dim=-1, descending=True)
    size = values.shape[-1]
    kept = torch.tensor([s.top_k or size for s in settings], device=scaled.device)[:, None]
    values = values.masked_fill(torch.arange(size, device=scaled.device) >= kept, -torch.inf)
    weights = values.softmax(-1)
    nucleus = _column([s.top_p for s in settings], scaled)
    before = weights.cumsum(-1) - weights
    weights = weights.masked_fill((before >= nucleus) & (before > 0), 0.0)  # the likeliest always stays
    return ids.gather(1, _invert(weights, share)[:, None])[:, 0]


def _invert(weights: Tensor, share: Tensor) -> Tensor:
    """Index at which each row's cumulative weight passes its share of the total."""
    sums = weights.cumsum(-1)
    passed = (sums <= share * sums[:, -1:]).sum(-1)
    last = (weights > 0).long().cumsum(-1).argmax(-1)  # the last index with weight: rounding must not choose one without
    return torch.minimum(passed, last)
