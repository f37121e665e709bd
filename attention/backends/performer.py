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
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from attention import blocks, sums
from attention.interface import AttentionBackend, BackendOptions, Cost, HeadShape, Parts, StateTensor

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
        # Of a step: whole vector registers, for exp2 of what stands in a loop's remainder differs in the last bit.
        self.step_weights = functional.pad(self.weights, (0, -scaled.shape[0] % 64))
        self.reach = REACH / float(scaled.double().norm(dim=1).max())  # norm of x up to which no exponent passes REACH
        self.wide = torch.promote_types(shape.dtype, torch.float32)
        self.half = blocks.LOG2_E / (2 * math.sqrt(shape.head_width))  # |x|^2 times this is |x'|^2 / 2 in powers of two

    def kernel(self, q: Tensor, k: Tensor) -> Tensor:
        """What each key weighs for each query, up to a factor per query: (..., N, D) and (..., M, D) to (..., N, M).

        The definition, in the inputs' dtype; float64 holds any norms that a model has.
        """
        rows = self.weights.to(q.dtype)
        queries: Tensor = q @ rows
        keys: Tensor = k @ rows - k.square().sum(-1, keepdim=True) * (blocks.LOG2_E / (2 * math.sqrt(k.shape[-1])))
        queries, keys = queries - queries.amax(-1, keepdim=True), keys - keys.amax((-1, -2), keepdim=True)
        weights: Tensor = queries.exp2() @ keys.exp2().transpose(-1, -2)
        return weights

    def features(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor]:
        """2^(x W - a) of tight x (..., D), with a and |x|: (..., m), (..., 1) and, in at least float32, (..., 1).

        The shift a is 0 for a row whose norm is within reach.
        """
        exponents = torch.mm(x.view(-1, x.shape[-1]), self.weights).view(*x.shape[:-1], -1)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.wide)
        if norm.amax().item() <= self.reach:
            return exponents.exp2_(), 0.0, norm
        shift = torch.where(norm <= self.reach, 0.0, exponents.amax(-1, keepdim=True))
        return exponents.sub_(shift).exp2_(), shift, norm

    def query_features(self, q: Tensor) -> Tensor:
        """(C, H, D) to (G, RC, m). The shift is left out: it cancels between numerator and denominator."""
        return self.features(blocks.query_rows(q, self.shape.key_value_heads))[0]

    def key_features(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """(C, G, D) to features (G, C, m) and the log2 of each key's weight, (G, C, 1) in at least float32."""
        features, shift, norm = self.features(blocks.heads_first(k).contiguous())
        return features, shift - norm.square() * self.half

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> Parts:
        fresh = {name: spec.new(q.device) for name, spec in self.state(len(q)).items()}
        return (self._scan if causal else self._both_sides)(q, k, v, fresh["s"], fresh["scale"], out)

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        return self._scan(q, k, v, state["s"], state["scale"], out)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, past: Sequence[int], states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> None:
        heads, groups = self.shape.query_heads, self.shape.key_value_heads
        x = torch.cat((q, k), dim=1)  # (B, H + G, D): one pass makes all features of all sequences
        if x.dtype == self.wide:  # MKL rounds a row by how many stand beside it, so each sequence has its own product
            exponents = torch.stack([torch.mm(one, self.step_weights) for one in x])
        else:  # oneDNN does not
            exponents = torch.mm(x.view(-1, x.shape[-1]), self.step_weights).to(self.wide).view(*x.shape[:2], -1)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.wide)
        half = norm[:, heads:].square() * self.half  # (B, G, 1), |k'|^2 / 2
        if norm.amax().item() <= self.reach:
            weight = -half
        else:
            shift = torch.where(norm <= self.reach, 0.0, exponents.amax(-1, keepdim=True))
            exponents[:, :heads] -= shift[:, :heads]
            weight = shift[:, heads:] - half
        scale = torch.stack([state["scale"] for state in states])[..., 0]  # (B, G, 1)
        if not (weight - scale).amax().item() <= REACH:  # a NaN, too, is looked at sequence by sequence
            for state, old, new in zip(states, scale, weight, strict=True):
                _rescale(state["s"], state["scale"], torch.where(new > old + REACH, new, old)[..., None])
            scale = torch.stack([state["scale"] for state in states])[..., 0]
        exponents[:, heads:] -= half + scale  # the key's weight on its value, taken on its features
        features = exponents.exp2_()[..., : self.weights.shape[1]]
        values = exponents.new_ones(len(q), groups, self.shape.head_width + 1, 1)
        values[..., :-1, 0] = v
        queries, keys = features[:, :heads].unflatten(1, (groups, -1)), features[:, heads:, None]
        sums.step(queries, keys, values, [state["s"] for state in states], out)

    def _both_sides(self, q: Tensor, k: Tensor, v: Tensor, s: Tensor, scale: Tensor, out: Tensor) -> Parts:
        """All keys into s (G, D + 1, m) first, then all queries; s and scale (G, 1, 1) begin empty."""
        for a, b in blocks.spread(0, len(k), sums.BLOCK):
            self._absorb(k[a:b], v[a:b], s, scale)
            yield
        for a, b in blocks.spread(0, len(q), sums.BLOCK):
            sums.divide(sums.ask(s, self.query_features(q[a:b])), out[a:b])
            yield

    def _absorb(self, k: Tensor, v: Tensor, s: Tensor, scale: Tensor) -> None:
        """Add tokens to s (G, D + 1, m) at the scale (G, 1, 1) of the heaviest key, both changed."""
        keys, weight = self.key_features(k)
        _rescale(s, scale, torch.maximum(scale, weight.amax(1, keepdim=True)))
        sums.add(s, keys, sums.values_with_ones(v, torch.exp2(weight - scale)))

    def _scan(self, q: Tensor, k: Tensor, v: Tensor, s: Tensor, scale: Tensor, out: Tensor) -> Parts:
        """Continue s (G, D + 1, m) and scale (G, 1, 1), both changed, over the tokens in order; answers into out (C, H, D)."""
        for a, b in blocks.spread(0, len(q), sums.CHUNK):
            keys, weight = self.key_features(k[a:b])
            self._chunk(self.query_features(q[a:b]), keys, weight, v[a:b], s, scale, out[a:b])
            yield

    def _chunk(self, queries: Tensor, keys: Tensor, weight: Tensor, v: Tensor, s: Tensor, scale: Tensor, out: Tensor) -> None:
        """Answer one chunk causally and add it to the state.

        The sums are kept relative to 2^scale. It rises only at a key that would pass 2^REACH: the chunk is then answered in
        passes of one shape, before and from that key, so that earlier rows are the same to the bit whatever comes later.
        """
        done = 0
        while done < len(v):
            stop = _first_above(weight, scale + REACH, done)
            if stop > done:
                factor = torch.exp2(weight - scale)
                factor[:, :done], factor[:, stop:] = 0.0, 0.0
                both = sums.scan(s, queries, keys, sums.values_with_ones(v, factor))
                sums.divide(both, out, done, stop)
            if stop < len(v):
                risen = weight[:, stop : stop + 1]
                _rescale(s, scale, torch.where(risen > scale + REACH, risen, scale))
            done = stop

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        heads = self.shape.key_value_heads
        sums_shape = (heads, self.shape.head_width + 1, self.weights.shape[1])
        return {"s": StateTensor(sums_shape, self.wide, 0.0), "scale": StateTensor((heads, 1, 1), self.wide, -math.inf)}

    def cost(self, queries: int, keys: int, *, causal: bool) -> Cost:
        shape, features = self.shape, self.weights.shape[1]
        mapping = 2 * queries * (shape.query_heads + shape.key_value_heads) * shape.head_width * features
        workspace = sums.workspace_bytes(shape, features, queries, causal)
        return Cost(mapping + sums.flops(shape, features, queries, causal), workspace, self.state_bytes(keys))


def _first_above(weight: Tensor, limit: Tensor, start: int) -> int:
    """The first token from `start` on whose weight (G, C, 1) is above its group's limit (G, 1, 1); C when there is none."""
    above = (weight[:, start:] > limit).any(0).flatten()
    return start + int(above.int().argmax()) if above.any() else weight.shape[1]


def _rescale(s: Tensor, scale: Tensor, new: Tensor) -> None:
    """Move the sums from one scale to another, in place. An empty state (scale -inf) is zeros and stays so."""
    s *= torch.exp2(scale - new)
    scale.copy_(new)
