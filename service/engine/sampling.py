"""Logits to tokens: penalties, temperature, min-p (Nguyen et al., arXiv 2407.01082), top-k, nucleus (Holtzman et al., arXiv
1904.09751), and log-probabilities.

In this order, each on what the one before left: repetition penalty (Keskar et al., arXiv 1909.05858, section 4.1), the bias,
the penalties of frequency and presence, the ends that `min_tokens` puts off, what the grammar forbids, temperature, min_p,
top_k, top_p.

A row is drawn by inverting its cumulative distribution at one uniform number, a function of its request's seed and of its
place, and by the operations that its own settings ask for. So a seed gives the same answer whatever else is in the batch,
and again when a step has to be repeated.
Cost: one pass over the vocabulary per row; a sort for rows with top_k or top_p; one over the text for rows with penalties.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.engine.request import Sampling, TokenLogprob


@dataclass(frozen=True)
class Drawn:
    """A drawn token, with its log-probability when asked for."""

    token: int
    logprob: TokenLogprob | None = None
    was_guessed: bool = False


@dataclass(frozen=True)
class Past:
    """The text that a token is drawn behind."""

    prompt: array[int]
    output: array[int]
    allowed: NDArray[np.bool_] | None = None  # by the row's grammar (V,); None: all tokens


PIECE = 4096  # tokens of a text that are looked at together: what that takes is no part of the law of bytes


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
    return 6 if settings.logprobs is None and not is_adjusted(settings) else 12


def draw(
    logits: Tensor,
    settings: Sequence[Sampling],
    numbers: Sequence[float],
    pasts: Sequence[Past] = (),
    eos_ids: Sequence[int] = (),
) -> list[Drawn]:
    """Draw one token per row of logits (N, V), float32, at each row's number from [0, 1). A logit of -inf is never drawn.

    Args:
        numbers: a greedy row's is not looked at.
        pasts: each row's text so far; may be left out where no row has a penalty, a bias, `min_tokens` or a grammar.
        eos_ids: tokens that end an answer.
    """
    tokens = likeliest(logits)
    greedy = [i for i, s in enumerate(settings) if s.temperature == 0 and is_adjusted(s)]
    if greedy:
        tokens[greedy] = likeliest(_adjusted(logits, greedy, settings, pasts, eos_ids))
    plain = [i for i, s in enumerate(settings) if s.temperature > 0 and not _is_filtered(s)]
    filtered = [i for i, s in enumerate(settings) if s.temperature > 0 and _is_filtered(s)]
    for rows, pick in ((plain, _pick_plain), (filtered, _pick_filtered)):
        if rows:
            chosen, share = [settings[i] for i in rows], _column([numbers[i] for i in rows], logits)
            temperature = _column([s.temperature for s in chosen], logits)  # float64 holds all above zero, float32 does not
            given = _adjusted(logits, rows, settings, pasts, eos_ids)
            scaled = (given - given.amax(-1, keepdim=True)).double().div_(temperature)  # 0 for the likeliest
            del given
            _drop_unlikely(scaled, chosen)
            tokens[rows] = pick(scaled, share, chosen)
    ids = tokens.tolist()
    asked = [i for i, s in enumerate(settings) if s.logprobs is not None]
    if not asked:
        return [Drawn(token) for token in ids]
    told = dict(zip(asked, logprobs(logits[asked], [ids[i] for i in asked], [_top(settings[i]) for i in asked]), strict=True))
    return [Drawn(token, told.get(i)) for i, token in enumerate(ids)]


def likeliest(logits: Tensor) -> Tensor:
    """The first of the largest of each row of logits (N, V), NaN above all: int64 (N,). Its slow reading: `torch.argmax`,

    which on CPU goes element by element, by threads that wait for each other; numpy's compares whole registers.
    """
    return torch.from_numpy(logits.numpy().argmax(-1)) if logits.device.type == "cpu" else logits.argmax(-1)


def logprobs(logits: Tensor, tokens: Sequence[int], top: Sequence[int]) -> list[TokenLogprob]:
    """Log-probabilities of given tokens and of the `top` likeliest, from logits (N, V) before temperature and filters.

    Of equals the first come first: in what order `torch.topk` has them depends on how many rows and tokens are asked about.
    """
    logs = torch.log_softmax(logits, -1)
    own = logs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    most = min(max(top, default=0), logits.shape[-1])
    best = _first_of_largest(logs, most) if most else [[] for _ in own]
    return [
        TokenLogprob(token, value, tuple(row[:count])) for token, value, count, row in zip(tokens, own, top, best, strict=True)
    ]


def _first_of_largest(values: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """Indices and values of the `count` largest of each row (N, V), of equals the first."""
    size = values.shape[-1]
    best, ids = values.topk(min(count + 1, size), -1)
    has_equals = (best[:, 1:] == best[:, :-1]).any(-1).tolist()
    pairs = zip(ids.tolist(), best.tolist(), has_equals, values, strict=True)
    return [
        _ranked(row, count) if tied else list(zip(own[:count], told[:count], strict=True)) for own, told, tied, row in pairs
    ]


def _ranked(row: Tensor, count: int) -> list[tuple[int, float]]:
    """The same of one row (V,), of which more are asked for until none of the equals is left out."""
    size = min(count + 1, len(row))
    best, ids = row.topk(size)
    while size < len(row) and best[-1] == best[count - 1]:
        size = min(2 * size, len(row))
        best, ids = row.topk(size)
    return [(token, value) for value, token in sorted(zip(best.tolist(), ids.tolist(), strict=True), key=_order)[:count]]


def _order(told: tuple[float, int]) -> tuple[float, int]:
    return -told[0], told[1]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _top(settings: Sampling) -> int:
    return settings.logprobs or 0


def is_adjusted(settings: Sampling) -> bool:
    """Whether the row's logits are changed before anything is drawn from them."""
    is_shaped = settings.logit_bias or settings.min_tokens or settings.grammar is not None
    return bool(_is_penalised(settings) or settings.repetition_penalty != 1 or is_shaped)


