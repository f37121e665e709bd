"""BigBird attention (Zaheer et al., arXiv 2007.14062, section 2, appendix D): window, globals and random blocks.

The sequence is cut into blocks. The queries of a block see the blocks around it, the global blocks, and a few blocks drawn at
random; global blocks see all. A block is seen once, whatever names it. The drawn blocks depend on the seed, the query block
and the number of blocks alone, and are never ones that are visible anyway (transformers' module points all of them at block
0 outside training). Causal, a block draws from the blocks before it; globals at the end have no causal form.

Cost per token O((window + globals + random) x block). The state keeps all keys and values: a block may draw any.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from pydantic import Field, field_validator
from torch import Tensor

from attention import blocks, implementation, native
from attention.interface import MOST_SEED, MOST_TOKENS, AttentionBackend, BackendOptions, Cost, HeadShape, Parts, StateTensor


class BigBirdOptions(BackendOptions):
    """The pattern, in blocks."""

    block: int = Field(64, ge=1, le=MOST_TOKENS, description="tokens of a block")
    window_blocks: int = Field(
        3, ge=1, le=MOST_TOKENS, description="blocks of the window, the query's own in the middle: an odd number"
    )
    random_blocks: int = Field(3, ge=0, le=MOST_TOKENS, description="blocks drawn for each query block")
    global_blocks: int = Field(
        2, ge=0, le=MOST_TOKENS, description="first blocks of a sequence, which see all and are seen by all"
    )
    closing_blocks: int = Field(
        0, ge=0, le=MOST_TOKENS, description="last blocks of a sequence that are global too; bidirectional only"
    )
    seed: int = Field(0, ge=0, le=MOST_SEED, description="of the drawn blocks")
    impl: implementation.CpuImpl = Field("auto", description="torch, native (CPU), or auto: native where it can run")

    @field_validator("window_blocks")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"window_blocks must be odd (the query's own block and as many on each side), received {value}")
        return value


class BigBird(AttentionBackend):
    """Softmax over window, global and drawn blocks."""

    Options = BigBirdOptions
    options: BigBirdOptions

    def __init__(self, options: BigBirdOptions, shape: HeadShape) -> None:
        super().__init__(options, shape)
        self.impl = implementation.settle(options.impl, shape)
        self.softmax = implementation.softmax(self.impl)

    @property
    def directions(self) -> tuple[bool, ...]:
        return (False,) if self.options.closing_blocks else (True, False)

    @property
    def edge(self) -> int:
        options = self.options
        shown = options.global_blocks + options.closing_blocks + options.window_blocks + options.random_blocks
        return (shown + 1) * options.block

    def visible(self, i: Tensor, j: Tensor, length: int | Tensor) -> Tensor:
        size = self.options.block
        counts = (torch.as_tensor(length) + size - 1) // size
        queries, keys, counts = torch.broadcast_tensors(i // size, j // size, counts)
        most = 1 + max(
            int(part.max()) for part in (queries, keys, counts)
        )  # as one number each, for rows of three are sorted ten times slower
        different, place = ((queries * most + keys) * most + counts).unique(return_inverse=True)
        triples = ((n // most // most, n // most % most, n % most) for n in different.tolist())
        return torch.tensor([key in self.seen(query, count) for query, key, count in triples])[place]

    def seen(self, block: int, count: int) -> tuple[int, ...]:
        """The blocks, ascending, that a query block sees in a sequence of `count` blocks."""
        return _seen(self.options, block, count)

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> Parts:
        return self._answer(q, blocks.heads_first(k), blocks.heads_first(v), 0, causal, out)

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        keys, values = blocks.append(state, k, v, past)
        return self._answer(q, keys, values, past, True, out)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, past: Sequence[int], states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> None:
        blocks.put_step(states, k, v, past)
        runs = [self._runs(at, len(state["k"])) for at, state in zip(past, states, strict=True)]
        counts = [sum(b - a for a, b in own) - own[-1][1] + at + 1 for at, own in zip(past, runs, strict=True)]
        self.softmax.step(q, states, counts, k.shape[1], out, runs=runs)

    def _runs(self, position: int, kept: int) -> list[tuple[int, int]]:
        """The blocks that a token sees behind its past as runs of a state of `kept` keys; the last ends with its own block."""
        size = self.options.block
        found = _joined(self.seen(position // size, position // size + 1), size)
        first, last = found[-1]
        return [*found[:-1], (first, min(last, blocks.rounded(position + 1, kept)))]

    def _answer(self, q: Tensor, keys: Tensor, values: Tensor, past: int, causal: bool, out: Tensor) -> Parts:
        """Answer queries at positions `past` and on over keys, values (G, n, D) into out (C, H, D), block by block."""
        size, total, end = self.options.block, keys.shape[1], past + len(q)
        if self.impl == "native":
            yield from native.pattern(q, keys, values, past, causal, self._shown(past, end, total, causal), out)
            return
        most, room = blocks.columns(q.shape[1], q.itemsize, size), blocks.Room(q)
        for first, last, seen in self._groups(past, end, total, causal):
            together = len(seen)
            high = last if causal else total
            k, v = (_gather(x, seen, size, high, room, name) for name, x in (("k", keys), ("v", values)))
            band = blocks.Band(high=k.shape[1] - (last - first) // together) if causal else blocks.Band()
            pieces = blocks.split(blocks.Piece(k, v, band), most)
            span = slice(first - past, last - past)
            yield from blocks.softmax(q[span], pieces, out[span], room, together)
            del pieces, k, v  # or the room stays twice when the next blocks need more of it

    def _shown(self, past: int, end: int, total: int, causal: bool) -> Iterator[tuple[int, blocks.Runs]]:
        """For each query block of positions past..end, where it ends among the queries and the runs of keys it sees."""
        size = self.options.block
        for block in range(past // size, -(-end // size)):
            runs = _joined(self.seen(block, block + 1 if causal else -(-total // size)), size)
            first, last = runs[-1]
            yield min(end, (block + 1) * size) - past, [*runs[:-1], (first, min(last, total))]

    def _most(self) -> int:
        """Keys that are gathered for query blocks that go together: half a piece, so that they too stay near the cores."""
        return blocks.columns(self.shape.query_heads, self.shape.itemsize, self.options.block) // 2

    def _groups(self, first: int, end: int, total: int, causal: bool) -> Iterator[tuple[int, int, list[tuple[int, ...]]]]:
        """(first, last, what its blocks see) of the groups of query blocks that go together over positions first..end."""
        while first < end:
            seen = self._alike(first, end, total, causal)
            last = min(end, (first // self.options.block + len(seen)) * self.options.block)
            yield first, last, seen
            first = last

    def _alike(self, first: int, end: int, total: int, causal: bool) -> list[tuple[int, ...]]:
        """What the query blocks from position `first` on see: of one block, or of as many of one shape as go together."""
        size, most = self.options.block, self._most()
        seen: list[tuple[int, ...]] = []

        def alike(shown: tuple[int, ...]) -> bool:  # the sequence's last block may be short
            return len(shown) == len(seen[0]) and (shown[-1] == seen[0][-1] or max(shown[-1], seen[0][-1]) < total // size)

        for block in range(first // size, -(-end // size)):
            shown = self.seen(block, block + 1 if causal else -(-total // size))
            is_whole = block * size >= first and (block + 1) * size <= end
            if seen and not (is_whole and alike(shown) and (len(seen) + 1) * len(shown) * size <= most):
                break
            seen.append(shown)
            if not is_whole:
                break
        return seen

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        return blocks.key_value_state(self.shape, max_tokens)

    def law(self, queries: int, keys: int, *, causal: bool) -> Cost:
        options, shape = self.options, self.shape
        window = options.window_blocks // 2 + 1 if causal else options.window_blocks
        whole = min(keys, (options.global_blocks + options.closing_blocks) * options.block)
        seen = min(keys, whole + (window + options.random_blocks) * options.block)
        pairs = queries * seen + min(whole, queries) * (0 if causal else keys - seen)
        if queries == 1 and causal:
            runs = self._runs(keys - 1, blocks.rounded(keys, keys + blocks.STEP))
            workspace = self.softmax.step_workspace_bytes(shape, sum(b - a for a, b in runs), len(runs))
        elif self.impl == "native":
            workspace = self.softmax.dense_workspace_bytes(shape, queries, seen)
        else:
            workspace = queries * shape.query_heads * shape.head_width * shape.itemsize + self._room(queries, keys, causal)
        return Cost(4 * shape.query_heads * shape.head_width * pairs, workspace, self.state_bytes(keys))

    def _room(self, queries: int, keys: int, causal: bool) -> int:
        """Most bytes of each kind of scratch memory over all groups: the room keeps what it has taken."""
        shape, block = self.shape, self.options.block
        entry = shape.key_value_heads * shape.head_width * shape.itemsize
        gathered = copied = scores = sums = 0
        for first, last, seen in self._groups(keys - queries, keys, keys, causal):
            rows, tokens = shape.query_heads * (last - first), min(len(seen[0]) * block, keys)
            piece = min(tokens, blocks.columns(shape.query_heads, shape.itemsize, block))
            gathered = max(gathered, 0 if _is_run(seen) else 3 * len(seen) * tokens * entry)
            copied = max(copied, 2 * piece * entry if _is_run(seen) or piece < tokens else 0)
            scores = max(scores, rows * piece * shape.itemsize)
            wide = max(shape.itemsize, 4) if piece < tokens else 0  # of sums over several pieces
            sums = max(sums, rows * ((2 * shape.head_width + 1) * shape.itemsize + (shape.head_width + 1) * wide))
        return gathered + copied + scores + sums + blocks.scratch_bytes(shape)


@lru_cache(maxsize=1 << 16)
def _seen(options: BigBirdOptions, block: int, count: int) -> tuple[int, ...]:
    """The definition: all blocks for a global one; else window, globals and the drawn, deduplicated."""
    closing = max(count - options.closing_blocks, 0)
    if block < options.global_blocks or block >= closing:
        return tuple(range(count))
    reach = options.window_blocks // 2
    always = {*range(min(options.global_blocks, count)), *range(closing, count)}
    always.update(range(max(block - reach, 0), min(block + reach + 1, count)))
    others = count - len(always)
    ranks = sorted(random.Random(f"{options.seed}/{block}/{count}").sample(range(others), min(options.random_blocks, others)))
    return tuple(sorted(always | set(_others(always, ranks))))


def _others(taken: set[int], ranks: list[int]) -> Iterator[int]:
    """The blocks of the given ranks (ascending) among those that are not taken."""
    held = sorted(taken)
    for rank in ranks:
        block = rank
        for other in held:
            if other > block:
                break
            block += 1
        yield block


def _joined(seen: tuple[int, ...], size: int) -> list[tuple[int, int]]:
    """Blocks as runs of keys, neighbours as one."""
    found: list[tuple[int, int]] = []
    for block in seen:
        first = found.pop()[0] if found and found[-1][1] == block * size else block * size
        found.append((first, (block + 1) * size))
    return found


def _is_run(seen: list[tuple[int, ...]]) -> bool:
    """Whether the query block is alone and sees neighbouring blocks only."""
    return len(seen) == 1 and seen[0][-1] - seen[0][0] == len(seen[0]) - 1


def _gather(x: Tensor, seen: list[tuple[int, ...]], size: int, end: int, room: blocks.Room, name: str) -> Tensor:
    """The blocks that each of b query blocks sees, none past `end`: (G, n, D) to (G b, N, D), tight unless it sees one run."""
    if _is_run(seen):
        return x[:, seen[0][0] * size : min((seen[0][-1] + 1) * size, end)]
    groups, _, width = x.shape
    starts = torch.tensor(seen, device=x.device) * size
    tokens = (starts[..., None] + torch.arange(size, device=x.device)).view(len(seen), -1)
    cut = max(0, (seen[0][-1] + 1) * size - end)  # the sequence's last block may be short
    tokens = tokens[:, : tokens.shape[1] - cut]
    picked = room.take("picked", tokens.numel(), groups, width)
    torch.index_select(x.transpose(0, 1), 0, tokens.flatten(), out=picked)
    gathered = room.take(name, groups, *tokens.shape, width)
    gathered.copy_(picked.view(*tokens.shape, groups, width).permute(2, 0, 1, 3))
    return gathered.view(groups * len(seen), -1, width)
