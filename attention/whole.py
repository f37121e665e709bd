"""A backend both ways, for encoders: every piece is a whole text, answered at once, and nothing is kept of it.

It continues empty states by whole sequences, so who serves decoders by `extend` serves encoders by the same calls. What it
answers and costs is what the backend within answers and costs with `causal=False`.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from attention.interface import AttentionBackend
from attention.layered import PerLayer
from attention.parts import Parts
from attention.pool import StatePool, StateTensor
from attention.shapes import Cost, Segments


class Whole(AttentionBackend):
    """Another backend over whole sequences, both ways."""

    def __init__(self, inner: AttentionBackend) -> None:
        """Raises ValueError for a backend that is causal only."""
        if False not in inner.directions:
            raise ValueError(f"{inner.name} is causal only, and an encoder sees both sides")
        super().__init__(inner.options, inner.shape)
        self.inner = inner
        self.impl, self.exact = inner.impl, inner.exact
        self.score_cap, self.score_bias = inner.score_cap, inner.score_bias

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def directions(self) -> tuple[bool, ...]:
        return (True,)  # as `extend` asks for it: there is no later piece to be seen

    @property
    def edge(self) -> int:
        return self.inner.edge

    def visible(self, i: Tensor, j: Tensor, length: int | Tensor) -> Tensor:
        return self.inner.visible(i, j, length)

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.inner.kernel(q, k, v, i, j)

    def extending(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Segments,
        pool: StatePool,
        layer: int,
        slots: Sequence[int],
        out: Tensor,
        by_steps: bool = False,
    ) -> Parts:
        """As of `AttentionBackend`. Raises ValueError for a piece that is not the first, and whole, of its sequence."""
        self.check_extend(q, k, v, segments, pool, layer, out)
        if any(segments.past):
            raise ValueError(f"an encoder reads a text at once, received pieces behind {segments.past} tokens")
        pool.take(slots, layer, segments)
        if packed := self.inner.packed.get(False):
            out.copy_(packed(q, k, v, segments))
        else:
            yield from self.inner.attend_sequences(q, k, v, segments, out)
        pool.settle(slots, layer, segments)

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> Parts:
        return self.inner.attend_sequence(q, k, v, False, out)

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        raise AssertionError("`extending` answers whole sequences")

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        return {}

    def law(self, queries: int, keys: int, *, causal: bool) -> Cost:
        cost = self.inner.law(queries, keys, causal=False)
        return Cost(cost.flops, cost.workspace_bytes, 0)


def whole(backend: AttentionBackend) -> AttentionBackend:
    """A backend as encoders are served by it; `native` layer by layer. Raises ValueError for one that is causal only."""
    if not isinstance(backend, PerLayer):
        return Whole(backend)
    kinds = {kind: Whole(kind) for kind in backend.counts}
    made = copy.copy(backend)
    made.layers = tuple(kinds[kind] for kind in backend.layers)
    made.counts = Counter(made.layers)
    return made
