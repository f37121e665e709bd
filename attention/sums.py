"""Attention through a running sum, the kernel under every linear backend, in operators of torch: native's slow reading.

With positive features phi, attention is phi(q) S[:, :D] / phi(q) S[:, D] where S = sum_j phi(k_j) [v_j, 1] (Katharopoulos et
al., arXiv 2006.16236, equations 4 to 7). Causally the sum runs along the sequence: a chunk of tokens meets the sum of all
chunks before it and its own lower triangle. S is kept transposed, (G, D + 1, m), and in at least float32: it is a long sum.

Features are taken by their logarithms, so that no norm is too large for them. Feature r of S is short of 2^level_r, and the
first key it met set that level: its sum of weights is at least 1 from then on. A query takes its features relative to its
largest 2^(exponent + level), and multiplies that one by 1: no row's total is below 1, however q and k stand to each other, and
what underflows is at most 2^-46 of a row of 2^20 keys. A level rises only at a key that would pass it by 2^LIMIT. The chunk is
then answered in passes of one shape, before and from that key, so that earlier rows are the same to the bit whatever comes
later. A token that is no number begins a pass for the same reason: 0 x NaN is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from attention import blocks
from attention.interface import HeadShape, Parts, StateTensor

CHUNK = 128  # tokens answered together causally: their own triangle costs CHUNK per token, their state two products a chunk
BLOCK = 512  # tokens per product where there is no triangle
LIMIT = 60.0  # sums of 2^20 keys stay below 2^80, and their product with a value in the floats' range
REGISTERS = 64  # features of a step are padded to whole vector registers: exp2 of a loop's remainder differs in the last bit
LOG2_E = blocks.LOG2_E
State = tuple[Tensor, Tensor]  # s (G, D + 1, m) and level (G, 1, m), in at least float32


@dataclass(frozen=True)
class Logs:
    """Features phi = 2^exponents + lift of tokens, (..., m) each, in at least float32. No lift: 0."""

    exponents: Tensor
    lift: Tensor | None

    def times(self, log: Tensor) -> Tensor:
        """phi x 2^log."""
        features = (self.exponents + log).exp2_()
        return features if self.lift is None else features.addcmul_(self.lift, _factor(log.clone()))

    def asking(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """The features of queries by which they ask sums at a level, (..., m), and what they are short of, log2, (..., 1)."""
        features = self.exponents + level
        top = features.amax(-1, keepdim=True)
        features.sub_(top).exp2_()
        return features if self.lift is None else features.addcmul_(self.lift, _factor(level - top)), top


def _factor(log: Tensor) -> Tensor:
    """2^log, in place, for a lift: where that is not 0, log is at most LIMIT; elsewhere it may be inf, and 0 x inf is NaN."""
    return log.clamp_(max=LIMIT).exp2_()


class Features:
    """What features are.

    Args:
        weights: random rows W (D, m): phi(x) is 2^(x W - |x|^2 half). None: elu(x) + 1, and m is D.
        half: see `weights`.
        dtype: of the inputs.
    """

    def __init__(self, weights: Tensor | None, half: float, shape: HeadShape) -> None:
        self.shape = shape
        self.wide = torch.promote_types(shape.dtype, torch.float32)
        self.logs = 2 if weights is None else 1  # tensors of a `Logs`
        self.count = shape.head_width if weights is None else weights.shape[1]
        self.half = half
        self._padding = (0, -self.count % REGISTERS)
        self._weights = None if weights is None else functional.pad(weights.to(self.wide), self._padding)

    @property
    def product_bytes(self) -> int:
        """Of an element in the products."""
        return _multiplied(self.shape.dtype).itemsize

    @property
    def log_bytes(self) -> int:
        """Of a row's logs."""
        return self.logs * self.count * self.wide.itemsize

    @property
    def mapping_bytes(self) -> int:
        """Of a row while its logs are made: a tight copy, and where that is narrow a wide one."""
        narrow = self.wide.itemsize if self.shape.itemsize < self.wide.itemsize else 0
        return self.shape.head_width * (self.shape.itemsize + narrow) + self.log_bytes

    @property
    def adding_bytes(self) -> int:
        """Of a row's features beside its logs, while they are made and brought to the dtype of the products."""
        narrow = 0 if self.product_bytes == self.wide.itemsize else self.product_bytes
        return self.count * (self.wide.itemsize + narrow)

    @property
    def asking_bytes(self) -> int:
        """The same of a query's, whose lift has a factor of its own."""
        return max(self.adding_bytes, self.log_bytes)

    def queries(self, q: Tensor, groups: int) -> Logs:
        """Of (C, H, D), without |q|^2 half, which cancels: (G, RC, m)."""
        rows = blocks.query_rows(q, groups)
        if self._weights is None:
            return _elu(rows.to(self.wide))
        found = torch.mm(rows.view(-1, rows.shape[-1]).to(self.wide), self._weights[:, : self.count])
        return Logs(found.view(*rows.shape[:-1], -1), None)

    def keys(self, k: Tensor) -> Logs:
        """Of (C, G, D): (G, C, m)."""
        found = self.queries(k, k.shape[1])
        if self.half:
            found.exponents.sub_(self.half_squares(blocks.heads_first(k)))
        return found

    def half_squares(self, x: Tensor) -> Tensor:
        """|x|^2 half: (..., D) to (..., 1) in at least float32."""
        norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.wide)
        return norms.square_().mul_(self.half)

    def tokens(self, x: Tensor) -> Logs:
        """Of one token of each of B sequences, (B, h, D), without |x|^2 half: (B, h, m), padded.

        Each sequence has a product of its own, for MKL rounds a row by how many stand beside it.
        """
        x = x.to(self.wide)
        if self._weights is not None:
            return Logs(torch.stack([torch.mm(one, self._weights) for one in x]), None)
        return _elu(functional.pad(x, self._padding))

    def levels(self, states: Sequence[State]) -> Tensor:
        """(B, G, 1, m), padded as `tokens` is, with features that weigh nothing."""
        return functional.pad(torch.stack([level for _, level in states]), self._padding, value=-math.inf)


