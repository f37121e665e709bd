"""Attention through positive features: what `torch` (operators of torch) and `native` (C, AVX-512) both answer.

With features phi, attention is phi(q) S[:, :D] / phi(q) S[:, D] where S = sum_j phi(k_j) [v_j, 1] (Katharopoulos et al., arXiv
2006.16236, equations 4 to 7). Causally the sum runs along the sequence: a chunk of tokens meets the sum of all chunks before
it and its own lower triangle.

S is kept transposed, and in at least float32: it is a long sum. Features are taken by their logarithms, so that no norm is too
large for them. Feature r of S is short of 2^level_r, and the first key it met set that level: its sum of weights is at least
1 from then on. A query takes its features relative to its largest 2^(exponent + level), and multiplies that one by 1: no row's
total is below 1, however q and k stand to each other, and what underflows is at most 2^-46 of a row of 2^20 keys. A level
rises only at a key that would pass it by 2^LIMIT. The chunk is then answered in passes of one shape, before and from that key,
so that earlier rows are the same to the bit whatever comes later. A token that is no number begins a pass for the same reason:
0 x NaN is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor, float32, promote_types  # not the package: `torch` here is the reading beside

from attention.kernels.library import Told
from attention.parts import Parts
from attention.pool import StateTensor
from attention.shapes import HeadShape

CHUNK = 128  # tokens answered together causally: their own triangle costs CHUNK per token, their state two products a chunk
LIMIT = 60.0  # sums of 2^20 keys stay below 2^80, and their product with a value in the floats' range


class Sums(NamedTuple):
    """What a sequence keeps, and a call changes: tight, in at least float32."""

    s: Tensor  # (G, D + 1, m)
    level: Tensor  # (G, 1, m): log2 of what each feature of s is short of

    @classmethod
    def of(cls, state: dict[str, Tensor]) -> Sums:
        """Those of a state that has the tensors of `state`."""
        return cls(state["s"], state["level"])

    @classmethod
    def fresh(cls, shape: HeadShape, count: int) -> Sums:
        """Over no key yet."""
        return cls.of({name: spec.new(shape.device) for name, spec in state(shape, count).items()})

    def clear(self) -> None:
        """Over no key again."""
        self.s.zero_()
        self.level.fill_(-math.inf)


def state(shape: HeadShape, count: int) -> dict[str, StateTensor]:
    """The tensors of `Sums` over `count` features."""
    heads, wide = shape.key_value_heads, promote_types(shape.dtype, float32)
    return {
        "s": StateTensor((heads, shape.head_width + 1, count), wide, 0.0),
        "level": StateTensor((heads, 1, count), wide, -math.inf),
    }


def flops(shape: HeadShape, count: int, queries: int, causal: bool) -> int:
    """Products of `queries` tokens: each key-value head adds to its sum, each query head asks it; causally the triangles."""
    columns = shape.head_width + 1
    chunk = min(queries, CHUNK)
    each = (shape.query_heads + shape.key_value_heads) * count * columns
    return 2 * queries * (each + (shape.query_heads * chunk * (count + columns) if causal else 0))


class Features(Protocol):
    """Features, and attention through them. q, out: (C, H, D). k, v: (C, G, D). The `..._bytes` are the peak of temporaries.

    Made of random rows W (D, m) and `half`: phi(x) is 2^(x W - |x|^2 half). Without rows it is elu(x) + 1, and m is D.
    """

    def scan(self, q: Tensor, k: Tensor, v: Tensor, sums: Sums, out: Tensor) -> Parts:
        """Continue the sums over tokens in order, and answer each over those before it and itself."""

    def both_sides(self, q: Tensor, k: Tensor, v: Tensor, sums: Sums, out: Tensor) -> Parts:
        """The same with all keys in the sums before the first query asks; there may be more or fewer keys than queries."""

    def absorb(self, k: Tensor, v: Tensor, sums: Sums) -> Parts:
        """Add tokens to the sums."""

    def join(self, q: Tensor, sums: Sums, near: Tensor, out: Tensor) -> Parts:
        """Add the keys in the sums to answers out over other keys, whose weights sum to 2^near, (C, H, 1); then all do."""

    def step(self, q: Tensor, k: Tensor, v: Tensor, states: Sequence[dict[str, Tensor]], out: Tensor) -> None:
        """Add one token of each of B sequences to the sums in its state and ask them. q, out: (B, H, D). k, v: (B, G, D)."""

    def join_step(self, q: Tensor, states: Sequence[dict[str, Tensor]], near: Tensor, out: Tensor) -> None:
        """`join` of one token of each of B sequences: q, out (B, H, D), near (B, H, 1)."""

    def told(self, states: Sequence[dict[str, Tensor]], near: Tensor | None = None, other: Told | None = None) -> Told | None:
        """What answers `step` at each of some layers, called from C, or `join_step` behind the `other` that tells `near`.

        states: of each sequence, every tensor (layers, ...). None: the step is not in C.
        """

    def attend_bytes(self, queries: int, causal: bool) -> int:
        """Of `scan` and `both_sides`, and for one query of `step`, the answer included."""

    def absorb_bytes(self, tokens: int) -> int:
        """Of `absorb`."""

    def join_bytes(self, tokens: int) -> int:
        """Of `join`, for one token of `join_step`."""
