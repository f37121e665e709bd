"""BigBird attention (Zaheer et al., arXiv 2007.14062, section 2, appendix D): window, globals and random blocks.

The sequence is cut into blocks. The queries of a block see the blocks around it, the global blocks, and a few blocks drawn at
random; global blocks see all. A block is seen once, whatever names it. The drawn blocks depend on the seed, the query block
and the number of blocks alone, and are never ones that are visible anyway (transformers' module points all of them at block
0 outside training). Causal, a block draws from the blocks before it; globals at the end have no causal form.

Cost per token O((window + globals + random) x block). The state keeps all keys and values: a block may draw any.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache

import torch
from pydantic import Field, field_validator
from torch import Tensor

from attention import blocks
from attention.interface import AttentionBackend, BackendOptions, Cost, Parts, StateTensor


class BigBirdOptions(BackendOptions):
    """The pattern, in blocks."""

    block: int = Field(64, ge=1, description="tokens of a block")
    window_blocks: int = Field(3, ge=1, description="blocks of the window, the query's own in the middle: an odd number")
    random_blocks: int = Field(3, ge=0, description="blocks drawn for each query block")
    global_blocks: int = Field(2, ge=0, description="first blocks of a sequence, which see all and are seen by all")
    closing_blocks: int = Field(0, ge=0, description="last blocks of a sequence that are global too; bidirectional only")
    seed: int = Field(0, ge=0, description="of the drawn blocks")

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
        triples = torch.stack(torch.broadcast_tensors(i // size, j // size, counts), -1)
        different, place = triples.view(-1, 3).unique(dim=0, return_inverse=True)
        answers = torch.tensor([key in self.seen(query, count) for query, key, count in different.tolist()])
        return answers[place].view(triples.shape[:-1])

    def seen(self, block: int, count: int) -> tuple[int, ...]:
        """The blocks, ascending, that a query block sees in a sequence of `count` blocks."""
        return _seen(self.options, block, count)

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> Parts:
        return self._answer(q, blocks.heads_first(k), blocks.heads_first(v), 0, causal, out)

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        keys, values = blocks.append(state, k, v, past)
        return self._answer(q, keys, values, past, True, out)

    def _answer(self, q: Tensor, keys: Tensor, values: Tensor, past: int, causal: bool, out: Tensor) -> Parts:
        """Answer queries at positions `past` and on over keys, values (G, n, D) into out (C, H, D), block by block."""
        size, total = self.options.block, keys.shape[1]
        most, first = blocks.columns(q.shape[1], q.itemsize, size), past
        while first < past + len(q):
            block = first // size
            last = min(past + len(q), (block + 1) * size)
            runs = list(self._runs(block, block + 1 if causal else -(-total // size), last if causal else total))
            keys_seen, values_seen = (_gather(x, runs) for x in (keys, values))
            band = blocks.Band(high=keys_seen.shape[1] - (last - first)) if causal else blocks.Band()
            span = slice(first - past, last - past)
            yield from blocks.softmax(q[span], blocks.split(blocks.Piece(keys_seen, values_seen, band), most), out[span])
            first = last

    def _runs(self, block: int, count: int, total: int) -> Iterator[tuple[int, int]]:
        """(start, end) of the runs of tokens that a block's queries see, ascending, none past `total`."""
        size, start, end = self.options.block, 0, 0
        for seen in self.seen(block, count):
            if seen * size != end:
                if end > start:
                    yield start, end
                start = seen * size
            end = min((seen + 1) * size, total)
        yield start, end

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        return blocks.key_value_state(self.shape, max_tokens)

    def cost(self, queries: int, keys: int, *, causal: bool) -> Cost:
        options, shape = self.options, self.shape
        window = options.window_blocks // 2 + 1 if causal else options.window_blocks
        whole = min(keys, (options.global_blocks + options.closing_blocks) * options.block)
        seen = min(keys, whole + (window + options.random_blocks) * options.block)
        pairs = queries * seen + min(whole, queries) * (0 if causal else keys - seen)
        workspace = blocks.workspace_bytes(shape, queries, options.block, seen, gathered=True)
        if whole and not causal:
            workspace = max(workspace, blocks.workspace_bytes(shape, queries, options.block, keys))
        return Cost(4 * shape.query_heads * shape.head_width * pairs, workspace, self.state_bytes(keys))


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


def _gather(x: Tensor, runs: list[tuple[int, int]]) -> Tensor:
    """Runs of (G, n, D) one behind the other."""
    parts = [x[:, a:b] for a, b in runs]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]
