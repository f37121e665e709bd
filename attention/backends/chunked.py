"""Chunked softmax attention: the sequence is cut into chunks of fixed length, and a token sees its own chunk only.

The local attention of Llama 4 (query and key in the same chunk: i // C == j // C) and of LRA's "Local" baseline (Tay et al.,
arXiv 2011.04006). Not a sliding window: what a token sees reaches back between 1 and C tokens. Cost per token O(chunk); the
state is one chunk of keys and values, position j at index j % chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import Field
from torch import Tensor

from attention import blocks
from attention.interface import AttentionBackend, BackendOptions, Cost, Parts, StateTensor


class ChunkedOptions(BackendOptions):
    """How long a chunk is."""

    chunk: int = Field(1024, ge=1, description="tokens of a chunk; a token sees the tokens of its own")


class Chunked(AttentionBackend):
    """Softmax over the own chunk."""

    Options = ChunkedOptions
    options: ChunkedOptions

    @property
    def edge(self) -> int:
        return self.options.chunk

    def visible(self, i: Tensor, j: Tensor, length: int | Tensor) -> Tensor:
        return i // self.options.chunk == j // self.options.chunk

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> Parts:
        for a, b in blocks.spread(0, len(q), self.options.chunk):
            yield from blocks.dense(q[a:b], blocks.heads_first(k[a:b]), blocks.heads_first(v[a:b]), 0, causal, out[a:b])

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        done = 0
        for rows, seen in self._parts(past, len(q)):
            part = slice(done, done + rows)
            yield from blocks.extend(q[part], k[part], v[part], seen - rows, state, out[part])
            done += rows

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, past: Sequence[int], states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> None:
        blocks.append_step(q, k, v, [at % self.options.chunk for at in past], states, out)

    def _parts(self, past: int, count: int) -> Iterator[tuple[int, int]]:
        """(new tokens, tokens of the chunk up to the last of them) for each chunk that `count` tokens behind `past` touch."""
        while count:
            within = past % self.options.chunk
            rows = min(count, self.options.chunk - within)
            yield rows, within + rows
            past, count = past + rows, count - rows

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        return blocks.key_value_state(self.shape, max_tokens, self.options.chunk)

    def cost(self, queries: int, keys: int, *, causal: bool) -> Cost:
        parts = list(self._parts(keys - queries, queries))
        pairs = sum(rows * seen - (rows * (rows - 1) // 2 if causal else 0) for rows, seen in parts)
        workspace = max(
            blocks.workspace_bytes(self.shape, queries, blocks.DENSE_ROWS, seen, asking=rows) for rows, seen in set(parts)
        )
        return Cost(4 * self.shape.query_heads * self.shape.head_width * pairs, workspace, self.state_bytes(keys))
