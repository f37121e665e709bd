"""Attention through features in operators of torch: it runs anywhere, and is the slow reading of `native`.

Chunks of tokens, or blocks where there is no triangle, meet the sums in products of a few thousand columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from attention.kernels import LOG2_E
from attention.kernels.features import CHUNK, LIMIT, Sums
from attention.kernels.library import Told
from attention.kernels.softmax.streaming import query_rows, tokens_first
from attention.parts import Parts, spread
from attention.shapes import HeadShape

BLOCK = 512  # tokens per product where there is no triangle
REGISTERS = 64  # features of a step are padded to whole vector registers: exp2 of a loop's remainder differs in the last bit


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
    """`features.Features`."""

    def __init__(self, weights: Tensor | None, half: float, shape: HeadShape) -> None:
        self.shape = shape
        self.wide = torch.promote_types(shape.dtype, torch.float32)
        self.logs = 2 if weights is None else 1  # tensors of a `Logs`
        self.count = shape.head_width if weights is None else weights.shape[1]
        self.half = half
        self._padding = (0, -self.count % REGISTERS)
        self._weights = None if weights is None else functional.pad(weights.to(self.wide), self._padding)

    def scan(self, q: Tensor, k: Tensor, v: Tensor, sums: Sums, out: Tensor) -> Parts:
        for a, b in spread(0, len(q), CHUNK):
            _chunk(self.queries(q[a:b], k.shape[1]), self.keys(k[a:b]), k[a:b], v[a:b], sums, out[a:b])
            yield

    def both_sides(self, q: Tensor, k: Tensor, v: Tensor, sums: Sums, out: Tensor) -> Parts:
        yield from self.absorb(k, v, sums)
        for a, b in spread(0, len(q), BLOCK):
            _divide(_ask(sums.s, self.queries(q[a:b], k.shape[1]).asking(sums.level)[0].to(_multiplied(q.dtype))), out[a:b])
            yield

    def absorb(self, k: Tensor, v: Tensor, sums: Sums) -> Parts:
        for a, b in spread(0, len(k), BLOCK):
            _absorb(self.keys(k[a:b]), v[a:b], sums)
            yield

    def join(self, q: Tensor, sums: Sums, near: Tensor, out: Tensor) -> Parts:
        for a, b in spread(0, len(q), BLOCK):
            self._join(q[a:b], sums, near[a:b], out[a:b])
            yield

    def step(self, q: Tensor, k: Tensor, v: Tensor, states: Sequence[dict[str, Tensor]], out: Tensor) -> None:
        sums = [Sums.of(state) for state in states]
        wide, heads, groups = self.wide, q.shape[1], k.shape[1]
        found = self.tokens(torch.cat((q, k), dim=1))  # all features of all sequences at once
        queries, keys = _part(found, slice(heads), groups), _part(found, slice(heads, None), groups)
        keys.exponents.sub_(self.half_squares(k)[..., None])
        level = self.levels(sums)
        if not (keys.exponents <= level + LIMIT)[..., : self.count].all():  # a NaN, too, is looked at sequence by sequence
            for own, key in zip(sums, keys.exponents, strict=True):
                _raise(own, key[..., : self.count])
            level = self.levels(sums)
        asking, adding = (x[..., : self.count] for x in (queries.asking(level)[0], keys.times(-level)))
        values = functional.pad(v.to(wide), (0, 1), value=1.0)[..., None]
        both = asking.new_empty(*asking.shape[:3], values.shape[2])
        for (s, _), query, key, value, answer in zip(sums, asking, adding, values, both, strict=True):
            torch.baddbmm(s, value, key, out=s)
            torch.bmm(query, s.transpose(1, 2), out=answer)
        _divide_step(both, out)

    def join_step(self, q: Tensor, states: Sequence[dict[str, Tensor]], near: Tensor, out: Tensor) -> None:
        sums = [Sums.of(state) for state in states]
        queries = _part(self.tokens(q), slice(None), len(sums[0].s))
        asking, top = queries.asking(self.levels(sums))
        asking = asking[..., : self.count]
        both = asking.new_empty(*asking.shape[:3], q.shape[-1] + 1)
        for (s, _), query, answer in zip(sums, asking, both, strict=True):
            torch.bmm(query, s.transpose(1, 2), out=answer)
        log = top.flatten(1, 2) - self.half_squares(q) - math.log2(self.count)
        _mix(both.flatten(1, 2), log, near, out)

    def _join(self, q: Tensor, sums: Sums, near: Tensor, out: Tensor) -> None:
        """`join` of a block of tokens."""
        asking, top = self.queries(q, len(sums.s)).asking(sums.level)
        both = tokens_first(_ask(sums.s, asking.to(_multiplied(q.dtype))), len(q))
        log = tokens_first(top, len(q)) - self.half_squares(q) - math.log2(self.count)
        _mix(both, log, near, out)

    def queries(self, q: Tensor, groups: int) -> Logs:
        """Of (C, H, D), without |q|^2 half, which cancels: (G, RC, m)."""
        rows = query_rows(q, groups)
        if self._weights is None:
            return _elu(rows.to(self.wide))
        found = torch.mm(rows.view(-1, rows.shape[-1]).to(self.wide), self._weights[:, : self.count])
        return Logs(found.view(*rows.shape[:-1], -1), None)

    def keys(self, k: Tensor) -> Logs:
        """Of (C, G, D): (G, C, m)."""
        found = self.queries(k, k.shape[1])
        if self.half:
            found.exponents.sub_(self.half_squares(k.transpose(0, 1)))
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

    def levels(self, states: Sequence[Sums]) -> Tensor:
        """(B, G, 1, m), padded as `tokens` is, with features that weigh nothing."""
        return functional.pad(torch.stack([level for _, level in states]), self._padding, value=-math.inf)

    def told(self, states: Sequence[dict[str, Tensor]], near: Tensor | None = None, other: Told | None = None) -> Told | None:
        return None

    def attend_bytes(self, queries: int, causal: bool) -> int:
        shape, size, sums = self.shape, self.product_bytes, self._sums_bytes()
        answer = queries * shape.query_heads * shape.head_width * shape.itemsize
        if queries == 1:
            return answer + self._step_bytes(shape.query_heads + shape.key_value_heads)
        if not causal:
            return answer + max(self.absorb_bytes(queries), self._ask_bytes(queries))
        tokens, columns = min(queries, CHUNK), shape.head_width + 1
        asked, added = shape.query_heads * tokens, shape.key_value_heads * tokens  # rows of queries and of keys
        logs = (asked + added) * self.log_bytes
        keys = added * (self.count + columns) * size
        triangle = asked * (tokens + 2 * columns) * size
        adding = sums + asked * columns * size
        asking = keys + max(asked * self.asking_bytes, asked * self.count * size + max(triangle, adding))
        return answer + max(asked * self.mapping_bytes, logs + asking)

    def absorb_bytes(self, tokens: int) -> int:
        added, columns = self.shape.key_value_heads * min(tokens, BLOCK), self.shape.head_width + 1
        adding = added * (self.count + columns) * self.product_bytes + self._sums_bytes()
        return max(added * self.mapping_bytes, added * self.log_bytes + max(added * self.adding_bytes, adding))

    def join_bytes(self, tokens: int) -> int:
        if tokens == 1:
            return self._step_bytes(self.shape.query_heads)
        return self._ask_bytes(tokens, self.wide.itemsize)

    def _ask_bytes(self, tokens: int, joining: int = 0) -> int:
        """Of the queries of a block that ask sums which stand, and join their answers in a dtype of so many bytes."""
        shape, size = self.shape, self.product_bytes
        asked, columns = shape.query_heads * min(tokens, BLOCK), shape.head_width + 1
        held = self.count * (size + (self.wide.itemsize if joining and size < self.wide.itemsize else 0))
        narrow = self._sums_bytes() // 3 if size < self.wide.itemsize else 0
        return asked * max(self.mapping_bytes, 2 * self.log_bytes, held + columns * (size + joining)) + narrow

    def _step_bytes(self, heads: int) -> int:
        """Of one token, whose features are padded."""
        padded = -(-self.count // REGISTERS) * REGISTERS
        return (3 * self.logs * heads + 2 * self.shape.key_value_heads) * padded * self.wide.itemsize

    def _sums_bytes(self) -> int:
        """What a chunk adds to the sums, in the dtype of the product, and where that is narrow in theirs."""
        size, wide = self.product_bytes, self.wide.itemsize
        return self.shape.key_value_heads * (self.shape.head_width + 1) * self.count * (size + (wide if size < wide else 0))

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


def _elu(x: Tensor) -> Logs:
    """elu(x) + 1 is e^x below zero and x + 1 above."""
    return Logs(x.clamp_max(0).mul_(LOG2_E), x.clamp_min(0))


def _part(found: Logs, heads: slice, groups: int) -> Logs:
    """Some heads of (B, h, m) as (B, G, R, m)."""
    lift = None if found.lift is None else found.lift[:, heads].unflatten(1, (groups, -1))
    return Logs(found.exponents[:, heads].unflatten(1, (groups, -1)), lift)


def _chunk(queries: Logs, keys: Logs, k: Tensor, v: Tensor, sums: Sums, out: Tensor) -> None:
    """Answer one chunk causally and add it to the sums, in passes that end before a token which may not be in them."""
    values, done, dtype = _values_with_ones(v), 0, _multiplied(v.dtype)
    ends = ~(k.isfinite() & v.isfinite()).flatten(1).all(1)
    while done < len(v):
        _raise(sums, keys.exponents[:, done : done + 1])
        stop = _first(ends | (keys.exponents > sums.level + LIMIT).any(-1).any(0), done + 1)
        adding = _only(keys.times(-sums.level).to(dtype), done, stop)
        both = _scan(sums.s, queries.asking(sums.level)[0].to(dtype), adding, _only(values, done, stop))
        _divide(both, out, done, stop)
        done = stop


def _absorb(keys: Logs, v: Tensor, sums: Sums) -> None:
    """Add a block of tokens to the sums."""
    _raise(sums, keys.exponents.amax(1, keepdim=True))
    _add(sums.s, keys.times(-sums.level).to(_multiplied(v.dtype)), _values_with_ones(v))


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


def _raise(sums: Sums, exponents: Tensor) -> None:
    """Raise the levels (G, 1, m) that keys of these exponents would pass by 2^LIMIT, and the sums with them, in place."""
    s, level = sums
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
    """Add far keys, numerator and denominator (C, H, D + 1) short of 2^log, to answers out (C, H, D) of weights 2^near,
    which then count them, too."""
    far = both[..., -1:].to(log.dtype).log2() + log
    share = torch.sigmoid((far - near) / LOG2_E).to(out.dtype)
    out.lerp_((both[..., :-1] / both[..., -1:]).to(out.dtype), share)
    torch.logaddexp2(near, far, out=near)