def state(shape: HeadShape, count: int) -> dict[str, StateTensor]:
    """The sums s (G, D + 1, m) of `count` features and the log2 of what each is short of, level (G, 1, m)."""
    heads, wide = shape.key_value_heads, torch.promote_types(shape.dtype, torch.float32)
    return {
        "s": StateTensor((heads, shape.head_width + 1, count), wide, 0.0),
        "level": StateTensor((heads, 1, count), wide, -math.inf),
    }


def _elu(x: Tensor) -> Logs:
    """elu(x) + 1 is e^x below zero and x + 1 above."""
    return Logs(x.clamp_max(0).mul_(LOG2_E), x.clamp_min(0))


def scan(features: Features, q: Tensor, k: Tensor, v: Tensor, s: Tensor, level: Tensor, out: Tensor) -> Parts:
    """Continue the sums over tokens in order, and answer each over those before it and itself.

    q, out: (C, H, D). k, v: (C, G, D). s: (G, D + 1, m) and level: (G, 1, m), both changed.
    """
    for a, b in blocks.spread(0, len(q), CHUNK):
        _chunk(features.queries(q[a:b], len(s)), features.keys(k[a:b]), k[a:b], v[a:b], s, level, out[a:b])
        yield


def both_sides(features: Features, q: Tensor, k: Tensor, v: Tensor, s: Tensor, level: Tensor, out: Tensor) -> Parts:
    """The same with all keys in the sums before the first query asks."""
    yield from absorb(features, k, v, s, level)
    for a, b in blocks.spread(0, len(q), BLOCK):
        _divide(_ask(s, features.queries(q[a:b], len(s)).asking(level)[0].to(_multiplied(q.dtype))), out[a:b])
        yield