def _is_penalised(settings: Sampling) -> bool:
    return settings.presence_penalty != 0 or settings.frequency_penalty != 0


def _adjusted(
    logits: Tensor, rows: Sequence[int], settings: Sequence[Sampling], pasts: Sequence[Past], eos_ids: Sequence[int]
) -> Tensor:
    """Some rows of the logits (N, V), changed as their settings say. A copy."""
    copied = logits[rows]
    for place, i in enumerate(rows):
        if is_adjusted(settings[i]):
            _adjust(copied[place], logits[i], settings[i], pasts[i], eos_ids)
    return copied


def _adjust(row: Tensor, before: Tensor, settings: Sampling, past: Past, eos_ids: Sequence[int]) -> None:
    """Change a row of logits (V,) in place; `before` is the same row as it was."""
    if settings.repetition_penalty != 1:
        for ids in (*_pieces(past.prompt, row), *_pieces(past.output, row)):
            own = before[ids]  # not of `row`: a token that comes again must not be penalised again
            row[ids] = torch.where(own > 0, own / settings.repetition_penalty, own * settings.repetition_penalty)
        row.clamp_(max=torch.finfo(row.dtype).max)  # what a penalty near 0 leaves: two infinite logits differ by NaN
    if settings.logit_bias:
        tokens, biases = zip(*settings.logit_bias, strict=True)
        row[list(tokens)] += torch.tensor(biases, dtype=row.dtype, device=row.device)
    if _is_penalised(settings):
        _penalise(row, settings, past.output)
    if len(past.output) < settings.min_tokens:
        row[[*eos_ids, *settings.stop_token_ids]] = -torch.inf
    if past.allowed is not None:
        row.masked_fill_(torch.from_numpy(~past.allowed).to(row.device), -torch.inf)


def _penalise(row: Tensor, settings: Sampling, output: array[int]) -> None:
    """Take the penalties of presence and frequency off a row of logits (V,)."""
    counts = torch.zeros(row.shape, dtype=row.dtype, device=row.device)
    for ids in _pieces(output, row):
        counts.index_add_(0, ids, torch.ones(len(ids), dtype=row.dtype, device=row.device))
    row.sub_(counts, alpha=settings.frequency_penalty)
    row.sub_(counts.clamp_(max=1), alpha=settings.presence_penalty)


def _pieces(tokens: array[int], like: Tensor) -> Iterator[Tensor]:
    """A text's token ids, some at a time."""
    for start in range(0, len(tokens), PIECE):
        ids = np.array(tokens[start : start + PIECE], dtype=np.int64)  # torch.tensor goes one by one: a hundred times as long
        yield torch.from_numpy(ids).to(like.device)


def _drop_unlikely(scaled: Tensor, settings: Sequence[Sampling]) -> None:
    """Leave no chance to tokens below each row's min_p; the likeliest stands at 0 in `scaled` (N, V)."""
    if any(s.min_p > 0 for s in settings):
        least = _column([math.log(s.min_p) if s.min_p > 0 else -math.inf for s in settings], scaled)
        scaled.masked_fill_(scaled < least, -torch.inf)


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
