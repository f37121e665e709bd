"""Linear attention with ELU + 1 features (Katharopoulos et al., arXiv 2006.16236, section 3.2): phi(x) = elu(x) + 1.

A kernel of its own, not an estimate of softmax. Cost per token O(D); the state is one (D + 1, D) matrix per key-value head and
the levels of its columns.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from attention.interface import AttentionBackend, BackendOptions
from attention.kernels import features, implementation
from attention.kernels.features import Sums
from attention.kernels.library import Told
from attention.parts import Parts
from attention.pool import StateTensor
from attention.shapes import Cost, HeadShape


class LinearOptions(BackendOptions):
    """ELU + 1 has nothing to choose but who computes it."""

    impl: implementation.CpuImpl = "auto"


class Linear(AttentionBackend):
    """phi(q).phi(k) in place of softmax's exp(q.k)."""

    Options = LinearOptions
    exact = False

    def __init__(self, options: LinearOptions, shape: HeadShape) -> None:
        super().__init__(options, shape)
        self.impl, self.features = implementation.features(options.impl, None, 0.0, shape)

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """The unnormalised weight of each key for each query, (..., N, D) and (..., M, D) to (..., N, M): the definition."""
        return phi(q) @ phi(k).transpose(-1, -2)

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> Parts:
        answer = self.features.scan if causal else self.features.both_sides
        return answer(q, k, v, Sums.fresh(self.shape, self.shape.head_width), out)

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        return self.features.scan(q, k, v, Sums.of(state), out)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, past: Sequence[int], states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> None:
        self.features.step(q, k, v, states, out)

    def told(self, past: Sequence[int], states: Sequence[dict[str, Tensor]]) -> Told | None:
        return self.features.told(states)

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        return features.state(self.shape, self.shape.head_width)

    def law(self, queries: int, keys: int, *, causal: bool) -> Cost:
        width = self.shape.head_width
        workspace = self.features.attend_bytes(queries, causal)
        workspace += self.state_bytes(keys) if queries == keys else 0  # the sums of `attend`
        return Cost(features.flops(self.shape, width, queries, causal), workspace, self.state_bytes(keys))


def phi(x: Tensor) -> Tensor:
    """elu(x) + 1: positive, x + 1 above zero, e^x below."""
    return x.clamp_max(0).exp_().add_(x.clamp_min(0))
