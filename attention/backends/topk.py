"""A sliding window and the best blocks behind it: near tokens, the first ones, and those that a query asks for most.

The keys are cut into blocks. Of each whole block the highest and the lowest of every element are kept, which bound the score
that any of its keys can have with a query: Quest (Tang et al., arXiv 2406.10774, section 3.3). A query takes the `blocks` with
the largest bounds, summed over the query heads that share a key-value head, and its softmax is over their keys, its window and
the sinks. Where we part from Quest: prefill chooses as decode does, each query for itself, so that a choice knows nothing of
what comes later and does not depend on chunks; and bounds are summed, so that a group of heads reads one set of keys.

Causal only. Cost per token O(window + blocks x block), and a look at the bounds of n / block blocks. The state keeps all keys
and values, and the bounds: one `block`th of their bytes more. What is spread over more blocks than are chosen is missed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from pydantic import Field, model_validator
from torch import Tensor

from attention import history
from attention.history import Pair
from attention.interface import AttentionBackend, BackendOptions
from attention.kernels import implementation, int8
from attention.kernels.softmax import Blocks, Runs
from attention.parts import Parts, spread
from attention.pool import StateTensor
from attention.shapes import MOST_TOKENS, Cost, HeadShape

MOST_BLOCKS = 256  # that a query may choose: as many as softmax.c has room for
ROWS = 512  # queries that choose in one part
LOOKS = 1 << 20  # rows times blocks that are looked at in one part, about a millisecond
ROUNDING = 2.0**-18  # of a bound in float32, relative to the sum of its terms' sizes: which of two so near is larger is open
TINY = 2.0**-100  # what float32 loses below its range


class TopKOptions(BackendOptions):
    """What a token sees beside itself."""

    block: int = Field(16, ge=1, le=MOST_TOKENS, description="tokens of a block, at most `window`")
    blocks: int = Field(32, ge=1, le=MOST_BLOCKS, description="blocks that each token chooses behind its window")
    window: int = Field(512, ge=1, le=MOST_TOKENS, description="earlier tokens always seen, the token itself not counted")
    sinks: int = Field(4, ge=0, le=MOST_TOKENS, description="first tokens of a sequence that stay visible to all later ones")
    impl: implementation.CpuImpl = "auto"

    @model_validator(mode="after")
    def _whole(self) -> TopKOptions:
        if self.block > self.window:
            raise ValueError(f"block must be at most the window of {self.window} tokens, received {self.block}")
        return self


class TopK(AttentionBackend):
    """Softmax over a window, the sinks and chosen blocks."""

    Options = TopKOptions
    options: TopKOptions
    takes_int8 = True
    exact = False  # what a token sees is not told by positions alone

    def __init__(self, options: TopKOptions, shape: HeadShape) -> None:
        super().__init__(options, shape)
        self.impl, self.softmax = implementation.softmax(options.impl, shape)
        self.blocks = Blocks(options.block, options.blocks, options.window, options.sinks)
        self._logs = torch.promote_types(shape.dtype, torch.float32)

    @property
    def directions(self) -> tuple[bool, ...]:
        return (True,)

    @property
    def edge(self) -> int:
        return self.options.window + 1 + (self.blocks.first + self.options.blocks + 1) * self.options.block

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """The definition: a softmax's weights where a query sees a key, else zero."""
        block = (j[0] // self.options.block).clamp(max=len(j[0]) // self.options.block)
        picked = self.picked(q, k, i[:, 0])[..., block]
        seen = (i - j <= self.options.window) | (j < self.options.sinks) | picked
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill_(~seen | (j > i), -math.inf)
        return (scores - scores.amax(-1, keepdim=True)).exp()

    def picked(self, q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
        """Which blocks the queries q (H, C, D) at these positions choose of keys (H, N, D): bool (H, C, N // block + 1).

        The last, which may not be whole, never is. Where bounds differ by no more than float32 rounds them, the choice is
        this backend's own.
        """
        high, low = (x.to(self.shape.dtype).to(x.dtype) for x in self._bounds(k[:: self.shape.group].transpose(0, 1)))
        block = torch.arange(len(high) + 1)
        may = (block >= self.blocks.first) & (block * self.options.block < positions[:, None] - self.options.window)
        may[:, -1] = False
        scores, slack = (torch.nn.functional.pad(x, (0, 1)).masked_fill(~may, -math.inf) for x in self._scores(q, high, low))
        own, best = self._own(q, high, low, positions) & may, _best(scores, self.options.blocks) & may
        missed = scores.masked_fill(own, -math.inf).amax(-1) - slack.amax(-1).clamp(min=TINY)
        is_right = (scores.masked_fill(~own, math.inf).amin(-1) >= missed) & (own.sum(-1) == best.sum(-1))
        return torch.where(is_right[..., None], own, best).repeat_interleave(self.shape.group, 0)

    def _scores(self, q: Tensor, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """The bounds of all whole blocks, (G, C, blocks), and by how much float32 may round them."""
        asked = q.unflatten(0, (-1, self.shape.group))
        above, below = asked.clamp(min=0).sum(1), asked.clamp(max=0).sum(1)  # (G, C, D)
        high, low = high.permute(1, 2, 0), low.permute(1, 2, 0)
        return above @ high + below @ low, ROUNDING * (above @ high.abs() - below @ low.abs())

    def _own(self, q: Tensor, high: Tensor, low: Tensor, positions: Tensor) -> Tensor:
        """Which blocks this backend's implementation chooses, bool (G, C, blocks + 1)."""
        asked, *bounds = (x.to(self.shape.device, self.shape.dtype) for x in (q.transpose(0, 1), high, low))
        is_next = positions.diff() == 1
        starts = [0, *((~is_next).nonzero()[:, 0] + 1).tolist(), len(positions)]
        rows = [(a, b, int(positions[a]), 0) for a, b in pairwise(starts)]
        table = self.softmax.choose(asked, [(bounds[0], bounds[1])], rows, self.blocks).cpu().long()
        chosen = torch.zeros(*table.shape[:2], len(high) + 1, dtype=torch.bool)
        chosen.scatter_(-1, table.where(table >= 0, len(high)), True)
        return chosen.transpose(0, 1)

    def choices(self, q: Tensor, k: Tensor) -> Tensor:
        """The blocks that each query of a whole sequence chooses, int32 (T, G, blocks); -1 where there are no more."""
        return self.softmax.choose(q, [self._bounds(self.as_kept(k, k)[0])], [(0, len(q), 0, 0)], self.blocks)

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> Parts:
        return self._answer(q, k, v, self._bounds(k), 0, out)

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        keys, values = history.append(state, k, v, past)
        self._bind(state, past, len(keys))
        return self._answer(q, keys, values, self._kept(state), past, out)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, past: Sequence[int], states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> None:
        history.append_step(states, k, v, past)
        for state, at in zip(states, past, strict=True):
            self._bind(state, at, at + 1)
        logs, near = (
            q.new_empty(*q.shape[:2], 1, dtype=self._logs),
            [self._near(at, s) for at, s in zip(past, states, strict=True)],
        )
        self.softmax.step(q, states, [self._seen(at) for at in past], k.shape[1], out, logs, near)
        far = [(n, n + 1, at, n) for n, at in enumerate(past) if self.blocks.behind(at) > self.blocks.first]
        if far:
            table = self.softmax.choose(q, [self._kept(state) for state in states], far, self.blocks)
            all_keys = [history.read(state, at + 1, k.shape[1]) for state, at in zip(states, past, strict=True)]
            self.softmax.chosen(q, all_keys, far, self.blocks, table, out, logs)

    def _answer(self, q: Tensor, keys: Tensor, values: Tensor, bounds: Pair, past: int, out: Tensor) -> Parts:
        """Answer queries at positions `past` and on over all keys up to the last of them."""
        logs, sinks = q.new_empty(*q.shape[:2], 1, dtype=self._logs), min(self.options.sinks, len(keys))
        base = max(sinks, past - self.options.window)
        near, first = (keys[base:], values[base:]), (keys[:sinks], values[:sinks])
        yield from self.softmax.band(q, near, first, past - base, self.options.window, 0, out, logs)
        rows = max(16, min(ROWS, LOOKS // (self.blocks.behind(len(keys)) + 1)))
        for a, b in spread(0, len(q), rows):
            if self.blocks.behind(past + b - 1) > self.blocks.first:
                asking = [(0, b - a, past + a, 0)]
                table = self.softmax.choose(q[a:b], [bounds], asking, self.blocks)
                self.softmax.chosen(q[a:b], [(keys, values)], asking, self.blocks, table, out[a:b], logs[a:b])
                yield

    def _bounds(self, keys: Tensor) -> Pair:
        """The highest and the lowest elements of each whole block of keys (N, G, D), (N // block, G, D) each.

        Of keys in 8 bits those of what they tell, in the dtype.
        """
        keys, size = int8.dequantize(keys, self.shape.dtype), self.options.block
        whole = len(keys) // size
        if not whole:
            return keys[:0], keys[:0]
        low, high = torch.aminmax(keys[: whole * size].unflatten(0, (whole, size)), dim=1)
        return high, low

    def _bind(self, state: dict[str, Tensor], past: int, total: int) -> None:
        """Write the bounds of the blocks that became whole behind `past`."""
        first, last = past // self.options.block, total // self.options.block
        if first < last:
            keys = state["k"][first * self.options.block : last * self.options.block]
            bounds = self._bounds(keys.unflatten(1, (self.shape.key_value_heads, -1)))
            for name, bound in zip(("high", "low"), bounds, strict=True):
                state[name][first:last] = bound.flatten(1)

    def _kept(self, state: dict[str, Tensor]) -> Pair:
        """The bounds in a state, (blocks, G, D) each."""
        high, low = (state[name].unflatten(1, (self.shape.key_value_heads, -1)) for name in ("high", "low"))
        return high, low

    def _seen(self, position: int) -> int:
        """How many keys the token at a position sees as sinks and window."""
        return min(position + 1, self.options.sinks + self.options.window + 1)

    def _near(self, position: int, state: dict[str, Tensor]) -> Runs:
        """The same as runs of a state."""
        sinks, first = self.options.sinks, position - self.options.window
        if first <= sinks:
            return ((0, history.rounded(position + 1, len(state["k"]))),)
        return ((0, sinks), (first, position + 1)) if sinks else ((first, position + 1),)

    @property
    def keeps_all(self) -> bool:
        return True

    def touched(self, state: dict[str, Tensor], position: int) -> Sequence[Tensor]:
        return ()

    def cut(self, state: dict[str, Tensor], tokens: int, total: int) -> None:
        history.cut(state, tokens, total)

    def carry(self, state: dict[str, Tensor], into: dict[str, Tensor], tokens: int) -> None:
        history.carry(state, into, tokens)
        whole = tokens // self.options.block
        for name in ("high", "low"):
            into[name][:whole] = state[name][:whole]

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        width = self.shape.key_value_heads * self.shape.head_width
        bound = StateTensor((max_tokens // self.options.block, width), self.shape.dtype)
        return {**history.keys_and_values(self.shape, max_tokens), "high": bound, "low": bound}

    def law(self, queries: int, keys: int, *, causal: bool) -> Cost:
        shape, options = self.shape, self.options
        looks, picked = (self._upto(keys - 1, most) - self._upto(keys - queries - 1, most) for most in (keys, options.blocks))
        pairs = queries * self._seen(keys - 1) + picked * options.block
        flops = 4 * shape.head_width * (shape.query_heads * pairs + shape.key_value_heads * looks)
        return Cost(flops, self._workspace(queries, keys), self.state_bytes(keys))

    def _upto(self, position: int, most: int) -> int:
        """The sum over all positions up to this of the blocks behind their windows, of no more than `most` of each."""
        size = self.options.block
        count = max(0, position - self.options.window - self.blocks.first * size)
        full, rest = divmod(min(count, most * size), size)
        return full * (full + 1) // 2 * size + rest * (full + 1) + max(0, count - most * size) * most

    def _workspace(self, queries: int, keys: int) -> int:
        shape, options = self.shape, self.options
        logs = queries * shape.query_heads * self._logs.itemsize
        candidates = max(0, self.blocks.behind(keys - 1) - self.blocks.first)
        rows = 1 if queries == 1 else min(queries, max(16, min(ROWS, LOOKS // (candidates + 1))))
        choosing = self.softmax.chosen_bytes(shape, rows, self.blocks, candidates) if candidates else 0
        answer = queries * shape.query_heads * shape.head_width * shape.itemsize
        if queries == 1:
            is_behind = keys - 1 - options.window > options.sinks
            seen, runs = (self._seen(keys - 1), 2 if options.sinks else 1) if is_behind else (history.whole(keys), 1)
            near = self.softmax.step_bytes(shape, seen, runs, logs=True)
        else:
            near = self.softmax.band_bytes(shape, queries, keys, options.window, 0, options.sinks)
        bounds = 2 * (queries // options.block) * shape.key_value_heads * shape.head_width * shape.itemsize
        answering, binding = max(near, answer + choosing) + logs, answer + bounds + int8.told_bytes(shape, queries) // 2
        return max(answering + (bounds if queries == keys else 0), binding)  # those of a chunk go into the state


def _best(scores: Tensor, count: int) -> Tensor:
    """Which columns (..., N) have the `count` largest scores, of equals the later ones."""
    order = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.shape[-1] - 1 - order, True)
