"""FAVOR+ (Choromanski et al., Performer, arXiv 2009.14794, sections 2.2 to 2.4): softmax attention through random features.

phi(x) = m^(-1/2) exp(W x' - |x'|^2 / 2) with x' = x / D^(1/4) has E[phi(q).phi(k)] = exp(q.k / sqrt D), with relative variance
(e^w - 1) / m at w = |q' + k'|^2 (Lemma 2). Attention is then two matrix products through S = sum_j phi(k_j) [v_j, 1]: cost per
token O(m), state one (m, D + 1) matrix per key-value head, kept in float32 because it is a long sum.

With `local_chunk` the keys near a token are taken out of the estimate and weighed exactly, since they matter most and the
estimate is worst where weights are large (Scatterbrain, Chen et al., arXiv 2110.15343, section 4; the chunks are the terraces
of LoLCATs, Zhang et al., arXiv 2410.10254, section 3.2). Both parts estimate the same exp, so they are added as they are.

What cancels between numerator and denominator is never computed: m^(-1/2) and the query's |q'|^2 / 2. The key's is a weight on
its value. Where we part from the paper's code: rows of W are Haar (`projection`), no epsilon is added to the features, and
the stabiliser of the keys looks at no later key (`_scan`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional

from attention import blocks, implementation, native, sums
from attention.interface import MOST_SEED, AttentionBackend, BackendOptions, Cost, HeadShape, Parts, StateTensor, finish

LOG2_E = blocks.LOG2_E
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
        # Of a step: whole vector registers, for exp2 of what stands in a loop's remainder differs in the last bit.
        self.step_weights = functional.pad(self.weights, (0, -scaled.shape[0] % 64))
        self.reach = REACH / float(scaled.double().norm(dim=1).max())  # norm of x up to which no exponent passes REACH
        self.wide = torch.promote_types(shape.dtype, torch.float32)
        self.half = LOG2_E / (2 * math.sqrt(shape.head_width))  # |x|^2 times this is |x'|^2 / 2 in powers of two
        self.impl = implementation.settle(options.impl, shape, no_native=native.no_features(scaled.shape[0]))
        self.softmax = implementation.softmax(self.impl)  # how near keys are answered
        is_native = self.impl == "native"
        self.native = native.Features.of(self.weights, self.half, self.reach, REACH) if is_native else None

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
        query_shift, key_shift = queries.amax(-1, keepdim=True), keys.amax((-1, -2), keepdim=True)
        weights: Tensor = (queries - query_shift).exp2() @ (keys - key_shift).exp2().transpose(-1, -2)
        if not self.options.local_chunk:
            return weights
        # The factors that are left out above, for here the sum meets weights that are whole.
        left_out = query_shift + key_shift - q.square().sum(-1, keepdim=True) * (scale / 2) - math.log2(rows.shape[1])
        near = i // self.options.local_chunk - j // self.options.local_chunk <= 1
        logs = torch.where(near, q @ k.transpose(-1, -2) * scale, weights.log2() + left_out)
        top = logs.masked_fill(j > i, -math.inf).amax(-1, keepdim=True)
        return (logs - top).clamp_max(0).exp2()  # of keys behind the query, whose weights the causal answer leaves out, any

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
        fresh = {name: spec.new(q.device) for name, spec in self._sums().items()}
        if self.options.local_chunk:
            return self._attend_chunks(q, k, v, fresh["s"], fresh["scale"], out)
        if self.native is not None:
            return (native.scan if causal else native.both_sides)(self.native, q, k, v, fresh["s"], fresh["scale"], out)
        return (self._scan if causal else self._both_sides)(q, k, v, fresh["s"], fresh["scale"], out)

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        if self.options.local_chunk:
            return self._extend_chunks(q, k, v, past, state, out)
        if self.native is not None:
            return native.scan(self.native, q, k, v, state["s"], state["scale"], out)
        return self._scan(q, k, v, state["s"], state["scale"], out)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, past: Sequence[int], states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> None:
        if self.options.local_chunk:
            self._step_chunks(q, k, v, past, states, out)
            return
        if self.native is not None:
            native.features_step(self.native, q, k, v, [(state["s"], state["scale"]) for state in states], out)
            return
        heads, groups = self.shape.query_heads, self.shape.key_value_heads
        exponents, shift, norm = self._step_exponents(torch.cat((q, k), dim=1))  # all features of all sequences at once
        half = norm[:, heads:].square() * self.half  # (B, G, 1), |k'|^2 / 2
        weight = -half if shift is None else shift[:, heads:] - half
        scale = torch.stack([state["scale"] for state in states])[..., 0]  # (B, G, 1)
        if not (weight - scale).amax().item() <= REACH:  # a NaN, too, is looked at sequence by sequence
            for state, old, new in zip(states, scale, weight, strict=True):
                _rescale(state["s"], state["scale"], torch.where(new > old + REACH, new, old)[..., None])
            scale = torch.stack([state["scale"] for state in states])[..., 0]
        exponents[:, heads:].add_(weight - scale)  # the key's weight on its value, taken on its features
        features = exponents.exp2_()[..., : self.weights.shape[1]]
        values = functional.pad(v.to(self.wide), (0, 1), value=1.0)[..., None]
        queries, keys = features[:, :heads].unflatten(1, (groups, -1)), features[:, heads:, None]
        sums.step(queries, keys, values, [state["s"] for state in states], out)

    def _step_exponents(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """x W - a of x (B, h, D) in at least float32, padded to `step_weights`, with a (None: zeros) and |x|, (B, h, 1)."""
        if x.dtype == self.wide:  # MKL rounds a row by how many stand beside it, so each sequence has its own product
            exponents = torch.stack([torch.mm(one, self.step_weights) for one in x])
        else:  # oneDNN does not
            exponents = torch.mm(x.view(-1, x.shape[-1]), self.step_weights).to(self.wide).view(*x.shape[:2], -1)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.wide)
        if norm.amax().item() <= self.reach:
            return exponents, None, norm
        shift = torch.where(norm <= self.reach, 0.0, exponents.amax(-1, keepdim=True))
        return exponents.sub_(shift), shift, norm

    def _attend_chunks(self, q: Tensor, k: Tensor, v: Tensor, s: Tensor, scale: Tensor, out: Tensor) -> Parts:
        """A whole sequence with its near keys exactly; s and scale begin empty."""
        chunk = self.options.local_chunk
        for a, b in blocks.spread(0, len(q), chunk):
            first = max(0, a - chunk)  # of the near keys
            if first:
                yield from self._absorb_chunk(k[first - chunk : first], v[first - chunk : first], s, scale)
            keys, values = blocks.heads_first(k[first:b]), blocks.heads_first(v[first:b])
            yield from self._near_and_far(q[a:b], keys, values, a - first, (s, scale) if first else None, out[a:b])

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
            far = None if held == at else (state["s"], state["scale"])
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
        near = q.new_empty(*q.shape[:2], 1, dtype=self.wide) if old else None
        blocks.put_step(states, k, v, held)
        self.softmax.step(q, states, [at + 1 for at in held], k.shape[1], out, near)
        if near is None:
            return
        everyone = len(old) == len(q)
        queries, near, answers = (x if everyone else x[old] for x in (q, near, out))
        if self.native is not None:
            native.join_step(self.native, queries, [(states[i]["s"], states[i]["scale"]) for i in old], near, answers)
        else:
            self._join_step(queries, [states[i] for i in old], near, answers)
        if not everyone:
            out[old] = answers

    def _join_step(self, queries: Tensor, states: Sequence[dict[str, Tensor]], near: Tensor, out: Tensor) -> None:
        """Add the far keys of each of B sequences to its answer, out (B, H, D); see `_mix`."""
        exponents, shift, norm = self._step_exponents(queries)
        features = exponents.exp2_()[..., : self.weights.shape[1]].unflatten(1, (self.shape.key_value_heads, -1))
        both = features.new_empty(*features.shape[:3], queries.shape[-1] + 1)
        for state, answer, mine in zip(states, both, features, strict=True):
            torch.bmm(mine, state["s"].transpose(1, 2), out=answer)
        scale = torch.stack([state["scale"] for state in states]).expand(-1, -1, features.shape[2], -1).flatten(1, 2)
        level = scale - norm.square() * self.half if shift is None else scale + shift - norm.square() * self.half
        self._mix(both.flatten(1, 2), level, near, out)

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
        yield from self._absorb_chunk(k, v, state["s"], state["scale"])
        for name in ("k", "v"):
            state[name][:chunk] = state[name][chunk:]

    def _absorb_chunk(self, k: Tensor, v: Tensor, s: Tensor, scale: Tensor) -> Parts:
        if self.native is not None:
            yield from native.absorb(self.native, k, v, s, scale)
            return
        for a, b in blocks.spread(0, len(k), sums.BLOCK):
            self._absorb(k[a:b], v[a:b], s, scale)
            yield

    def _near_and_far(
        self, q: Tensor, keys: Tensor, values: Tensor, held: int, far: tuple[Tensor, Tensor] | None, out: Tensor
    ) -> Parts:
        """Answer q (C, H, D), whose first stands behind `held` of the near keys (G, n, D), over these and the far sums."""
        if far is None:
            yield from self.softmax.dense(q, keys, values, held, True, out)
            return
        s, scale = far
        near = q.new_empty(*q.shape[:2], 1, dtype=self.wide)
        yield from self.softmax.dense(q, keys, values, held, True, out, near)
        if self.native is not None:
            yield from native.join(self.native, q, s, scale, near, out)
            return
        for a, b in blocks.spread(0, len(q), sums.BLOCK):
            features, shift, norm = self.features(blocks.query_rows(q[a:b], len(s)))
            both = sums.ask(s, features)  # (G, RC, D + 1)
            level = scale + shift - norm.square() * self.half
            self._mix(blocks.tokens_first(both, b - a), blocks.tokens_first(level, b - a), near[a:b], out[a:b])
            yield

    def _mix(self, both: Tensor, level: Tensor, near: Tensor, out: Tensor) -> None:
        """Add the far keys to answers out (C, H, D) whose sums of weights are 2^near, (C, H, 1).

        `both` (C, H, D + 1) are the far numerator and denominator, short of 2^level / m, level (C, H, 1).
        """
        total = both[..., -1:]
        far = total.to(self.wide).log2() + level - math.log2(self.weights.shape[1])
        share = torch.sigmoid((far - near) / LOG2_E).to(out.dtype)
        out.lerp_((both[..., :-1] / total.clamp_min(torch.finfo(total.dtype).tiny)).to(out.dtype), share)

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
                values = sums.values_with_ones(v, torch.exp2(weight - scale))
                own = keys if stop - done == len(v) else keys.clone()
                for x in (own, values):  # not by a factor: a key that is still to come may be no number
                    x[:, :done], x[:, stop:] = 0.0, 0.0
                both = sums.scan(s, queries, own, values)
                sums.divide(both, out, done, stop)
            if stop < len(v):
                risen = weight[:, stop : stop + 1]
                _rescale(s, scale, torch.where(risen > scale + REACH, risen, scale))
            done = stop

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        chunk = self.options.local_chunk
        if not chunk:
            return self._sums()
        near = blocks.key_value_state(self.shape, max_tokens, 2 * chunk)
        return {**near, **self._sums()} if max_tokens > 2 * chunk else near

    def _sums(self) -> dict[str, StateTensor]:
        """s, (G, D + 1, m), and the log2 of what it is short of, (G, 1, 1)."""
        heads = self.shape.key_value_heads
        sums_shape = (heads, self.shape.head_width + 1, self.weights.shape[1])
        return {"s": StateTensor(sums_shape, self.wide, 0.0), "scale": StateTensor((heads, 1, 1), self.wide, -math.inf)}

    def law(self, queries: int, keys: int, *, causal: bool) -> Cost:
        shape, features = self.shape, self.weights.shape[1]
        if self.options.local_chunk:
            return self._chunks_cost(queries, keys)
        mapping = 2 * queries * (shape.query_heads + shape.key_value_heads) * shape.head_width * features
        if self.native is not None:
            workspace = native.features_workspace_bytes(shape, features, queries)
        else:
            workspace = sums.workspace_bytes(shape, features, queries, causal)
        return Cost(mapping + sums.flops(shape, features, queries, causal), workspace, self.state_bytes(keys))

    def _far_bytes(self, rows: int, adds: bool) -> int:
        """Peak temporaries of asking the sums for `rows` tokens and, where a full state is turned, of adding a chunk."""
        features = self.weights.shape[1]
        if self.native is None:
            return sums.workspace_bytes(self.shape, features, rows, causal=False)
        tokens = self.options.local_chunk if adds else rows
        return native.features_scratch_bytes(self.shape, features, tokens, adds=adds)

    def _chunks_cost(self, queries: int, keys: int) -> Cost:
        shape, features, chunk = self.shape, self.weights.shape[1], self.options.local_chunk
        per_token = 2 * features * (2 * shape.head_width + 1)  # of a head: features, and a product with the sums
        flops, workspace, at = 0, 0, keys - queries
        while at < keys:
            rows, held = min(keys - at, chunk - at % chunk), self._held(at)
            flops += 4 * shape.query_heads * shape.head_width * (rows * held + rows * (rows + 1) // 2)
            flops += per_token * (shape.query_heads * rows if held != at else 0)
            flops += per_token * (shape.key_value_heads * chunk if self._is_full(at) else 0)
            near = self.softmax.dense_workspace_bytes(shape, queries, held + rows, asking=rows)
            far = 0 if held == at else self._far_bytes(rows, self._is_full(at))
            workspace = max(workspace, near, far + queries * shape.query_heads * shape.head_width * shape.itemsize)
            at += rows
        return Cost(flops, workspace, self.state_bytes(keys))


def _first_above(weight: Tensor, limit: Tensor, start: int) -> int:
    """The first token from `start` on whose weight (G, C, 1) is above its group's limit (G, 1, 1); C when there is none."""
    above = (weight[:, start:] > limit).any(0).flatten()
    return start + int(above.int().argmax()) if above.any() else weight.shape[1]


def _rescale(s: Tensor, scale: Tensor, new: Tensor) -> None:
    """Move the sums from one scale to another, in place. An empty state (scale -inf) is zeros and stays so."""
    s *= torch.exp2(scale - new)
    scale.copy_(new)
