"""Sliding-window softmax attention with attention sinks: each token sees its neighbours and the first tokens.

Sources: the window of Longformer (Beltagy et al., arXiv 2004.05150, section 3.1), causal in the manner of Mistral 7B (Jiang
et al., arXiv 2310.06825, section 2), and the sinks of StreamingLLM (Xiao et al., arXiv 2309.17453, section 3.2). Where we
part from StreamingLLM: positions are those of the sequence, not of the cache.

Cost per token O(window). The state is a ring of the last window + 1 tokens behind the sinks, constant in length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor

from attention import blocks
from attention.interface import AttentionBackend, BackendOptions, Cost, Segments, StatePool, StateTensor

QUERY_BLOCK = 128  # rows per product: a longer block scores more keys that its rows do not see
KEY_BLOCK = 1024


class SlidingWindowOptions(BackendOptions):
    """What a token sees beside itself."""

    window: int = Field(1024, ge=1, description="tokens seen on each visible side, the token itself not counted")
    sinks: int = Field(4, ge=0, description="first tokens of a sequence that stay visible to all later ones")


class SlidingWindow(AttentionBackend):
    """Softmax over a band of keys and the sinks."""

    Options = SlidingWindowOptions
    options: SlidingWindowOptions

    def visible(self, i: Tensor, j: Tensor, length: int) -> Tensor:
        return ((i - j).abs() <= self.options.window) | ((j < self.options.sinks) & (j <= i))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool) -> Tensor:
        self.check_attend(q, k, v, segments, causal)
        out = torch.empty_like(q)
        sinks = self.options.sinks
        for start, end, _ in segments.spans():
            keys, values = blocks.heads_first(k[start:end]), blocks.heads_first(v[start:end])
            sink = blocks.Piece(keys[:, :sinks], values[:, :sinks])
            self._answer(q[start:end], keys, values, 0, 0, sink, causal, out[start:end])
        return out

    def extend(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, pool: StatePool, layer: int, slots: Sequence[int]
    ) -> Tensor:
        self.check_extend(q, k, v, segments, slots)
        out = torch.empty_like(q)
        for slot, (start, end, past) in zip(slots, segments.spans(), strict=True):
            state = pool.tensors(slot)
            ring = state["k"][layer], state["v"][layer]  # (G, size, D) each
            step = self._step if end - start == 1 else self._chunk
            step(q[start:end], k[start:end], v[start:end], past, *ring, out[start:end])
        return out

    def _step(self, q: Tensor, k: Tensor, v: Tensor, past: int, keys: Tensor, values: Tensor, out: Tensor) -> None:
        """One new token: write it over the one that leaves the window, then all that stands in the state is visible."""
        at = self._places(past, past + 1, keys.shape[1])[0]
        keys[:, at], values[:, at] = k[0], v[0]
        size = min(past + 1, keys.shape[1])
        pieces = [blocks.Piece(keys[:, :size], values[:, :size])]
        out.copy_(blocks.softmax(blocks.query_rows(q, self.shape.key_value_heads), pieces))

    def _chunk(self, q: Tensor, k: Tensor, v: Tensor, past: int, keys: Tensor, values: Tensor, out: Tensor) -> None:
        """Many new tokens: the window before them in order, then the tokens, answered as a sequence of their own."""
        size, total = keys.shape[1], past + len(q)
        base = max(0, past - self.options.window)
        before = torch.tensor(self._places(base, past, size), dtype=torch.long, device=keys.device)
        near_keys = torch.cat([keys[:, before], k.transpose(0, 1)], 1)
        near_values = torch.cat([values[:, before], v.transpose(0, 1)], 1)
        kept = [p for p in range(past, total) if p < self.options.sinks or p >= total - self.options.window - 1]
        places = torch.tensor([self._place(p, size) for p in kept], dtype=torch.long, device=keys.device)
        fresh = torch.tensor(kept, dtype=torch.long, device=keys.device) - past
        keys[:, places], values[:, places] = k[fresh].transpose(0, 1), v[fresh].transpose(0, 1)
        sinks = min(self.options.sinks, total)
        sink = blocks.Piece(keys[:, :sinks], values[:, :sinks])
        self._answer(q, near_keys, near_values, base, past, sink, True, out)

    def _place(self, position: int, size: int) -> int:
        """Index in the state of a position: the sinks and what fits first, then round the ring."""
        sinks = min(self.options.sinks, size)
        return position if position < size else sinks + (position - sinks) % (size - sinks)

    def _places(self, start: int, end: int, size: int) -> list[int]:
        return [self._place(position, size) for position in range(start, end)]

    def _answer(
        self, q: Tensor, keys: Tensor, values: Tensor, base: int, past: int, sink: blocks.Piece, causal: bool, out: Tensor
    ) -> None:
        """Answer queries at positions `past` and on; keys (G, n, D) begin at position `base`, sinks at 0."""
        for first, last in blocks.spread(len(q), QUERY_BLOCK):
            pieces = list(self._pieces(past + first, past + last, keys, values, base, sink, causal))
            out[first:last] = blocks.softmax(blocks.query_rows(q[first:last], self.shape.key_value_heads), pieces)

    def _pieces(
        self, first: int, last: int, keys: Tensor, values: Tensor, base: int, sink: blocks.Piece, causal: bool
    ) -> Iterator[blocks.Piece]:
        """What the queries at positions first..last see: the sinks, then the band, none twice."""
        window = self.options.window
        low, high = max(base, first - window), last if causal else min(base + keys.shape[1], last + window)
        ahead = 0 if causal else window
        sinks = min(sink.k.shape[1], last)
        if sinks:
            within = ahead if sinks > first - window else 0  # rows that have sinks in their window see them as the window says
            yield blocks.Piece(sink.k[:, :sinks], sink.v[:, :sinks], blocks.Band(high=first + within))
        low = max(low, sinks)
        for a, b in blocks.spread(high - low, KEY_BLOCK):
            a, b = low + a, low + b
            band = blocks.Band(low=first - window - a, high=first + ahead - a)
            yield blocks.Piece(keys[:, a - base : b - base], values[:, a - base : b - base], band)

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        size = min(max_tokens, self.options.sinks + self.options.window + 1)
        shape = (self.shape.key_value_heads, size, self.shape.head_width)
        return {"k": StateTensor(shape, self.shape.dtype), "v": StateTensor(shape, self.shape.dtype)}

    def cost(self, queries: int, keys: int, *, causal: bool) -> Cost:
        shape, options = self.shape, self.options
        seen = min(keys, options.window * (1 if causal else 2) + 1 + options.sinks)
        rows = shape.query_heads * min(queries, QUERY_BLOCK)
        scores = rows * min(seen + QUERY_BLOCK, keys, KEY_BLOCK) * shape.itemsize
        window = min(keys - queries, options.window)
        copies = (queries * shape.query_heads + 2 * (window + queries) * shape.key_value_heads) * shape.head_width
        accumulators = rows * shape.head_width * (4 * 4 + shape.itemsize)
        flops = 4 * shape.query_heads * shape.head_width * queries * seen
        return Cost(flops, scores + copies * shape.itemsize + accumulators, self.state_bytes(keys))
