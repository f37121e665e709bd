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

from attention import history
from attention.interface import MOST_SEED, AttentionBackend, BackendOptions
from attention.kernels import LOG2_E, features, implementation
from attention.kernels.features import Sums
from attention.kernels.library import Told
from attention.parts import Parts, finish, spread
from attention.pool import StateTensor
from attention.projection import projection
from attention.shapes import Cost, HeadShape


class PerformerOptions(BackendOptions):
    """How many random features, and which."""

    features: int = Field(256, ge=1, le=65536, description="random rows m; the variance of the kernel falls as 1/m")
    seed: int = Field(0, ge=0, le=MOST_SEED, description="of the random rows: the same seed, the same answers")
    hyperbolic: bool = Field(False, description="each row also with its sign turned: twice the state, half the variance")
    local_chunk: int = Field(
        0, description="tokens of a chunk; keys of a token's own and the neighbouring chunks weigh exactly; 0: none"
    )
    impl: implementation.CpuImpl = "auto"

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
        self.impl, self.features = implementation.features(options.impl, self.weights, half, shape)
        self.softmax = implementation.SOFTMAX[self.impl]  # how near keys are answered
        self.ring = history.Ring(options.local_chunk, options.local_chunk)  # a full one is turned: see `_turn`

    @property
    def edge(self) -> int:
        return max(1, 2 * self.options.local_chunk)

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor) -> Tensor:
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
        near = (i // self.options.local_chunk - j // self.options.local_chunk).abs() <= 1
        logs = torch.where(near, q @ k.transpose(-1, -2) * scale, weights.log2() + left_out)
        return (logs - logs.amax(-1, keepdim=True)).exp2()

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> Parts:
        fresh = Sums.fresh(self.shape, self.weights.shape[1])
        if not self.options.local_chunk:
            return (self.features.scan if causal else self.features.both_sides)(q, k, v, fresh, out)
        return (self._attend_chunks if causal else self._attend_both_sides)(q, k, v, fresh, out)

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        if self.options.local_chunk:
            return self._extend_chunks(q, k, v, past, state, out)
        return self.features.scan(q, k, v, Sums.of(state), out)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, past: Sequence[int], states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> None:
        if self.options.local_chunk:
            self._step_chunks(q, k, v, past, states, out)
        else:
            self.features.step(q, k, v, states, out)

    def told(self, past: Sequence[int], states: Sequence[dict[str, Tensor]]) -> Told | None:
        """None where a state is to be turned first, and where some of the sequences have far keys and others none."""
        if not self.options.local_chunk:
            return self.features.told(states)
        held = [self.ring.place(at) for at in past]
        is_far = {place != at for place, at in zip(held, past, strict=True)}
        if any(map(self._is_full, past)) or len(is_far) > 1:
            return None
        near = torch.empty(len(past), self.shape.query_heads, 1) if True in is_far else None
        found = self.softmax.told(self.shape, states, held, [at + 1 for at in held], log_total=near)
        return found if found is None or near is None else self.features.told(states, near, found)

    def _attend_chunks(self, q: Tensor, k: Tensor, v: Tensor, sums: Sums, out: Tensor) -> Parts:
        """A whole sequence with its near keys exactly; the sums begin empty."""
        chunk = self.options.local_chunk
        for a, b in spread(0, len(q), chunk):
            first = max(0, a - chunk)  # of the near keys
            if first:
                yield from self.features.absorb(k[first - chunk : first], v[first - chunk : first], sums)
            yield from self._near_and_far(q[a:b], k[first:b], v[first:b], a - first, sums if first else None, out[a:b])

    def _attend_both_sides(self, q: Tensor, k: Tensor, v: Tensor, sums: Sums, out: Tensor) -> Parts:
        """A whole sequence both ways, near keys exactly; sums of those before them run along first, then of those behind."""
        chunk, tokens = self.options.local_chunk, len(q)
        near = self._room_for_logs(q)
        chunks = list(spread(0, tokens, chunk))
        for a, b in chunks:
            first, last = max(0, a - chunk), min(tokens, b + chunk)
            yield from self.softmax.dense(q[a:b], k[first:last], v[first:last], a - first, False, out[a:b], near[a:b])
            if first:
                yield from self.features.absorb(k[first - chunk : first], v[first - chunk : first], sums)
                yield from self.features.join(q[a:b], sums, near[a:b], out[a:b])
        sums.clear()
        for a, b in reversed(chunks):
            if (last := b + chunk) < tokens:
                yield from self.features.absorb(k[last : last + chunk], v[last : last + chunk], sums)
                yield from self.features.join(q[a:b], sums, near[a:b], out[a:b])

    def _extend_chunks(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        """The same behind `past` tokens. The state keeps two chunks of keys and values and the sums of all before them."""
        for held, at, count in self.ring.runs(past, past + len(q)):
            part = slice(at - past, at - past + count)
            if self._is_full(at):
                yield from self._turn(state)
            keys, values = history.append(state, k[part], v[part], held)
            far = None if held == at else Sums.of(state)
            yield from self._near_and_far(q[part], keys, values, held, far, out[part])

    def _step_chunks(
        self, q: Tensor, k: Tensor, v: Tensor, past: Sequence[int], states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> None:
        """`_extend_chunks` by one token of each of B sequences."""
        for state, at in zip(states, past, strict=True):
            if self._is_full(at):
                finish(self._turn(state))
        held = [self.ring.place(at) for at in past]
        old = [i for i, at in enumerate(past) if held[i] != at]  # sequences that have far keys
        near = self._room_for_logs(q) if old else None
        history.append_step(states, k, v, held)
        self.softmax.step(q, states, [at + 1 for at in held], k.shape[1], out, near)
        if near is None:
            return
        everyone = len(old) == len(q)
        queries, near, answers = (x if everyone else x[old] for x in (q, near, out))
        self.features.join_step(queries, [states[i] for i in old], near, answers)
        if not everyone:
            out[old] = answers

    def _is_full(self, at: int) -> bool:
        """Whether the state holds two whole chunks when the token at position `at` comes."""
        return at >= 2 * self.options.local_chunk and at % self.options.local_chunk == 0

    def _turn(self, state: dict[str, Tensor]) -> Parts:
        """Move the older chunk of a full state into the sums, and the newer into its place."""
        chunk = self.options.local_chunk
        yield from self.features.absorb(*history.read(state, chunk, self.shape.key_value_heads), Sums.of(state))
        for name in ("k", "v"):
            state[name][:chunk] = state[name][chunk:]

    def _near_and_far(self, q: Tensor, keys: Tensor, values: Tensor, held: int, far: Sums | None, out: Tensor) -> Parts:
        """Answer q (C, H, D), whose first stands behind `held` of the near keys (N, G, D), over these and the far sums."""
        if far is None:
            yield from self.softmax.dense(q, keys, values, held, True, out)
            return
        near = self._room_for_logs(q)
        yield from self.softmax.dense(q, keys, values, held, True, out, near)
        yield from self.features.join(q, far, near, out)

    def runway(self, past: int) -> int:
        """With near chunks up to the end of one, where sums take the older in."""
        chunk = self.options.local_chunk
        return chunk - past % chunk if chunk else super().runway(past)

    def touched(self, state: dict[str, Tensor], position: int) -> Sequence[Tensor]:
        return () if self.options.local_chunk else super().touched(state, position)

    def cut(self, state: dict[str, Tensor], tokens: int, total: int) -> None:
        if self.options.local_chunk:
            first = self.ring.place(tokens)
            history.cut(state, first, first + total - tokens)

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        far = features.state(self.shape, self.weights.shape[1])
        if not self.options.local_chunk:
            return far
        near = history.keys_and_values(self.shape, max_tokens, self.ring.size)
        return {**near, **far} if max_tokens > self.ring.size else near

    def _room_for_logs(self, q: Tensor) -> Tensor:
        """Where the near weights of queries q (C, H, D) are summed up, as logarithms: (C, H, 1)."""
        return q.new_empty(*q.shape[:2], 1, dtype=torch.promote_types(self.shape.dtype, torch.float32))

    def law(self, queries: int, keys: int, *, causal: bool) -> Cost:
        shape, count = self.shape, self.weights.shape[1]
        if self.options.local_chunk:
            return self._chunks_cost(queries, keys) if causal else self._both_sides_cost(queries)
        mapping = 2 * queries * (shape.query_heads + shape.key_value_heads) * shape.head_width * count
        workspace = self.features.attend_bytes(queries, causal)
        workspace += self.state_bytes(keys) if queries == keys else 0  # the sums of `attend`
        return Cost(mapping + features.flops(shape, count, queries, causal), workspace, self.state_bytes(keys))

    @property
    def _far_flops(self) -> int:
        """Of a token of a head: its features, and their product with the sums."""
        count: int = self.weights.shape[1]
        return 2 * count * (2 * self.shape.head_width + 1)

    @property
    def _sums_bytes(self) -> int:
        return sum(spec.nbytes for spec in features.state(self.shape, self.weights.shape[1]).values())

    def _chunks_cost(self, queries: int, keys: int) -> Cost:
        shape, chunk = self.shape, self.options.local_chunk
        answer = queries * shape.query_heads * shape.head_width * shape.itemsize
        flops = workspace = 0
        for held, at, rows in self.ring.runs(keys - queries, keys):
            flops += 4 * shape.query_heads * shape.head_width * (rows * held + rows * (rows + 1) // 2)
            logs = rows * shape.query_heads * max(shape.itemsize, 4)
            near = self.softmax.dense_bytes(shape, queries, held + rows, asking=rows)
            if queries == 1:
                near = self.softmax.step_bytes(shape, history.rounded(held + 1, self.ring.size), logs=held != at)
            workspace = max(workspace, near)
            if held != at:
                flops += self._far_flops * shape.query_heads * rows
                far = self.features.join_bytes(rows)
                workspace = max(workspace, near + logs, far + logs + answer)
            if self._is_full(at):
                flops += self._far_flops * shape.key_value_heads * chunk
                workspace = max(workspace, self.features.absorb_bytes(chunk) + answer)
        fresh = self._sums_bytes if queries == keys else 0
        return Cost(flops, workspace + fresh, self.state_bytes(keys))

    def _both_sides_cost(self, tokens: int) -> Cost:
        shape, chunk = self.shape, self.options.local_chunk
        answer = tokens * shape.query_heads * shape.head_width * shape.itemsize
        logs = tokens * shape.query_heads * max(shape.itemsize, 4)
        flops, workspace = 0, 0
        for a, b in spread(0, tokens, chunk):
            first, last = max(0, a - chunk), min(tokens, b + chunk)
            flops += 4 * shape.query_heads * shape.head_width * (b - a) * (last - first)
            workspace = max(workspace, self.softmax.dense_bytes(shape, tokens, last - first, asking=b - a))
            for far in (first > 0, last < tokens):  # before the near keys, behind them
                flops += far * self._far_flops * (shape.query_heads * (b - a) + shape.key_value_heads * chunk)
                if far:
                    joining = max(self.features.join_bytes(b - a), self.features.absorb_bytes(chunk))
                    workspace = max(workspace, joining + answer)
        return Cost(flops, workspace + logs + self._sums_bytes, self.state_bytes(tokens))
