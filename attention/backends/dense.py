"""Dense softmax attention (Vaswani et al., arXiv 1706.03762, section 3.2.1): every token sees every token. The exact reference.

Cost per token O(n). The state is the keys and values themselves, 2 n G D elements, position j at index j. Blocks of queries
meet blocks of keys, so no n x n matrix exists.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from attention import blocks, cuda, implementation
from attention.interface import AttentionBackend, BackendOptions, Cost, HeadShape, Parts, Segments, StateTensor


class DenseOptions(BackendOptions):
    """Dense attention has nothing to choose but who computes it."""

    impl: implementation.Impl = Field("auto", description="torch, native (CPU), xformers (CUDA), or auto: what can run here")


class Dense(AttentionBackend):
    """Softmax over all keys."""

    Options = DenseOptions
    options: DenseOptions

    def __init__(self, options: DenseOptions, shape: HeadShape) -> None:
        super().__init__(options, shape)
        self.impl = implementation.settle(options.impl, shape, no_xformers="")
        self.softmax = implementation.softmax(self.impl)

    @property
    def edge(self) -> int:
        return blocks.columns(self.shape.query_heads, self.shape.itemsize, blocks.DENSE_ROWS) + 1

    def visible(self, i: Tensor, j: Tensor, length: int | Tensor) -> Tensor:
        return (i < length) & (j < length)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool) -> Tensor:
        if self.impl != "xformers":
            return super().attend(q, k, v, segments, causal=causal)
        self.check_attend(q, k, v, segments, causal)
        return cuda.attend(q, k, v, segments, causal=causal)

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> Parts:
        return self.softmax.dense(q, blocks.heads_first(k), blocks.heads_first(v), 0, causal, out)

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        return self.softmax.dense(q, *blocks.append(state, k, v, past), past, True, out)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, past: Sequence[int], states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> None:
        blocks.put_step(states, k, v, past)
        self.softmax.step(q, states, [at + 1 for at in past], k.shape[1], out)

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        return blocks.key_value_state(self.shape, max_tokens)

    def law(self, queries: int, keys: int, *, causal: bool) -> Cost:
        pairs = queries * keys - (queries * (queries - 1) // 2 if causal else 0)
        step, chunk = self.softmax.step_workspace_bytes, self.softmax.dense_workspace_bytes
        workspace = (
            step(self.shape, blocks.rounded(keys, keys + blocks.STEP)) if queries == 1 else chunk(self.shape, queries, keys)
        )
        return Cost(4 * self.shape.query_heads * self.shape.head_width * pairs, workspace, self.state_bytes(keys))
