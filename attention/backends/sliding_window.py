"""Sliding-window softmax attention with attention sinks: each token sees its neighbours and the first tokens.

Sources: the window of Longformer (Beltagy et al., arXiv 2004.05150, section 3.1), causal in the manner of Mistral 7B (Jiang
et al., arXiv 2310.06825, section 2), and the sinks of StreamingLLM (Xiao et al., arXiv 2309.17453, section 3.2). Where we
part from StreamingLLM: positions are those of the sequence, not of the cache.

Cost per token O(window). The state keeps the sinks and, in a ring behind them, the last window + 1 tokens: constant in length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from attention import blocks, cuda, implementation
from attention.interface import MOST_TOKENS, AttentionBackend, BackendOptions, Cost, HeadShape, Parts, Segments, StateTensor


class SlidingWindowOptions(BackendOptions):
    """What a token sees beside itself."""

    window: int = Field(
        1024, ge=1, le=MOST_TOKENS, description="tokens seen on each visible side, the token itself not counted"
    )
    sinks: int = Field(4, ge=0, le=MOST_TOKENS, description="first tokens of a sequence that stay visible to all later ones")
    impl: implementation.Impl = Field(
        "auto", description="torch, native (CPU), xformers (CUDA, no sinks), or auto: what can run here"
    )


class SlidingWindow(AttentionBackend):
    """Softmax over a band of keys and the sinks."""

    Options = SlidingWindowOptions
    options: SlidingWindowOptions

    def __init__(self, options: SlidingWindowOptions, shape: HeadShape) -> None:
        super().__init__(options, shape)
        self.impl = implementation.settle(options.impl, shape, "its masks have no sinks" if options.sinks else "")
        self.softmax = implementation.softmax(self.impl)

    @property
    def edge(self) -> int:
        return self.options.sinks + self.options.window + 1

    def visible(self, i: Tensor, j: Tensor, length: int | Tensor) -> Tensor:
        return ((i - j).abs() <= self.options.window) | ((j < self.options.sinks) & (j <= i))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool) -> Tensor:
        if self.impl != "xformers" or not causal:  # xformers' windows over a packed batch are causal
            return super().attend(q, k, v, segments, causal=causal)
        self.check_attend(q, k, v, segments, causal)
        return cuda.attend(q, k, v, segments, causal=True, window=self.options.window)

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> Parts:
        keys, values, sinks = blocks.heads_first(k), blocks.heads_first(v), min(self.options.sinks, len(k))
        near, first = (keys[:, sinks:], values[:, sinks:]), (keys[:, :sinks], values[:, :sinks])
        ahead = 0 if causal else self.options.window
        return self.softmax.band(q, near, first, -sinks, self.options.window, ahead, out)

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        sinks = min(self.options.sinks, past + len(q))
        base = max(sinks, past - self.options.window)
        near = self._in_order(state["k"], k, base, past), self._in_order(state["v"], v, base, past)
        self._write(state, k, v, past)
        first = blocks.history(state, sinks, k.shape[1])
        return self.softmax.band(q, near, first, past - base, self.options.window, 0, out)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, past: Sequence[int], states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> None:
        blocks.write_step(states, k, v, [self._place(at) for at in past])
        self.softmax.step(q, states, [min(at + 1, self.edge) for at in past], k.shape[1], out)

    def _in_order(self, ring: Tensor, new: Tensor, base: int, past: int) -> Tensor:
        """Positions `base` and on, (G, n, D): those before `past` from the ring (N, G D), then the new tokens (C, G, D)."""
        old = [ring[at : at + count].view(count, *new.shape[1:]) for at, _, count in self._runs(base, past)]
        new = new[max(base - past, 0) :]
        return blocks.heads_first(torch.cat([*old, new]) if old else new)

    def _write(self, state: dict[str, Tensor], k: Tensor, v: Tensor, past: int) -> None:
        """Put new tokens (C, G, D) at positions `past` and on into the state: the sinks, and the last that fit the ring."""
        sinks, total = self.options.sinks, past + len(k)
        if past < sinks:
            blocks.write(state, k[: sinks - past], v[: sinks - past], past)
        for at, position, count in self._runs(max(past, sinks, total - self.options.window - 1), total):
            new = slice(position - past, position - past + count)
            blocks.write(state, k[new], v[new], at)

    def _place(self, position: int) -> int:
        """Where a position stands in the state: sinks in front, all others in a ring behind them."""
        sinks = self.options.sinks
        return position if position < sinks else sinks + (position - sinks) % (self.options.window + 1)

    def _runs(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(index in the state, position, count) of positions start..end, none of them a sink, as runs of the ring."""
        while start < end:
            at = self._place(start)
            count = min(end - start, self.edge - at)
            yield at, start, count
            start += count

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        kept = blocks.key_value_state(self.shape, max_tokens, self.edge)
        return {"k": kept["k"], "v": replace(kept["v"], fill=0.0)}  # see blocks.append; a ring has no end to zero from

    def law(self, queries: int, keys: int, *, causal: bool) -> Cost:
        shape, options = self.shape, self.options
        sides = 1 if causal else 2
        pairs = queries * min(keys, options.window * sides + 1 + options.sinks)
        return Cost(
            4 * shape.query_heads * shape.head_width * pairs, self._workspace(queries, keys, causal), self.state_bytes(keys)
        )

    def _workspace(self, queries: int, keys: int, causal: bool) -> int:
        shape, options = self.shape, self.options
        if queries == 1:
            return self.softmax.step_workspace_bytes(shape, blocks.rounded(keys, self.edge))
        ahead = 0 if causal else options.window
        workspace = self.softmax.band_workspace_bytes(shape, queries, keys, options.window, ahead, options.sinks)
        old = min(max(0, keys - queries - options.sinks), options.window)
        history = old + queries if old else 0  # a chunk behind a past, in order
        return workspace + 2 * history * shape.key_value_heads * shape.head_width * shape.itemsize
