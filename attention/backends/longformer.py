"""Longformer attention (Beltagy et al., arXiv 2004.05150, section 3.1): a symmetric window and a few global tokens.

The first `global_tokens` tokens see all and are seen by all, with the same projections (the paper's own projections for
globals belong to its checkpoints). Bidirectional only: globals that see the future have no causal form; causal, the globals
that later tokens still see are the sinks of `sliding_window`. Cost per token O(window + globals).
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from attention.interface import AttentionBackend, BackendOptions
from attention.kernels import implementation
from attention.parts import Parts
from attention.pool import StateTensor
from attention.shapes import MOST_TOKENS, Cost, HeadShape


class LongformerOptions(BackendOptions):
    """What a token sees beside itself."""

    window: int = Field(
        256,
        ge=1,
        le=MOST_TOKENS,
        description="tokens seen on each side, the token itself not counted; the paper's w is 2 x this",
    )
    global_tokens: int = Field(
        1, ge=0, le=MOST_TOKENS, description="first tokens of a sequence, which see all and are seen by all"
    )
    impl: implementation.CpuImpl = "auto"


class Longformer(AttentionBackend):
    """Softmax over a symmetric band of keys and the globals."""

    Options = LongformerOptions
    options: LongformerOptions

    def __init__(self, options: LongformerOptions, shape: HeadShape) -> None:
        super().__init__(options, shape)
        self.impl, self.softmax = implementation.softmax(options.impl, shape)

    @property
    def directions(self) -> tuple[bool, ...]:
        return (False,)

    @property
    def edge(self) -> int:
        return self.options.global_tokens + 2 * self.options.window + 1

    def visible(self, i: Tensor, j: Tensor, length: int | Tensor) -> Tensor:
        first = self.options.global_tokens
        return ((i - j).abs() <= self.options.window) | (i < first) | (j < first)

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> Parts:
        first, window = min(self.options.global_tokens, len(q)), self.options.window
        if first:
            yield from self.softmax.dense(q[:first], k, v, 0, False, out[:first])
        near, free = (k[first:], v[first:]), (k[:first], v[:first])
        yield from self.softmax.band(q[first:], near, free, 0, window, window, out[first:])

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        raise AssertionError("check_extend refuses a backend without a causal form")

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        return {}

    def law(self, queries: int, keys: int, *, causal: bool) -> Cost:
        shape, options, first = self.shape, self.options, min(self.options.global_tokens, keys)
        pairs = (queries - first) * min(keys, 2 * options.window + 1 + first) + first * keys
        workspace = self.softmax.dense_bytes(shape, queries, keys, asking=first) if first else 0
        if others := queries - first:
            band = self.softmax.band_bytes(shape, others, keys, options.window, options.window, first)
            workspace = max(workspace, band + first * shape.query_heads * shape.head_width * shape.itemsize)
        return Cost(4 * shape.query_heads * shape.head_width * pairs, workspace, 0)
