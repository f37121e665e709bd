"""FAVOR+ (Choromanski et al., Performer, arXiv 2009.14794, sections 2.2 to 2.4): softmax attention through random features.

phi(x) = m^(-1/2) exp(W x' - |x'|^2 / 2) with x' = x / D^(1/4) has E[phi(q).phi(k)] = exp(q.k / sqrt D), with relative variance
(e^w - 1) / m at w = |q' + k'|^2 (Lemma 2). Attention is then two matrix products through S = sum_j phi(k_j) [v_j, 1]: cost per
token O(m), state one (m, D + 1) matrix per key-value head, kept in float32 because it is a long sum.

With `local_chunk` the keys near a token are taken out of the estimate and weighed exactly, since they matter most and the
estimate is worst where weights are large (Scatterbrain, Chen et al., arXiv 2110.15343, section 4; the chunks are the terraces
of LoLCATs, Zhang et al., arXiv 2410.10254, section 3.2). Both parts estimate the same exp, so they are added as they are.

What cancels between numerator and denominator is never computed: m^(-1/2) and the query's |q'|^2 / 2. Where we part from the
paper's code: rows of W are Haar (`projection`), no epsilon is added to the features, and the stabiliser is one number a feature
that looks at no later key (`sums`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field, field_validator
from torch import Tensor

from attention import blocks, implementation, native, sums
from attention.interface import MOST_SEED, AttentionBackend, BackendOptions, Cost, HeadShape, Parts, StateTensor, finish

LOG2_E = blocks.LOG2_E


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
    seed: int = Field(0, ge=0, le=MOST_SEED, description="of the random rows: the same seed, the same answers")
    hyperbolic: bool = Field(False, description="each row also with its sign turned: twice the state, half the variance")
    local_chunk: int = Field(
        0, description="tokens of a chunk; keys of a token's own and the previous chunk weigh exactly; 0: none. Causal only"
    )
    impl: implementation.CpuImpl = Field("auto", description="torch, native (CPU), or auto: native where it can run")

    @field_validator("local_chunk")
    @classmethod
    def _none_or_a_block(cls, value: int) -> int:
        if value != 0 and not 64 <= value <= 65536:
            raise ValueError(f"must be 0 or 64 to 65536, received {value}")
        return value


class Performer(AttentionBackend):
    """Softmax attention estimated with positive orthogonal random features."""

    Options = PerformerOptions
    options: PerformerOptions
    exact = False

    def __init__(self, options: PerformerOptions, shape: HeadShape) -> None:
        super().__init__(options, shape)
        rows = projection(options.features, shape.head_width, options.seed)
        rows = torch.cat([rows, -rows]) if options.hyperbolic else rows
        scaled = (rows.double() * (LOG2_E / shape.head_width**0.25)).to(shape.dtype)
        self.weights = scaled.T.contiguous().to(shape.device)  # (D, m): 2^(x W) is exp(W x')
        half = LOG2_E / (2 * math.sqrt(shape.head_width))  # |x|^2 times this is |x'|^2 / 2 in powers of two
        self.impl = implementation.settle(options.impl, shape, no_native=native.no_features(scaled.shape[0]))
        self.softmax = implementation.softmax(self.impl)  # how near keys are answered
        self.sums = implementation.sums(self.impl)
        self.features = self.sums.Features(self.weights, half, shape)

    @property
    def directions(self) -> tuple[bool, ...]:
        return (True,) if self.options.local_chunk else (True, False)

    @property
    def edge(self) -> int:
        return max(1, 2 * self.options.local_chunk)

    def kernel(self, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
        rows, scale = self.weights.to(q.dtype), LOG2_E / math.sqrt(k.shape[-1])
        queries: Tensor = q @ rows
        keys: Tensor = k @ rows - k.square().sum(-1, keepdim=True) * (scale / 2)
        highest = keys.amax(-2, keepdim=True)  # of each feature, as the backend does it
        queries += highest
        shift = queries.amax(-1, keepdim=True)
        weights: Tensor = (queries - shift).exp2() @ (keys - highest).exp2().transpose(-1, -2)
        if not self.options.local_chunk:
            return weights
        # The factors that are left out above, for here the sum meets weights that are whole.
        left_out = shift - q.square().sum(-1, keepdim=True) * (scale / 2) - math.log2(rows.shape[1])
        near = i // self.options.local_chunk - j // self.options.local_chunk <= 1
        logs = torch.where(near, q @ k.transpose(-1, -2) * scale, weights.log2() + left_out)
        top = logs.masked_fill(j > i, -math.inf).amax(-1, keepdim=True)
        return (logs - top).clamp_max(0).exp2()  # of keys behind the query, whose weights the causal answer leaves out, any

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> Parts:
        fresh = {name: spec.new(q.device) for name, spec in sums.state(self.shape, self.weights.shape[1]).items()}
        if self.options.local_chunk:
            return self._attend_chunks(q, k, v, fresh["s"], fresh["level"], out)
        return (self.sums.scan if causal else self.sums.both_sides)(self.features, q, k, v, fresh["s"], fresh["level"], out)

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        if self.options.local_chunk:
            return self._extend_chunks(q, k, v, past, state, out)
        return self.sums.scan(self.features, q, k, v, state["s"], state["level"], out)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, past: Sequence[int], states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> None:
        if self.options.local_chunk:
            self._step_chunks(q, k, v, past, states, out)
            return
        self.sums.features_step(self.features, q, k, v, [(state["s"], state["level"]) for state in states], out)

    def _attend_chunks(self, q: Tensor, k: Tensor, v: Tensor, s: Tensor, level: Tensor, out: Tensor) -> Parts:
        """A whole sequence with its near keys exactly; s and level begin empty."""
        chunk = self.options.local_chunk
        for a, b in blocks.spread(0, len(q), chunk):
            first = max(0, a - chunk)  # of the near keys
            if first:
                yield from self.sums.absorb(self.features, k[first - chunk : first], v[first - chunk : first], s, level)
            keys, values = blocks.heads_first(k[first:b]), blocks.heads_first(v[first:b])
            yield from self._near_and_far(q[a:b], keys, values, a - first, (s, level) if first else None, out[a:b])

    def _extend_chunks(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        """The same behind `past` tokens. The state keeps two chunks of keys and values and the sums of all before them."""
        done = 0
        while done < len(q):
            at = past + done
            part = slice(done, done + min(len(q) - done, self.options.local_chunk - at % self.options.local_chunk))
            if self._is_full(at):
                yield from self._turn(state)
            held = self._held(at)
            keys, values = blocks.append(state, k[part], v[part], held)
            far = None if held == at else (state["s"], state["level"])
            yield from self._near_and_far(q[part], keys, values, held, far, out[part])
            done = part.stop

    def _step_chunks(
        self, q: Tensor, k: Tensor, v: Tensor, past: Sequence[int], states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> None:
        """`_extend_chunks` by one token of each of B sequences."""
        for state, at in zip(states, past, strict=True):
            if self._is_full(at):
                finish(self._turn(state))
        held = [self._held(at) for at in past]
        old = [i for i, at in enumerate(past) if held[i] != at]  # sequences that have far keys
        near = torch.empty(*q.shape[:2], 1, dtype=self._wide, device=q.device) if old else None
        blocks.put_step(states, k, v, held)
        self.softmax.step(q, states, [at + 1 for at in held], k.shape[1], out, near)
        if near is None:
            return
        everyone = len(old) == len(q)
        queries, near, answers = (x if everyone else x[old] for x in (q, near, out))
        far = [(states[i]["s"], states[i]["level"]) for i in old]
        self.sums.join_step(self.features, queries, far, near, answers)
        if not everyone:
            out[old] = answers

    def _is_full(self, at: int) -> bool:
        """Whether the state holds two whole chunks when the token at position `at` comes."""
        return at >= 2 * self.options.local_chunk and at % self.options.local_chunk == 0

    def _held(self, at: int) -> int:
        """Keys that stand in the state before the token at position `at`, once a full state was turned."""
        chunk = self.options.local_chunk
        return at if at < 2 * chunk else chunk + at % chunk

    def _turn(self, state: dict[str, Tensor]) -> Parts:
        """Move the older chunk of a full state into the sums, and the newer into its place."""
        chunk = self.options.local_chunk
        k, v = (state[name][:chunk].unflatten(1, (self.shape.key_value_heads, -1)) for name in ("k", "v"))
        yield from self.sums.absorb(self.features, k, v, state["s"], state["level"])
        for name in ("k", "v"):
            state[name][:chunk] = state[name][chunk:]

    def _near_and_far(
        self, q: Tensor, keys: Tensor, values: Tensor, held: int, far: tuple[Tensor, Tensor] | None, out: Tensor
    ) -> Parts:
        """Answer q (C, H, D), whose first stands behind `held` of the near keys (G, n, D), over these and the far sums."""
        if far is None:
            yield from self.softmax.dense(q, keys, values, held, True, out)
            return
        near = torch.empty(*q.shape[:2], 1, dtype=self._wide, device=q.device)
        yield from self.softmax.dense(q, keys, values, held, True, out, near)
        yield from self.sums.join(self.features, q, *far, near, out)

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        chunk = self.options.local_chunk
        if not chunk:
            return sums.state(self.shape, self.weights.shape[1])
        near = blocks.key_value_state(self.shape, max_tokens, 2 * chunk)
        return {**near, **sums.state(self.shape, self.weights.shape[1])} if max_tokens > 2 * chunk else near

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.shape.dtype, torch.float32)

    def law(self, queries: int, keys: int, *, causal: bool) -> Cost:
        shape, features = self.shape, self.weights.shape[1]
        if self.options.local_chunk:
            return self._chunks_cost(queries, keys)
        mapping = 2 * queries * (shape.query_heads + shape.key_value_heads) * shape.head_width * features
        workspace = self.sums.features_workspace_bytes(self.features, queries, causal)
        workspace += self.state_bytes(keys) if queries == keys else 0  # the sums of `attend`
        return Cost(mapping + sums.flops(shape, features, queries, causal), workspace, self.state_bytes(keys))

    def _chunks_cost(self, queries: int, keys: int) -> Cost:
        shape, features, chunk = self.shape, self.weights.shape[1], self.options.local_chunk
        per_token = 2 * features * (2 * shape.head_width + 1)  # of a head: features, and a product with the sums
        answer = queries * shape.query_heads * shape.head_width * shape.itemsize
        flops, workspace, at = 0, 0, keys - queries
        while at < keys:
            rows, held = min(keys - at, chunk - at % chunk), self._held(at)
            flops += 4 * shape.query_heads * shape.head_width * (rows * held + rows * (rows + 1) // 2)
            logs = rows * shape.query_heads * max(shape.itemsize, 4)
            near = self.softmax.dense_workspace_bytes(shape, queries, held + rows, asking=rows)
            if queries == 1:
                looked_at = blocks.rounded(held + 1, 2 * chunk)
                near = self.softmax.step_workspace_bytes(shape, looked_at, logs=held != at)
            workspace = max(workspace, near)
            if held != at:
                flops += per_token * shape.query_heads * rows
                far = self.sums.join_workspace_bytes(self.features, rows)
                workspace = max(workspace, near + logs, far + logs + answer)
            if self._is_full(at):
                flops += per_token * shape.key_value_heads * chunk
                workspace = max(workspace, self.sums.absorb_workspace_bytes(self.features, chunk) + answer)
            at += rows
        fresh = sum(spec.nbytes for spec in sums.state(shape, features).values()) if queries == keys else 0
        return Cost(flops, workspace + fresh, self.state_bytes(keys))
