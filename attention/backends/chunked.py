"""Chunked softmax attention: the sequence is cut into chunks of fixed length, and a token sees its own chunk only.

The local attention of Llama 4 (query and key in the same chunk: i // C == j // C) and of LRA's "Local" baseline (Tay et al.,
arXiv 2011.04006). Not a sliding window: what a token sees reaches back between 1 and C tokens. Cost per token O(chunk); the
state is one chunk of keys and values, position j at index j % chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from attention import history
from attention.interface import AttentionBackend, BackendOptions
from attention.kernels import implementation
from attention.kernels.library import Told
from attention.parts import Parts, spread
from attention.pool import StateTensor
from attention.shapes import MOST_TOKENS, Cost, HeadShape


class ChunkedOptions(BackendOptions):
    """How long a chunk is."""

    chunk: int = Field(1024, ge=1, le=MOST_TOKENS, description="tokens of a chunk; a token sees the tokens of its own")
    impl: implementation.CpuImpl = "auto"


class Chunked(AttentionBackend):
    """Softmax over the own chunk."""

    Options = ChunkedOptions
    options: ChunkedOptions
    takes_int8 = True

    def __init__(self, options: ChunkedOptions, shape: HeadShape) -> None:
        super().__init__(options, shape)
        self.impl, self.softmax = implementation.softmax(options.impl, shape)
        self.ring = history.Ring(0, options.chunk)

    @property
    def edge(self) -> int:
        return self.options.chunk

    def visible(self, i: Tensor, j: Tensor, length: int | Tensor) -> Tensor:
        return i // self.options.chunk == j // self.options.chunk

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> Parts:
        for a, b in spread(0, len(q), self.options.chunk):
            yield from self.softmax.dense(q[a:b], k[a:b], v[a:b], 0, causal, out[a:b])

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        for held, position, count in self.ring.runs(past, past + len(q)):
            part = slice(position - past, position - past + count)
            keys, values = history.append(state, k[part], v[part], held)
            yield from self.softmax.dense(q[part], keys, values, held, True, out[part])

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, past: Sequence[int], states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> None:
        places = [self.ring.place(at) for at in past]
        history.append_step(states, k, v, places)
        self.softmax.step(q, states, [at + 1 for at in places], k.shape[1], out)

    def told(self, past: Sequence[int], states: Sequence[dict[str, Tensor]]) -> Told | None:
        places = [self.ring.place(at) for at in past]
        return self.softmax.told(self.shape, states, places, [at + 1 for at in places])

    def runway(self, past: int) -> int:
        return self.options.chunk - past % self.options.chunk

    def touched(self, state: dict[str, Tensor], position: int) -> Sequence[Tensor]:
        return ()

    def cut(self, state: dict[str, Tensor], tokens: int, total: int) -> None:
        first = self.ring.place(tokens)
        history.cut(state, first, first + total - tokens)

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        return history.keys_and_values(self.shape, max_tokens, self.options.chunk)

    def law(self, queries: int, keys: int, *, causal: bool) -> Cost:
        shape = self.shape
        parts = [(count, held + count) for held, _, count in self.ring.runs(keys - queries, keys)]
        pairs = sum(rows * seen - (rows * (rows - 1) // 2 if causal else 0) for rows, seen in parts)
        if queries == 1:
            workspace = self.softmax.step_bytes(shape, history.rounded(parts[0][1], self.options.chunk))
        else:
            workspace = max(self.softmax.dense_bytes(shape, queries, seen, asking=rows) for rows, seen in set(parts))
        return Cost(4 * shape.query_heads * shape.head_width * pairs, workspace, self.state_bytes(keys))
