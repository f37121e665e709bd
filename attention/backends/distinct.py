"""A sliding window, the sinks, and of all that lies behind the window the tokens that are least like each other.

What a long text says once is what a later question can ask for; what it says again and again need not be kept each time. So
a token that leaves the window is kept for what is new in it: one minus the largest cosine of its keys and values with those
of a token kept before. The `kept` most novel stay. KeyDiff (Park et al., arXiv 2504.15364) drops keys for being like the
others and R-KV (Cai et al., arXiv 2505.24133) judges keys by pairs; where we part from both: values count as much as keys, for
rotation makes keys of one token differ by their places, and a novelty is settled once, when a token leaves the window.

Causal only. Time goes in blocks: at the first token of each, the oldest block of the window is judged, so a choice knows only
what came before and does not depend on chunks. The window is `window` in whole blocks, and up to a block more. Cost per token
O(window + kept), and so is the state: constant in length. Up to `kept` + `window` tokens it is dense attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from attention import history
from attention.history import Pair
from attention.interface import AttentionBackend, BackendOptions
from attention.kernels import implementation
from attention.kernels.library import Told
from attention.parts import Parts, spread
from attention.pool import StateTensor
from attention.shapes import MOST_TOKENS, Cost, HeadShape

PIECE_BYTES = 1 << 20  # of kept tokens in float32 that are looked at in one part
ROUNDING = 2.0**-17  # of a novelty in float32: which of two so near is larger is open
TINY = 2.0**-100  # below a norm: a token that is all zeros is like no other


class DistinctOptions(BackendOptions):
    """What a token sees beside itself."""

    window: int = Field(512, ge=1, le=MOST_TOKENS, description="earlier tokens always seen, the token itself not counted")
    kept: int = Field(2048, ge=1, le=MOST_TOKENS, description="tokens kept of those behind the window")
    sinks: int = Field(4, ge=0, le=MOST_TOKENS, description="first tokens of a sequence that are kept beside them for good")
    block: int = Field(128, ge=1, le=MOST_TOKENS, description="tokens that leave the window together")
    impl: implementation.CpuImpl = "auto"


class Distinct(AttentionBackend):
    """Softmax over a window, the sinks and the most novel tokens behind it.

    A state is a history that is edited: what is kept, in order, and the window behind it. `_start` tells which positions have
    left the window, `_held` how many entries there are; both follow from the position alone.
    """

    Options = DistinctOptions
    options: DistinctOptions
    exact = False  # what a token sees is not told by positions alone

    def __init__(self, options: DistinctOptions, shape: HeadShape) -> None:
        super().__init__(options, shape)
        self.impl, self.softmax = implementation.softmax(options.impl, shape)
        self.kept = options.sinks + options.kept
        self.window = -(-options.window // options.block) * options.block

    @property
    def directions(self) -> tuple[bool, ...]:
        return (True,)

    @property
    def edge(self) -> int:
        return self.kept + self.window + 2 * self.options.block

    @property
    def _most(self) -> int:
        """Entries that a state has room for."""
        return self.kept + self.window + self.options.block

    def _start(self, position: int) -> int:
        """The first position that the window of a token holds, which is that of its whole block."""
        return max(0, position - position % self.options.block - self.window)

    def _held(self, position: int) -> int:
        """Entries in the state that the token at a position meets, itself not counted."""
        start = self._start(position)
        return min(start, self.kept) + position - start

    # ---- the definition ---------------------------------------------------------------------------------------------

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """The definition: a softmax's weights where a query sees a key, else zero."""
        keys, values = (x[:: self.shape.group].transpose(0, 1) for x in (k, v))
        positions, seen = i[:, 0], torch.zeros(len(i), k.shape[1], dtype=torch.bool)
        for start, kept in self.keeping(keys, values, int(positions.max())):
            rows = torch.tensor([self._start(int(position)) == start for position in positions])
            mask = torch.arange(k.shape[1]) >= start
            mask[kept] = True
            seen[rows] = mask
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill_(~seen | (j > i), -math.inf)
        return (scores - scores.amax(-1, keepdim=True)).exp()

    def keeping(self, keys: Tensor, values: Tensor, last: int) -> Iterator[tuple[int, Tensor]]:
        """(start, positions kept) of each start of the window up to position `last`, of keys and values (N, G, D).

        Where novelties differ by no more than float32 rounds them, the choice is this backend's own.
        """
        own_keys, own_values = (x.to(self.shape.dtype) for x in (keys, values))
        kept = torch.empty(0, dtype=torch.long)
        exact, ours = keys.new_empty(0), torch.empty(0, dtype=torch.promote_types(self.shape.dtype, torch.float32))
        yield 0, kept
        for start in range(self.options.block, self._start(last) + 1, self.options.block):
            new = torch.arange(start - self.options.block, start)
            met = torch.cat((kept, new))
            exact = torch.cat((exact, self._novelties(keys[met], values[met], len(kept))))
            ours = torch.cat((ours, self._novelties(own_keys[met], own_values[met], len(kept))))
            stays, best = _best(ours, self.kept), _best(exact, self.kept)
            gone = torch.ones(len(exact), dtype=torch.bool).index_fill_(0, stays, False)
            if gone.any() and not exact[stays].min() >= exact[gone].max() - ROUNDING:
                stays = best
            kept, exact, ours = met[stays], exact[stays], ours[stays]
            yield start, kept

    def _novelties(self, keys: Tensor, values: Tensor, old: int) -> Tensor:
        """Of all tokens behind the first `old`, keys and values (N, G, D): (N - old,), infinite for sinks."""
        new = _directions(keys[old:], values[old:])
        rows = torch.arange(len(new), device=new.device)
        similar = (new @ new.T).masked_fill_(rows >= rows[:, None], -1.0).amax(1)
        row_bytes = 2 * self.shape.key_value_heads * self.shape.head_width * new.itemsize
        for a, b in spread(0, old, max(16, PIECE_BYTES // row_bytes)):
            similar = torch.maximum(similar, (new @ _directions(keys[a:b], values[a:b]).T).amax(1))
        novelties = 1 - similar
        novelties[: max(0, self.options.sinks - old)] = math.inf
        return novelties

    # ---- what it does -----------------------------------------------------------------------------------------------

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> Parts:
        state = {name: spec.new(q.device) for name, spec in self.state(len(q)).items()}
        return self.extend_sequence(q, k, v, 0, state, out)

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        done = 0
        while done < len(q):
            at = past + done
            self._move_on(state, at)
            end = min(len(q), done + self.options.block - at % self.options.block)
            entries = history.append(state, k[done:end], v[done:end], self._held(at))
            yield from self.softmax.dense(q[done:end], *entries, self._held(at), True, out[done:end])
            done = end

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, past: Sequence[int], states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> None:
        for state, at in zip(states, past, strict=True):
            self._move_on(state, at)
        held = [self._held(at) for at in past]
        history.put(states, k, v, held)
        self.softmax.step(q, states, [count + 1 for count in held], k.shape[1], out)

    def told(self, past: Sequence[int], states: Sequence[dict[str, Tensor]]) -> Told | None:
        if any(map(self._moves_on, past)):
            return None
        held = [self._held(at) for at in past]
        return self.softmax.told(self.shape, states, held, [count + 1 for count in held])

    def _moves_on(self, position: int) -> bool:
        """Whether a block leaves the window before the token at a position comes."""
        return position % self.options.block == 0 and position > self.window

    def _move_on(self, state: dict[str, Tensor], position: int) -> None:
        """Judge the block that leaves the window before the token at a position comes, if one does."""
        if not self._moves_on(position):
            return
        block, total = self.options.block, self._held(position - 1) + 1
        old = min(self._start(position - 1), self.kept)
        judged = old + block
        novelty = torch.cat((state["novelty"][:old], self._novelties(*self._entries(state, judged), old)))
        if judged > self.kept:
            stays = _best(novelty, self.kept)
            novelty = novelty[stays]
            for name in ("k", "v"):
                entries = state[name]
                entries[: self.kept] = entries[stays]
                entries[self.kept : self.kept + total - judged] = entries[judged:total].clone()
            state["v"][self.kept + total - judged : total] = 0.0  # a step may weigh by 0 what stands behind its tokens
        state["novelty"][: len(novelty)] = novelty

    def _entries(self, state: dict[str, Tensor], count: int) -> Pair:
        return history.read(state, count, self.shape.key_value_heads)

    def runway(self, past: int) -> int:
        return self.options.block - past % self.options.block

    def touched(self, state: dict[str, Tensor], position: int) -> Sequence[Tensor]:
        return ()

    def cut(self, state: dict[str, Tensor], tokens: int, total: int) -> None:
        first = self._held(tokens)
        history.cut(state, first, first + total - tokens)

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        room = history.keys_and_values(self.shape, max_tokens, self._most)
        novelty = StateTensor((min(self.kept, max_tokens),), torch.promote_types(self.shape.dtype, torch.float32))
        return {"k": room["k"], "v": replace(room["v"], fill=0.0), "novelty": novelty}

    # ---- what it costs ----------------------------------------------------------------------------------------------

    def law(self, queries: int, keys: int, *, causal: bool) -> Cost:
        shape = self.shape
        pairs, looks = (upto(keys) - upto(keys - queries) for upto in (self._pairs, self._looks))
        flops = 4 * shape.head_width * (shape.query_heads * pairs + shape.key_value_heads * looks)
        return Cost(flops, self._workspace(queries, keys), self.state_bytes(keys))

    def _pairs(self, tokens: int) -> int:
        """Keys that the first `tokens` tokens of a sequence see, all together."""
        block = self.options.block
        whole = min(tokens, ((self.kept + self.window) // block + 1) * block)  # these see all before them
        blocks, rest = divmod(tokens - whole, block)
        within = blocks * (block * (block - 1) // 2) + rest * (rest - 1) // 2
        return whole * (whole + 1) // 2 + (tokens - whole) * (self.kept + self.window + 1) + within

    def _looks(self, tokens: int) -> int:
        """Pairs of tokens that are compared before the first `tokens` tokens have come."""
        block = self.options.block
        moves = max(0, (tokens - 1) // block - self.window // block)
        filling = min(moves, self.kept // block + 1)  # while nothing had to go, each meets all before it
        met = filling * (filling - 1) // 2 * block + (moves - filling) * self.kept
        return met * block + moves * (block * (block - 1) // 2)

    def _workspace(self, queries: int, keys: int) -> int:
        shape, block = self.shape, self.options.block
        entry = shape.key_value_heads * shape.head_width
        held = self._held(keys - 1) + 1
        first = max(self.window + 1, keys - queries)
        judging = 0
        if (last := (keys - 1) // block * block) >= first:  # the last block that was judged meets most
            wide = max(4, shape.itemsize)
            old = min(self._start(last - 1), self.kept)
            piece = min(old, max(16, PIECE_BYTES // (2 * entry * wide)))
            looking = (2 * max(piece, block) + block) * 2 * entry * wide + 2 * block * max(piece, block) * wide
            moving = max(self.kept, self.window) * entry * shape.itemsize if old + block > self.kept else 0
            judging = max(looking, moving) + 3 * (old + block) * 8
        if queries == 1:
            return max(self.softmax.step_bytes(shape, history.rounded(held, self._most)), judging)
        answer = queries * shape.query_heads * shape.head_width * shape.itemsize
        rows = min(queries, block)
        answering = self.softmax.dense_bytes(shape, rows, held, asking=rows) - rows * answer // queries
        own = self.state_bytes(keys) if queries == keys else 0  # a whole sequence has a state for the time it takes
        return answer + max(answering, judging) + own


def _directions(keys: Tensor, values: Tensor) -> Tensor:
    """Keys and values (N, G, D) as one vector of length one, in float32 or wider: (N, 2 G D)."""
    wide = torch.promote_types(keys.dtype, torch.float32)
    parts = [x.flatten(1).to(wide) for x in (keys, values)]
    return torch.cat([x * (0.5**0.5 / x.norm(dim=1, keepdim=True).clamp_min(TINY)) for x in parts], dim=1)


def _best(novelty: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, in order; of equals the later ones. One that is no number is larger than all."""
    return novelty.argsort(stable=True)[-count:].sort().values
