"""Sliding-window softmax attention with attention sinks: each token sees its neighbours and the first tokens.

Sources: the window of Longformer (Beltagy et al., arXiv 2004.05150, section 3.1), causal in the manner of Mistral 7B (Jiang
et al., arXiv 2310.06825, section 2), and the sinks of StreamingLLM (Xiao et al., arXiv 2309.17453, section 3.2). Where we
part from StreamingLLM: positions are those of the sequence, not of the cache.

Cost per token O(window). The state keeps the sinks and, in a ring behind them, the last window + 1 tokens: constant in length.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from attention import history
from attention.interface import AttentionBackend, BackendOptions
from attention.kernels import implementation
from attention.kernels.library import Told
from attention.parts import Parts
from attention.pool import StateTensor
from attention.shapes import MOST_TOKENS, Cost, HeadShape


class SlidingWindowOptions(BackendOptions):
    """What a token sees beside itself."""

    window: int = Field(
        1024, ge=1, le=MOST_TOKENS, description="tokens seen on each visible side, the token itself not counted"
    )
    sinks: int = Field(4, ge=0, le=MOST_TOKENS, description="first tokens of a sequence that stay visible to all later ones")
    impl: implementation.Impl = "auto"


class SlidingWindow(AttentionBackend):
    """Softmax over a band of keys and the sinks."""

    Options = SlidingWindowOptions
    options: SlidingWindowOptions
    takes_int8 = True

    def __init__(self, options: SlidingWindowOptions, shape: HeadShape) -> None:
        super().__init__(options, shape)
        no_xformers = "its masks have no sinks" if options.sinks else ""
        self.impl, self.softmax = implementation.softmax(options.impl, shape, no_xformers)
        self.packed = implementation.packed(self.impl, (True,), options.window)  # its windows over a packed batch are causal
        self.ring = history.Ring(options.sinks, options.window + 1)

    @property
    def edge(self) -> int:
        return self.ring.size

    def visible(self, i: Tensor, j: Tensor, length: int | Tensor) -> Tensor:
        return ((i - j).abs() <= self.options.window) | ((j < self.options.sinks) & (j <= i))

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> Parts:
        sinks, window = min(self.options.sinks, len(k)), self.options.window
        near, first = (k[sinks:], v[sinks:]), (k[:sinks], v[:sinks])
        return self.softmax.band(q, near, first, -sinks, window, 0 if causal else window, out)

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        sinks = min(self.options.sinks, past + len(q))
        base = max(sinks, past - self.options.window)
        near = self.ring.in_order(state, k, v, base, past)
        self.ring.write(state, k, v, past)
        first = history.read(state, sinks, k.shape[1])
        yield from self.softmax.band(q, near, first, past - base, self.options.window, 0, out)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, past: Sequence[int], states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> None:
        places, counts = self._looks(past)
        history.put(states, k, v, places)
        self.softmax.step(q, states, counts, k.shape[1], out)

    def told(self, past: Sequence[int], states: Sequence[dict[str, Tensor]]) -> Told | None:
        return self.softmax.told(self.shape, states, *self._looks(past))

    def _looks(self, past: Sequence[int]) -> tuple[list[int], list[int]]:
        """Where each sequence's next token is put in its state, and how many of the keys there it then sees."""
        return [self.ring.place(at) for at in past], [min(at + 1, self.ring.size) for at in past]

    def touched(self, state: dict[str, Tensor], position: int) -> Sequence[Tensor]:
        """Nothing until the ring is full, then the entry of the token that leaves it."""
        at = self.ring.place(position)
        return [] if position < self.ring.size else [state[name][at : at + 1] for name in ("k", "v")]

    def cut(self, state: dict[str, Tensor], tokens: int, total: int) -> None:
        history.cut(state, tokens, min(total, self.ring.size))

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        return self.ring.state(self.shape, max_tokens)

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
            return self.softmax.step_bytes(shape, history.rounded(keys, self.ring.size))
        ahead = 0 if causal else options.window
        workspace = self.softmax.band_bytes(shape, queries, keys, options.window, ahead, options.sinks)
        old = min(max(0, keys - queries - options.sinks), options.window)
        in_order = old + queries if old else 0  # a chunk behind a past
        return workspace + 2 * in_order * shape.kept_bytes
