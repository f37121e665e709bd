"""Attention through a running sum, the kernel under every linear backend.

With positive features phi, attention is phi(q) S[:, :D] / phi(q) S[:, D] where S = sum_j phi(k_j) [v_j, 1] (Katharopoulos et
al., arXiv 2006.16236, equations 4 to 7). Causally the sum runs along the sequence: a chunk of tokens meets the sum of all
chunks before it and its own lower triangle. S is kept transposed, (G, D + 1, m), and in at least float32: it is a long sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attention import blocks
from attention.interface import HeadShape

CHUNK = 128  # tokens answered together causally: their own triangle costs CHUNK per token, their state two products a chunk
BLOCK = 512  # tokens per product where there is no triangle


def values_with_ones(v: Tensor, factor: Tensor | float = 1.0) -> Tensor:
    """[v, 1] x factor: v (C, G, D) and factor (G, C, 1) to (G, C, D + 1) of v's dtype."""
    count, groups, width = v.shape
    factor = factor.to(v.dtype) if isinstance(factor, Tensor) else factor  # the product of two dtypes is four times slower
    values = v.new_empty(groups, count, width + 1)
    torch.mul(v.transpose(0, 1), factor, out=values[..., :width])
    values[..., width:] = factor
    return values


def add(s: Tensor, keys: Tensor, values: Tensor) -> None:
    """Add phi(k) [v, 1] of keys (G, C, m) and values (G, C, D + 1) to s (G, D + 1, m), in place."""
    s += torch.bmm(values.transpose(1, 2), keys)


def ask(s: Tensor, queries: Tensor) -> Tensor:
    """phi(q) S: queries (G, RC, m) to (G, RC, D + 1)."""
    return torch.bmm(queries, s.to(queries.dtype).transpose(1, 2))


def triangle(queries: Tensor, keys: Tensor) -> Tensor:
    """phi(q).phi(k) of a chunk with itself, zero above the diagonal: (G, RC, m) and (G, C, m) to (G, RC, C)."""
    groups, count, _ = keys.shape
    products = torch.bmm(queries, keys.transpose(1, 2))
    return products.view(groups, -1, count, count).tril_().view(groups, -1, count)


def scan(s: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Answer a chunk over s and itself, causally, and add it to s: (G, RC, D + 1), numerator and denominator."""
    both = ask(s, queries)
    both += blocks.weigh(triangle(queries, keys), values, lambda: _later(keys))
    add(s, keys, values)
    return both


def _later(keys: Tensor) -> Tensor:
    """Bool (C, C): which keys of a chunk come after each of its queries."""
    return torch.ones(keys.shape[1], keys.shape[1], dtype=torch.bool, device=keys.device).triu_(1)


def divide(both: Tensor, out: Tensor, first: int = 0, last: int | None = None) -> None:
    """Numerator over denominator, (G, RC, D + 1), into the tokens first..last of out (C, H, D)."""
    count, _, width = out.shape
    both = both.view(both.shape[0], -1, count, width + 1)[:, :, first:last]
    answer = out.view(count, both.shape[0], -1, width).permute(1, 2, 0, 3)[:, :, first:last]
    torch.div(both[..., :width], both[..., width:], out=answer)


def flops(shape: HeadShape, features: int, queries: int, causal: bool) -> int:
    """Products of `queries` tokens: each key-value head adds to its sum, each query head asks it; causally the triangles."""
    columns = shape.head_width + 1
    chunk = min(queries, CHUNK)
    sums = (shape.query_heads + shape.key_value_heads) * features * columns
    return 2 * queries * (sums + (shape.query_heads * chunk * (features + columns) if causal else 0))


def workspace_bytes(shape: HeadShape, features: int, queries: int, causal: bool) -> int:
    """Peak temporaries, the answer to all queries and a fresh sum included."""
    size, wide, width = shape.itemsize, max(shape.itemsize, 4), shape.head_width
    tokens = min(queries, CHUNK if causal else BLOCK)
    entries = shape.key_value_heads * features * (width + 1)  # of a sum
    adding = entries * (size + (wide if size < wide else 0))
    asked, added = shape.query_heads * tokens, shape.key_value_heads * tokens  # rows of queries and of keys
    if causal:
        triangle = asked * (tokens + width + 1) * size
        peak = (asked + added) * (features + width + 1) * size + max(adding, triangle)
    else:
        adds = added * (features + width + 1) * size + adding
        asks = asked * (features + width + 1) * size + entries * (size if size < wide else 0)
        peak = max(adds, asks)
    return queries * shape.query_heads * width * size + entries * wide + peak


def step(queries: Tensor, keys: Tensor, values: Tensor, states: Sequence[Tensor], out: Tensor) -> None:
    """Add one token to each of B sums and ask it.

    queries (B, G, R, m), keys (B, G, 1, m), values (B, G, D + 1, 1), each state (G, D + 1, m), out (B, H, D).
    """
    both = queries.new_empty(*queries.shape[:3], values.shape[2])
    for s, query, key, value, answer in zip(states, queries, keys, values, both, strict=True):
        torch.baddbmm(s, value, key, out=s)
        torch.bmm(query, s.transpose(1, 2), out=answer)
    width = out.shape[-1]
    torch.div(both[..., :width], both[..., width:], out=out.view(*queries.shape[:3], width))