def absorb(features: Features, k: Tensor, v: Tensor, s: Tensor, level: Tensor) -> Parts:
    """Add tokens to the sums: k, v (C, G, D)."""
    for a, b in blocks.spread(0, len(k), BLOCK):
        _absorb(features.keys(k[a:b]), v[a:b], s, level)
        yield


def join(features: Features, q: Tensor, s: Tensor, level: Tensor, near: Tensor, out: Tensor) -> Parts:
    """Add the keys in the sums to answers out (C, H, D) over other keys, whose weights sum to 2^near, (C, H, 1)."""
    for a, b in blocks.spread(0, len(q), BLOCK):
        _join(features, q[a:b], s, level, near[a:b], out[a:b])
        yield


def features_step(features: Features, q: Tensor, k: Tensor, v: Tensor, sums: Sequence[State], out: Tensor) -> None:
    """Add one token of each of B sequences to its sums and ask them. q, out: (B, H, D). k, v: (B, G, D)."""
    wide, heads, groups = features.wide, q.shape[1], k.shape[1]
    found = features.tokens(torch.cat((q, k), dim=1))  # all features of all sequences at once
    queries, keys = _part(found, slice(heads), groups), _part(found, slice(heads, None), groups)
    keys.exponents.sub_(features.half_squares(k)[..., None])
    level = features.levels(sums)
    if not (keys.exponents <= level + LIMIT)[..., : features.count].all():  # a NaN, too, is looked at sequence by sequence
        for (s, own), key in zip(sums, keys.exponents, strict=True):
            _raise(s, own, key[..., : features.count])
        level = features.levels(sums)
    asking, adding = (x[..., : features.count] for x in (queries.asking(level)[0], keys.times(-level)))
    values = functional.pad(v.to(wide), (0, 1), value=1.0)[..., None]
    both = asking.new_empty(*asking.shape[:3], values.shape[2])
    for (s, _), query, key, value, answer in zip(sums, asking, adding, values, both, strict=True):
        torch.baddbmm(s, value, key, out=s)
        torch.bmm(query, s.transpose(1, 2), out=answer)
    _divide_step(both, out)


def join_step(features: Features, q: Tensor, sums: Sequence[State], near: Tensor, out: Tensor) -> None:
    """`join` of one token of each of B sequences: q, out (B, H, D), near (B, H, 1)."""
    queries = _part(features.tokens(q), slice(None), len(sums[0][0]))
    asking, top = queries.asking(features.levels(sums))
    asking = asking[..., : features.count]
    both = asking.new_empty(*asking.shape[:3], q.shape[-1] + 1)
    for (s, _), query, answer in zip(sums, asking, both, strict=True):
        torch.bmm(query, s.transpose(1, 2), out=answer)
    log = top.flatten(1, 2) - features.half_squares(q) - math.log2(features.count)
    _mix(both.flatten(1, 2), log, near, out)


def flops(shape: HeadShape, count: int, queries: int, causal: bool) -> int:
    """Products of `queries` tokens: each key-value head adds to its sum, each query head asks it; causally the triangles."""
    columns = shape.head_width + 1
    chunk = min(queries, CHUNK)
    each = (shape.query_heads + shape.key_value_heads) * count * columns
    return 2 * queries * (each + (shape.query_heads * chunk * (count + columns) if causal else 0))


def features_workspace_bytes(features: Features, queries: int, causal: bool) -> int:
    """Peak temporaries of `scan` and `both_sides`, and for one query of `features_step`, the answer included."""
    shape, size, sums = features.shape, features.product_bytes, _sums_bytes(features)
    answer = queries * shape.query_heads * shape.head_width * shape.itemsize
    if queries == 1:
        return answer + _step_bytes(features, shape.query_heads + shape.key_value_heads)
    if not causal:
        return answer + max(absorb_workspace_bytes(features, queries), _ask_bytes(features, queries))
    tokens, columns = min(queries, CHUNK), shape.head_width + 1
    asked, added = shape.query_heads * tokens, shape.key_value_heads * tokens  # rows of queries and of keys
    logs = (asked + added) * features.log_bytes
    keys = added * (features.count + columns) * size
    triangle = asked * (tokens + 2 * columns) * size
    adding = sums + asked * columns * size
    asking = keys + max(asked * features.asking_bytes, asked * features.count * size + max(triangle, adding))
    return answer + max(asked * features.mapping_bytes, logs + asking)


