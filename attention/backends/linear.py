"""Linear attention with ELU + 1 features (Katharopoulos et al., arXiv 2006.16236, section 3.2): phi(x) = elu(x) + 1.

A kernel of its own, not an estimate of softmax. Cost per token O(D); the state is one (D + 1, D) matrix per key-value head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from attention import blocks, implementation, native, sums
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
        self.wide = torch.promote_types(shape.dtype, torch.float32)
        self.impl = implementation.settle(options.impl, shape)
        self.native = native.Features(shape.head_width) if self.impl == "native" else None
        self.level = torch.zeros(shape.key_value_heads, 1, 1)  # of the native kernel's sums; these features never raise it

    def kernel(self, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """The unnormalised weight of each key for each query, (..., N, D) and (..., M, D) to (..., N, M): the definition."""
        return phi(q) @ phi(k).transpose(-1, -2)

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> Parts:
        s = self.state(len(q))["s"].new(q.device)
        if self.native is not None:
            return (native.scan if causal else native.both_sides)(self.native, q, k, v, s, self.level, out)
        return (self._scan if causal else self._both_sides)(q, k, v, s, out)

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        if self.native is not None:
            return native.scan(self.native, q, k, v, state["s"], self.level, out)
        return self._scan(q, k, v, state["s"], out)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, past: Sequence[int], states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> None:
        if self.native is not None:
            native.features_step(self.native, q, k, v, [(state["s"], self.level) for state in states], out)
            return
        queries = phi(q.to(self.wide)).view(len(q), self.shape.key_value_heads, -1, self.shape.head_width)
        keys = phi(k.to(self.wide))[..., None, :]
        values = functional.pad(v.to(self.wide), (0, 1), value=1.0)[..., None]
        sums.step(queries, keys, values, [state["s"] for state in states], out)

    def _scan(self, q: Tensor, k: Tensor, v: Tensor, s: Tensor, out: Tensor) -> Parts:
        """Continue s (G, D + 1, D), changed, over the tokens in order; answers into out (C, H, D)."""
        for a, b in blocks.spread(0, len(q), sums.CHUNK):
            both = sums.scan(s, self._queries(q[a:b]), self._keys(k[a:b]), sums.values_with_ones(v[a:b]))
            sums.divide(both, out[a:b])
            yield

    def _both_sides(self, q: Tensor, k: Tensor, v: Tensor, s: Tensor, out: Tensor) -> Parts:
        """All keys into s (G, D + 1, D) first, then all queries."""
        for a, b in blocks.spread(0, len(k), sums.BLOCK):
            sums.add(s, self._keys(k[a:b]), sums.values_with_ones(v[a:b]))
            yield
        for a, b in blocks.spread(0, len(q), sums.BLOCK):
            sums.divide(sums.ask(s, self._queries(q[a:b])), out[a:b])
            yield

    def _queries(self, q: Tensor) -> Tensor:
        return phi(blocks.query_rows(q, self.shape.key_value_heads))

    def _keys(self, k: Tensor) -> Tensor:
        return phi(blocks.heads_first(k).contiguous())

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        width = self.shape.head_width
        return {"s": StateTensor((self.shape.key_value_heads, width + 1, width), self.wide, 0.0)}

    def law(self, queries: int, keys: int, *, causal: bool) -> Cost:
        width = self.shape.head_width
        if self.native is not None:
            workspace = native.features_workspace_bytes(self.shape, width, queries)
        else:
            workspace = sums.workspace_bytes(self.shape, width, queries, causal)
        return Cost(sums.flops(self.shape, width, queries, causal), workspace, self.state_bytes(keys))


def phi(x: Tensor) -> Tensor:
    """elu(x) + 1: positive, x + 1 above zero, e^x below. In these four operations, for `elu` itself is slow in bfloat16."""
    return x.clamp_max(0).exp_().add_(x.clamp_min(0))
