"""Dense softmax attention (Vaswani et al., arXiv 1706.03762, section 3.2.1): every token sees every token. The exact reference.

Cost per token O(n). The state is the keys and values themselves, 2 n G D elements, position j at index j. Blocks of queries
meet blocks of keys, so no n x n matrix exists.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from attention import history
from attention.interface import AttentionBackend, BackendOptions
from attention.kernels import implementation
from attention.kernels.library import Told
from attention.parts import Parts
from attention.pool import StateTensor
from attention.shapes import Cost, HeadShape, Segments


class DenseOptions(BackendOptions):
    """Dense attention has nothing to choose but who computes it."""

    impl: implementation.Impl = "auto"


class Dense(AttentionBackend):
    """Softmax over all keys."""

    Options = DenseOptions
    options: DenseOptions
    takes_int8 = True

    def __init__(self, options: DenseOptions, shape: HeadShape) -> None:
        super().__init__(options, shape)
        self.impl, self.softmax = implementation.softmax(options.impl, shape, no_xformers="")
        self.packed = implementation.packed(self.impl, self.directions)

    @property
    def edge(self) -> int:
        return self.softmax.edge(self.shape)

    def visible(self, i: Tensor, j: Tensor, length: int | Tensor) -> Tensor:
        return (i < length) & (j < length)

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> Parts:
        return self.softmax.dense(q, k, v, 0, causal, out)

    def attend_sequences(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, out: Tensor) -> Parts:
        if self.impl != "native" or self.score_cap is not None or self.score_bias is not None:
            return super().attend_sequences(q, k, v, segments, out)
        seen = ((end, [(start, end)]) for start, end, _ in segments.spans())  # a call for many short texts, not one for each
        return self.softmax.pattern(q, k, v, 0, False, seen, out)

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        return self.softmax.dense(q, *history.append(state, k, v, past), past, True, out)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, past: Sequence[int], states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> None:
        history.append_step(states, k, v, past)
        self.softmax.step(q, states, [at + 1 for at in past], k.shape[1], out)

    def told(self, past: Sequence[int], states: Sequence[dict[str, Tensor]]) -> Told | None:
        return self.softmax.told(self.shape, states, past, [at + 1 for at in past])

    @property
    def keeps_all(self) -> bool:
        return True

    def touched(self, state: dict[str, Tensor], position: int) -> Sequence[Tensor]:
        return ()

    def cut(self, state: dict[str, Tensor], tokens: int, total: int) -> None:
        history.cut(state, tokens, total)

    def carry(self, state: dict[str, Tensor], into: dict[str, Tensor], tokens: int) -> None:
        history.carry(state, into, tokens)

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        return history.keys_and_values(self.shape, max_tokens)

    def law(self, queries: int, keys: int, *, causal: bool) -> Cost:
        pairs = queries * keys - (queries * (queries - 1) // 2 if causal else 0)
        if queries == 1:
            workspace = self.softmax.step_bytes(self.shape, history.whole(keys))
        else:
            workspace = self.softmax.dense_bytes(self.shape, queries, keys)
        return Cost(4 * self.shape.query_heads * self.shape.head_width * pairs, workspace, self.state_bytes(keys))
