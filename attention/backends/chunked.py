"""Chunked softmax attention: the sequence is cut into chunks of fixed length, and a token sees its own chunk only.

The local attention of Llama 4 (query and key in the same chunk: i // C == j // C) and of LRA's "Local" baseline (Tay et al.,
arXiv 2011.04006). Not a sliding window: what a token sees reaches back between 1 and C tokens. Cost per token O(chunk); the
state is one chunk of keys and values, position j at index j % chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import Field
from torch import Tensor

from attention import blocks, implementation
from attention.interface import MOST_TOKENS, AttentionBackend, BackendOptions, Cost, HeadShape, Parts, StateTensor


class ChunkedOptions(BackendOptions):
    """How long a chunk is."""

    chunk: int = Field(1024, ge=1, le=MOST_TOKENS, description="tokens of a chunk; a token sees the tokens of its own")
    impl: implementation.CpuImpl = Field("auto", description="torch, native (CPU), or auto: native where it can run")


class Chunked(AttentionBackend):
    """Softmax over the own chunk."""

    Options = ChunkedOptions
    options: ChunkedOptions

    def __init__(self, options: ChunkedOptions, shape: HeadShape) -> None:
        super().__init__(options, shape)
        self.impl = implementation.settle(options.impl, shape)
        self.softmax = implementation.softmax(self.impl)

    @property
    def edge(self) -> int:
        return self.options.chunk

    def visible(self, i: Tensor, j: Tensor, length: int | Tensor) -> Tensor:
        return i // self.options.chunk == j // self.options.chunk

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> Parts:
        for a, b in blocks.spread(0, len(q), self.options.chunk):
            keys, values = blocks.heads_first(k[a:b]), blocks.heads_first(v[a:b])
            yield from self.softmax.dense(q[a:b], keys, values, 0, causal, out[a:b])

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        done = 0
        for rows, seen in self._parts(past, len(q)):
            part = slice(done, done + rows)
            keys, values = blocks.append(state, k[part], v[part], seen - rows)
            yield from self.softmax.dense(q[part], keys, values, seen - rows, True, out[part])
            done += rows

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, past: Sequence[int], states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> None:
        places = [at % self.options.chunk for at in past]
        blocks.put_step(states, k, v, places)
        self.softmax.step(q, states, [at + 1 for at in places], k.shape[1], out)

    def _parts(self, past: int, count: int) -> Iterator[tuple[int, int]]:
        """(new tokens, tokens of the chunk up to the last of them) for each chunk that `count` tokens behind `past` touch."""
        while count:
            within = past % self.options.chunk
            rows = min(count, self.options.chunk - within)
            yield rows, within + rows
            past, count = past + rows, count - rows

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        return blocks.key_value_state(self.shape, max_tokens, self.options.chunk)

    def law(self, queries: int, keys: int, *, causal: bool) -> Cost:
        parts = list(self._parts(keys - queries, queries))
        pairs = sum(rows * seen - (rows * (rows - 1) // 2 if causal else 0) for rows, seen in parts)
        step, chunk = self.softmax.step_workspace_bytes, self.softmax.dense_workspace_bytes
        chunks = (chunk(self.shape, queries, seen, asking=rows) for rows, seen in set(parts))
        looked_at = blocks.rounded(parts[0][1], self.options.chunk)
        workspace = step(self.shape, looked_at) if queries == 1 else max(chunks)
        return Cost(4 * self.shape.query_heads * self.shape.head_width * pairs, workspace, self.state_bytes(keys))