def absorb_workspace_bytes(features: Features, tokens: int) -> int:
    """Peak temporaries of `absorb`."""
    added, columns = features.shape.key_value_heads * min(tokens, BLOCK), features.shape.head_width + 1
    adding = added * (features.count + columns) * features.product_bytes + _sums_bytes(features)
    return max(added * features.mapping_bytes, added * features.log_bytes + max(added * features.adding_bytes, adding))


def join_workspace_bytes(features: Features, tokens: int) -> int:
    """Peak temporaries of `join`, for one token of `join_step`."""
    if tokens == 1:
        return _step_bytes(features, features.shape.query_heads)
    return _ask_bytes(features, tokens, features.wide.itemsize)


def _ask_bytes(features: Features, tokens: int, joining: int = 0) -> int:
    """Of the queries of a block that ask sums which stand, and join their answers in a dtype of so many bytes."""
    shape, size = features.shape, features.product_bytes
    asked, columns = shape.query_heads * min(tokens, BLOCK), shape.head_width + 1
    held = features.count * (size + (features.wide.itemsize if joining and size < features.wide.itemsize else 0))
    narrow = _sums_bytes(features) // 3 if size < features.wide.itemsize else 0
    return asked * max(features.mapping_bytes, 2 * features.log_bytes, held + columns * (size + joining)) + narrow


