"""FAVOR+ (Choromanski et al., Performer, arXiv 2009.14794, sections 2.2 to 2.4): softmax attention through random features.

phi(x) = m^(-1/2) exp(W x' - |x'|^2 / 2) with x' = x / D^(1/4) has E[phi(q).phi(k)] = exp(q.k / sqrt D), with relative variance
(e^w - 1) / m at w = |q' + k'|^2 (Lemma 2). Attention is then two matrix products through S = sum_j phi(k_j) [v_j, 1]: cost per
token O(m), state one (m, D + 1) matrix per key-value head, kept in float32 because it is a long sum.

What cancels between numerator and denominator is never computed: m^(-1/2) and the query's |q'|^2 / 2. The key's is a weight on
its value. Where we part from the paper's code: rows of W are Haar (`projection`), no epsilon is added to the features, and
the stabiliser of the keys looks at no later key (`_scan`).
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from attention import blocks
from attention.interface import AttentionBackend, BackendOptions, Cost, HeadShape, StateTensor

CHUNK = 128  # tokens answered together: their own triangle costs CHUNK per token, their state one product each
REACH = 60.0  # exponents (of 2) taken as they are; beyond, a row of features is taken relative to its largest


def projection(features: int, width: int, seed: int) -> Tensor:
    """The random rows W of FAVOR+: blocks of Haar-orthogonal rows with chi-distributed norms, float32 (m, D).

    Computed in float64 from `seed` alone, so every replica and every rerun has the same features. LAPACK's QR fixes the
    sign of its first reflection, which biases the rows; the columns are multiplied by sign(diag R) to make them Haar
    (Mezzadri, math-ph/0609050). Row norms are those of independent Gaussian rows.
    """
    generator = torch.Generator().manual_seed(seed)
    orthogonal = []
    for _ in range(-(-features // width)):
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        orthogonal.append((q * r.diagonal().sign()).T)
    norms = torch.randn(features, width, generator=generator, dtype=torch.float64).norm(dim=1)
    rows: Tensor = torch.cat(orthogonal)[:features] * norms[:, None]
    return rows.float()


class PerformerOptions(BackendOptions):
    """How many random features, and which."""

    features: int = Field(256, ge=1, le=65536, description="random rows m; the variance of the kernel falls as 1/m")
    seed: int = Field(0, ge=0, description="of the random rows: the same seed, the same answers")
    hyperbolic: bool = Field(False, description="each row also with its sign turned: twice the state, half the variance")


class Performer(AttentionBackend):
    """Softmax attention estimated with positive orthogonal random features."""

    Options = PerformerOptions
    options: PerformerOptions
    exact = False

    def __init__(self, options: PerformerOptions, shape: HeadShape) -> None:
        super().__init__(options, shape)
        rows = projection(options.features, shape.head_width, options.seed)
        rows = torch.cat([rows, -rows]) if options.hyperbolic else rows
        scaled = (rows.double() * (blocks.LOG2_E / shape.head_width**0.25)).to(shape.dtype)
        self.weights = scaled.T.contiguous().to(shape.device)  # (D, m): 2^(x W) is exp(W x')
        self.reach = REACH / float(scaled.double().norm(dim=1).max())  # norm of x up to which no exponent passes REACH
        self.wide = torch.promote_types(shape.dtype, torch.float32)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """2^(x W - a) of x (..., D) as (..., m), and the shift a (..., 1): 0 for every row whose norm is within reach."""
        exponents = x @ self.weights
        far = x.norm(dim=-1, keepdim=True) > self.reach
        shift = torch.zeros_like(far, dtype=x.dtype)
        if far.any():
            shift = torch.where(far, exponents.amax(-1, keepdim=True), shift)
            exponents -= shift
        return exponents.exp2_(), shift

    def key_features(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Features of k (G, C, D) as (G, C, m) and the log2 of each key's weight, (G, C, 1) in at least float32."""
        features, shift = self.features(k)
        half_square = k.to(self.wide).square().sum(-1, keepdim=True) * (blocks.LOG2_E / (2 * math.sqrt(k.shape[-1])))
        return features, shift - half_square

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> None:
        fresh = {name: spec.new(q.device) for name, spec in self.state(len(q)).items()}
        answer = self._scan if causal else self._both_sides
        answer(q, k, v, fresh["s"], fresh["scale"], out)

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> None:
        self._scan(q, k, v, state["s"], state["scale"], out)

    def _both_sides(self, q: Tensor, k: Tensor, v: Tensor, s: Tensor, scale: Tensor, out: Tensor) -> None:
        """All keys into s first, then all queries: s (G, m, D + 1) and scale (G, 1, 1) begin empty."""
        heads = self.shape.key_value_heads
        for first, last in blocks.spread(0, len(k), CHUNK):
            keys, weight = self.key_features(k[first:last].transpose(0, 1))
            self._rescale(s, scale, torch.maximum(scale, weight.amax(1, keepdim=True)))
            s += keys.transpose(1, 2) @ self._weighted(v[first:last], weight, scale)
        for first, last in blocks.spread(0, len(q), CHUNK):
            queries = self.features(query_rows(q[first:last], heads))[0]
            out[first:last] = self._ratio(queries @ s.to(q.dtype), last - first)

    def _scan(self, q: Tensor, k: Tensor, v: Tensor, s: Tensor, scale: Tensor, out: Tensor) -> None:
        """Continue s (G, m, D + 1) and scale (G, 1, 1), both changed, over the tokens in order; answers into out (C, H, D)."""
        heads = self.shape.key_value_heads
        for first, last in blocks.spread(0, len(q), CHUNK):
            queries = self.features(query_rows(q[first:last], heads))[0]
            keys, weight = self.key_features(k[first:last].transpose(0, 1))
            self._chunk(queries, keys, weight, v[first:last], s, scale, out[first:last])

    def _chunk(self, queries: Tensor, keys: Tensor, weight: Tensor, v: Tensor, s: Tensor, scale: Tensor, out: Tensor) -> None:
        """Answer one chunk causally and add it to the state.

        The sums are kept relative to 2^scale. It rises only at a key that would pass 2^REACH: the chunk is then answered in
        two passes of one shape, before and from that key, so that earlier rows are the same to the bit whatever comes later.
        """
        count, done = len(v), 0
        inner = torch.tril((queries @ keys.transpose(1, 2)).view(len(keys), -1, count, count)).view(len(keys), -1, count)
        while done < count:
            far = (weight[:, done:] - scale > REACH).any(0).flatten()
            stop = done + int(far.int().argmax()) if far.any() else count
            if stop > done:
                ends = weight.clone()
                ends[:, :done], ends[:, stop:] = -math.inf, -math.inf
                values = self._weighted(v, ends, scale)
                both = (queries @ s.to(queries.dtype)).to(self.wide) + inner @ values
                out[done:stop] = self._ratio(both, count)[done:stop]
                s += keys.transpose(1, 2) @ values
            if stop < count:
                rising = weight[:, stop : stop + 1]
                self._rescale(s, scale, torch.where(rising - scale > REACH, rising, scale))
            done = stop

    def _weighted(self, v: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """[v, 1] 2^(weight - scale): (C, G, D), (G, C, 1), (G, 1, 1) to (G, C, D + 1)."""
        factor = torch.exp2(weight - scale)
        return torch.cat([v.transpose(0, 1) * factor, factor], -1).to(v.dtype)

    def _rescale(self, s: Tensor, scale: Tensor, new: Tensor) -> None:
        """Move the sums from one scale to another, in place. An empty state (scale -inf) is zeros and stays so."""
        s *= torch.exp2(scale - new)
        scale.copy_(new)

    def _ratio(self, both: Tensor, count: int) -> Tensor:
        """Numerator and denominator (G, RC, D + 1) to answers (C, H, D)."""
        answer = both[..., :-1] / both[..., -1:]
        return answer.view(self.shape.query_heads, count, -1).transpose(0, 1)

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        heads = self.shape.key_value_heads
        sums = (heads, self.weights.shape[1], self.shape.head_width + 1)
        return {"s": StateTensor(sums, self.wide, 0.0), "scale": StateTensor((heads, 1, 1), self.wide, -math.inf)}

    def cost(self, queries: int, keys: int, *, causal: bool) -> Cost:
        shape, width, features = self.shape, self.shape.head_width, self.weights.shape[1]
        heads, chunk = shape.query_heads + shape.key_value_heads, min(queries, CHUNK)
        triangle = 2 * shape.query_heads * chunk * (features + width + 1) if causal else 0
        flops = queries * (2 * heads * features * (2 * width + 1) + triangle)
        temporaries = chunk * heads * (features * 2 + (chunk if causal else 0)) * shape.itemsize
        sums = 2 * self.state_bytes(1)
        return Cost(flops, queries * shape.query_heads * width * shape.itemsize + temporaries + sums, self.state_bytes(1))


def query_rows(q: Tensor, heads: int) -> Tensor:
    """(C, H, D) to (G, R C, D)."""
    return q.view(len(q), heads, -1, q.shape[-1]).permute(1, 2, 0, 3).reshape(heads, -1, q.shape[-1])
