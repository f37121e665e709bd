"""Linear attention with ELU + 1 features (Katharopoulos et al., arXiv 2006.16236, section 3.2): phi(x) = elu(x) + 1.

A kernel of its own, not an estimate of softmax. Cost per token O(D); the state is one (D + 1, D) matrix per key-value head and
the levels of its columns.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from attention import implementation, sums
from attention.interface import AttentionBackend, BackendOptions, Cost, HeadShape, Parts, StateTensor


class LinearOptions(BackendOptions):
    """ELU + 1 has nothing to choose but who computes it."""

    impl: implementation.CpuImpl = Field("auto", description="torch, native (CPU), or auto: native where it can run")


class Linear(AttentionBackend):
    """phi(q).phi(k) in place of softmax's exp(q.k)."""

    Options = LinearOptions
    exact = False

    def __init__(self, options: LinearOptions, shape: HeadShape) -> None:
        super().__init__(options, shape)
        self.impl = implementation.settle(options.impl, shape)
        self.sums = implementation.sums(self.impl)
        self.features = self.sums.Features(None, 0.0, shape)

    def kernel(self, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """The unnormalised weight of each key for each query, (..., N, D) and (..., M, D) to (..., N, M): the definition."""
        return phi(q) @ phi(k).transpose(-1, -2)

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> Parts:
        fresh = {name: spec.new(q.device) for name, spec in self.state(len(q)).items()}
        return (self.sums.scan if causal else self.sums.both_sides)(self.features, q, k, v, fresh["s"], fresh["level"], out)

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        return self.sums.scan(self.features, q, k, v, state["s"], state["level"], out)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, past: Sequence[int], states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> None:
        self.sums.features_step(self.features, q, k, v, [(state["s"], state["level"]) for state in states], out)

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        return sums.state(self.shape, self.shape.head_width)

    def law(self, queries: int, keys: int, *, causal: bool) -> Cost:
        width = self.shape.head_width
        workspace = self.sums.features_workspace_bytes(self.features, queries, causal)
        workspace += self.state_bytes(keys) if queries == keys else 0  # the sums of `attend`
        return Cost(sums.flops(self.shape, width, queries, causal), workspace, self.state_bytes(keys))


def phi(x: Tensor) -> Tensor:
    """elu(x) + 1: positive, x + 1 above zero, e^x below."""
    return x.clamp_max(0).exp_().add_(x.clamp_min(0))