def _step_bytes(features: Features, heads: int) -> int:
    """Of one token, whose features are padded."""
    padded = -(-features.count // REGISTERS) * REGISTERS
    return (3 * features.logs * heads + 2 * features.shape.key_value_heads) * padded * features.wide.itemsize


def _sums_bytes(features: Features) -> int:
    """What a chunk adds to the sums, in the dtype of the product, and where that is narrow in theirs."""
    size, wide = features.product_bytes, features.wide.itemsize
    return (
        features.shape.key_value_heads
        * (features.shape.head_width + 1)
        * features.count
        * (size + (wide if size < wide else 0))
    )


def _part(found: Logs, heads: slice, groups: int) -> Logs:
    """Some heads of (B, h, m) as (B, G, R, m)."""
    lift = None if found.lift is None else found.lift[:, heads].unflatten(1, (groups, -1))
    return Logs(found.exponents[:, heads].unflatten(1, (groups, -1)), lift)


def _chunk(queries: Logs, keys: Logs, k: Tensor, v: Tensor, s: Tensor, level: Tensor, out: Tensor) -> None:
    """Answer one chunk causally and add it to the sums, in passes that end before a token which may not be in them."""
    values, done, dtype = _values_with_ones(v), 0, _multiplied(v.dtype)
    ends = ~(k.isfinite() & v.isfinite()).flatten(1).all(1)
    while done < len(v):
        _raise(s, level, keys.exponents[:, done : done + 1])
        stop = _first(ends | (keys.exponents > level + LIMIT).any(-1).any(0), done + 1)
        adding = _only(keys.times(-level).to(dtype), done, stop)
        both = _scan(s, queries.asking(level)[0].to(dtype), adding, _only(values, done, stop))
        _divide(both, out, done, stop)
        done = stop


def _absorb(keys: Logs, v: Tensor, s: Tensor, level: Tensor) -> None:
    """Add a block of tokens to the sums."""
    _raise(s, level, keys.exponents.amax(1, keepdim=True))
    _add(s, keys.times(-level).to(_multiplied(v.dtype)), _values_with_ones(v))


def _join(features: Features, q: Tensor, s: Tensor, level: Tensor, near: Tensor, out: Tensor) -> None:
    """`join` of a block of tokens."""
    asking, top = features.queries(q, len(s)).asking(level)
    both = blocks.tokens_first(_ask(s, asking.to(_multiplied(q.dtype))), len(q))
    log = blocks.tokens_first(top, len(q)) - features.half_squares(q) - math.log2(features.count)
    _mix(both, log, near, out)


def _first(found: Tensor, start: int) -> int:
    """The first index from `start` on at which a bool (C,) is true; C when there is none."""
    found = found[start:]
    return start + (int(found.int().argmax()) if found.any() else len(found))


def _only(x: Tensor, first: int, last: int) -> Tensor:
    """x (G, C, ...) with zeros for all tokens but first..last."""
    if (first, last) == (0, x.shape[1]):
        return x
    kept = torch.zeros_like(x)
    kept[:, first:last] = x[:, first:last]
    return kept


def _raise(s: Tensor, level: Tensor, exponents: Tensor) -> None:
    """Raise the levels (G, 1, m) that keys of these exponents would pass by 2^LIMIT, and the sums with them, in place."""
    above = exponents > level + LIMIT
    if above.any():
        s *= torch.where(above, level - exponents, 0.0).exp2_()
        level.copy_(torch.where(above, exponents, level))


def _multiplied(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the products: float16 has no room for 2^LIMIT."""
    return torch.float32 if dtype == torch.float16 else dtype


def _values_with_ones(v: Tensor) -> Tensor:
    """[v, 1]: (C, G, D) to (G, C, D + 1)."""
    count, groups, width = v.shape
    values = torch.empty(groups, count, width + 1, dtype=_multiplied(v.dtype), device=v.device)
    values[..., :width] = v.transpose(0, 1)
    values[..., width:] = 1.0
    return values


def _add(s: Tensor, keys: Tensor, values: Tensor) -> None:
    """Add phi(k) [v, 1] of keys (G, C, m) and values (G, C, D + 1) to s (G, D + 1, m), in place."""
    s += torch.bmm(values.transpose(1, 2), keys)


def _ask(s: Tensor, queries: Tensor) -> Tensor:
    """phi(q) S: queries (G, RC, m) to (G, RC, D + 1)."""
    return torch.bmm(queries, s.to(queries.dtype).transpose(1, 2))


def _triangle(queries: Tensor, keys: Tensor) -> Tensor:
    """phi(q).phi(k) of a chunk with itself, zero above the diagonal: (G, RC, m) and (G, C, m) to (G, RC, C)."""
    groups, count, _ = keys.shape
    products = torch.bmm(queries, keys.transpose(1, 2))
    return products.view(groups, -1, count, count).tril_().view(groups, -1, count)


def _scan(s: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Answer a chunk over s and itself, causally, and add it to s: (G, RC, D + 1), numerator and denominator."""
    both = _ask(s, queries)
    both += torch.bmm(_triangle(queries, keys), values)
    _add(s, keys, values)
    return both


def _divide(both: Tensor, out: Tensor, first: int = 0, last: int | None = None) -> None:
    """Numerator over denominator, (G, RC, D + 1), into the tokens first..last of out (C, H, D)."""
    count, _, width = out.shape
    both = both.view(both.shape[0], -1, count, width + 1)[:, :, first:last]
    answer = out.view(count, both.shape[0], -1, width).permute(1, 2, 0, 3)[:, :, first:last]
    torch.div(both[..., :width], both[..., width:], out=answer)


def _divide_step(both: Tensor, out: Tensor) -> None:
    """Numerator over denominator, (B, G, R, D + 1), into out (B, H, D)."""
    width = out.shape[-1]
    torch.div(both[..., :width], both[..., width:], out=out.view(*both.shape[:3], width))


def _mix(both: Tensor, log: Tensor, near: Tensor, out: Tensor) -> None:
    """Add far keys, numerator and denominator (C, H, D + 1) short of 2^log, to answers out (C, H, D) of weights 2^near."""
    far = both[..., -1:].to(log.dtype).log2() + log
    share = torch.sigmoid((far - near) / LOG2_E).to(out.dtype)
    out.lerp_((both[..., :-1] / both[..., -1:]).to(out.dtype), share)
