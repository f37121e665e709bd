"""Dense softmax attention (Vaswani et al., arXiv 1706.03762): every token sees every token. The exact reference.

Cost per token O(n). The state is the keys and values themselves, 2 n G D elements. Blocks of queries meet blocks of keys,
so no n x n matrix exists.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attention import blocks
from attention.interface import AttentionBackend, BackendOptions, Cost, Segments, StatePool, StateTensor

QUERY_BLOCK = 128  # rows per product: below this, matrix products lose speed
KEY_BLOCK = 1024  # 8 heads x 128 x 1024 bf16 scores are 2 MiB: the L2 caches of two cores


class DenseOptions(BackendOptions):
    """Dense attention has nothing to choose."""


class Dense(AttentionBackend):
    """Softmax over all keys."""

    Options = DenseOptions

    def visible(self, i: Tensor, j: Tensor, length: int) -> Tensor:
        return (i >= 0) & (j >= 0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool) -> Tensor:
        self.check_attend(q, k, v, segments, causal)
        out = torch.empty_like(q)
        for start, end, _ in segments.spans():
            keys, values = blocks.heads_first(k[start:end]), blocks.heads_first(v[start:end])
            self._answer(q[start:end], keys, values, 0, causal, out[start:end])
        return out

    def extend(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, pool: StatePool, layer: int, slots: Sequence[int]
    ) -> Tensor:
        self.check_extend(q, k, v, segments, slots)
        out = torch.empty_like(q)
        for slot, (start, end, past) in zip(slots, segments.spans(), strict=True):
            state = pool.tensors(slot)
            keys, values = state["k"][layer], state["v"][layer]  # (G, max_tokens, D)
            total = past + end - start
            if total > keys.shape[1]:
                raise ValueError(f"slot {slot} holds {keys.shape[1]} tokens, received {total}")
            keys[:, past:total] = k[start:end].transpose(0, 1)
            values[:, past:total] = v[start:end].transpose(0, 1)
            self._answer(q[start:end], keys[:, :total], values[:, :total], past, True, out[start:end])
        return out

    def _answer(self, q: Tensor, keys: Tensor, values: Tensor, past: int, causal: bool, out: Tensor) -> None:
        """Answer the queries at positions `past` and on over keys (G, n, D) into out (C, H, D)."""
        for first, last in blocks.spread(len(q), QUERY_BLOCK):
            seen = past + last if causal else keys.shape[1]
            pieces = [
                blocks.Piece(keys[:, a:b], values[:, a:b], blocks.Band(high=past + first - a) if causal else None)
                for a, b in blocks.spread(seen, KEY_BLOCK)
            ]
            out[first:last] = blocks.softmax(blocks.query_rows(q[first:last], self.shape.key_value_heads), pieces)

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        shape = (self.shape.key_value_heads, max_tokens, self.shape.head_width)
        return {"k": StateTensor(shape, self.shape.dtype), "v": StateTensor(shape, self.shape.dtype)}

    def cost(self, queries: int, keys: int, *, causal: bool) -> Cost:
        shape = self.shape
        pairs = queries * keys - (queries * (queries - 1) // 2 if causal else 0)
        rows = shape.query_heads * min(queries, QUERY_BLOCK)
        scores = rows * min(keys, KEY_BLOCK) * shape.itemsize
        copies = queries * (shape.query_heads + 2 * shape.key_value_heads) * shape.head_width * shape.itemsize
        accumulators = rows * shape.head_width * (4 * 4 + shape.itemsize)
        return Cost(4 * shape.query_heads * shape.head_width * pairs, scores + copies + accumulators, self.state_bytes(keys))
