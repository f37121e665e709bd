"""Attention from the definitions alone, in float64 and plain loops: what each backend and its paper say, none of our code.

Of a backend only its options are taken, for performer the rows that it drew, and for topk which it chose of blocks that
float32 cannot tell apart. All weights are kept as logarithms, so no norm is too large. Cost O(n^2) steps of Python: for
sequences of some hundred tokens.
"""

from __future__ import annotations

import math
import random
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from attention import AttentionBackend

Array = NDArray[np.float64]
KNOWN = ("bigbird", "chunked", "dense", "linear", "longformer", "performer", "sliding_window", "topk")  # written down here


def answer(backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Array:
    """The answer to one whole sequence, (n, H, D), zeros where a row sees nothing. q: (n, H, D). k, v: (n, G, D)."""
    queries, keys, values = (x.double().numpy() for x in (q, k, v))
    found = np.zeros_like(queries)
    group = queries.shape[1] // keys.shape[1]
    weighers = [_weigher(backend, keys[:, head]) for head in range(keys.shape[1])]
    chosen = _chosen(backend, q, k) if backend.name == "topk" else None
    for i in range(len(queries)):
        by_place = np.array([j for j in range(i + 1 if causal else len(queries)) if sees(backend, i, j, len(queries), causal)])
        for head in range(queries.shape[1] if len(by_place) else 0):
            seen = by_place if chosen is None else np.union1d(by_place, chosen[i][head // group])
            logs = weighers[head // group](i, queries[i, head], seen)
            weights = np.exp(logs - logs.max())
            found[i, head] = weights @ values[seen, head // group] / weights.sum()
    return found


def sees(backend: AttentionBackend, i: int, j: int, length: int, causal: bool) -> bool:
    """Whether the query at position i sees the key at position j <= i, or any j where not causal."""
    options: Any = backend.options
    match backend.name:
        case "sliding_window" | "topk":
            return abs(i - j) <= options.window or (j < options.sinks and j <= i)
        case "longformer":
            return abs(i - j) <= options.window or min(i, j) < options.global_tokens
        case "chunked":
            return i // options.chunk == j // options.chunk
        case "bigbird":
            length = i + 1 if causal else length  # a causal answer is that of the sequence as it stood when the token came
            return j // options.block in bigbird_blocks(options, i // options.block, -(-length // options.block))
    return True


def _chosen(backend: Any, q: Tensor, k: Tensor) -> list[list[Array]]:
    """The keys of the blocks that each position chooses for each group of heads."""
    table = backend.choices(q, k).tolist()
    queries, keys, size = q.double().numpy(), k.double().numpy(), backend.options.block
    group = queries.shape[1] // keys.shape[1]
    found = []
    for i, rows in enumerate(table):
        blocks = [
            b for b in range(len(k) // size) if backend.options.sinks // size <= b and b * size < i - backend.options.window
        ]
        found.append([])
        for g, row in enumerate(rows):
            heads = queries[i, g * group : (g + 1) * group]
            whole = [keys[b * size : (b + 1) * size, g] for b in blocks]
            products = [np.maximum(heads * part.max(0), heads * part.min(0)) for part in whole]
            bounds = {b: terms.sum() for b, terms in zip(blocks, products, strict=True)}
            rounding = max([1e-30, *(np.abs(heads * np.abs(part).max(0)).sum() for part in whole)]) * 2.0**-18
            own = [b for b in row if b >= 0]
            assert len(set(own)) == len(own) == min(backend.options.blocks, len(blocks)) and set(own) <= set(blocks)
            others = [bounds[b] for b in blocks if b not in own]
            assert min([np.inf, *(bounds[b] for b in own)]) >= max([-np.inf, *others]) - rounding, (i, g)
            found[-1].append(np.array([b * size + j for b in own for j in range(size)], dtype=np.int64))
    return found


@cache
def bigbird_blocks(options: Any, block: int, count: int) -> set[int]:
    """The blocks that a query block sees: globals, neighbours, and of the others as many as are drawn."""
    everywhere = set(range(min(options.global_blocks, count))) | set(range(max(0, count - options.closing_blocks), count))
    if block in everywhere:
        return set(range(count))
    reach = options.window_blocks // 2
    near = {b for b in range(count) if abs(b - block) <= reach}
    others = [b for b in range(count) if b not in everywhere | near]
    places = random.Random(f"{options.seed}/{block}/{count}").sample(
        range(len(others)), min(options.random_blocks, len(others))
    )
    return everywhere | near | {others[place] for place in places}


def _weigher(backend: AttentionBackend, keys: Array) -> Any:
    """A function (i, q (D), seen (N)) to the log of what each seen key weighs, (N)."""
    if backend.name == "performer":
        return _favor(backend, keys)
    if backend.name == "linear":
        return lambda i, q, seen: _sum_logs(_log_elu(q) + _log_elu(keys[seen]))
    return lambda i, q, seen: keys[seen] @ q / math.sqrt(len(q))


def _favor(backend: Any, keys: Array) -> Any:
    """FAVOR+ (arXiv 2009.14794, equation 5 and lemma 1): the mean over rows w of exp(w.x - |x|^2 / 2) exp(w.y - |y|^2 / 2)."""
    width = keys.shape[1]
    rows = backend.weights.double().T.numpy() / (math.log2(math.e) / width**0.25)  # as drawn, in the dtype they are kept in
    chunk = backend.options.local_chunk

    def features(x: Array) -> Array:
        x = x / width**0.25
        return x @ rows.T - (x * x).sum(-1, keepdims=True) / 2

    found = features(keys)

    def weigh(i: int, q: Array, seen: Any) -> Array:
        far = _sum_logs(features(q) + found[seen]) - math.log(len(rows))
        if not chunk:
            return far
        return np.where(np.abs(i // chunk - seen // chunk) <= 1, keys[seen] @ q / math.sqrt(width), far)

    return weigh


def _log_elu(x: Array) -> Array:
    """log(elu(x) + 1)."""
    return np.where(x > 0, np.log1p(np.maximum(x, 0)), x)


def _sum_logs(x: Array) -> Array:
    """log of the sum of e^x along the last axis."""
    top = x.max(-1, keepdims=True)
    return (np.log(np.exp(x - top).sum(-1, keepdims=True)) + top)[..., 0]
