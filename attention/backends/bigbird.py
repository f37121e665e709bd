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

from attention import history
from attention.interface import MOST_SEED, AttentionBackend, BackendOptions
from attention.kernels import implementation
from attention.kernels.library import Told
from attention.kernels.softmax import Runs
from attention.parts import Parts
from attention.pool import StateTensor
from attention.shapes import MOST_TOKENS, Cost, HeadShape


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
    full_blocks: int = Field(
        0, ge=0, le=MOST_TOKENS, description="of sequences of up to so many blocks every token sees everything"
    )
    seed: int = Field(0, ge=0, le=MOST_SEED, description="of the drawn blocks")
    impl: implementation.CpuImpl = "auto"

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
    takes_int8 = True

    def __init__(self, options: BigBirdOptions, shape: HeadShape) -> None:
        super().__init__(options, shape)
        self.impl, self.softmax = implementation.softmax(options.impl, shape)

    @property
    def directions(self) -> tuple[bool, ...]:
        return (False,) if self.options.closing_blocks else (True, False)

    @property
    def edge(self) -> int:
        options = self.options
        shown = options.global_blocks + options.closing_blocks + options.window_blocks + options.random_blocks
        return (max(shown, options.full_blocks) + 1) * options.block

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
        return self.softmax.pattern(q, k, v, 0, causal, self._shown(0, len(k), causal), out)

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        keys, values = history.append(state, k, v, past)
        return self.softmax.pattern(q, keys, values, past, True, self._shown(past, len(keys), True), out)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, past: Sequence[int], states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> None:
        history.append_step(states, k, v, past)
        counts, runs = self._looks(past, [len(state["k"]) for state in states])
        self.softmax.step(q, states, counts, k.shape[1], out, runs=runs)

    def told(self, past: Sequence[int], states: Sequence[dict[str, Tensor]]) -> Told | None:
        return self.softmax.told(self.shape, states, past, *self._looks(past, [state["k"].shape[1] for state in states]))

    def _looks(self, past: Sequence[int], kept: Sequence[int]) -> tuple[list[int], list[Runs]]:
        """How many keys each sequence's next token sees in a state of `kept` keys, and the runs they stand in."""
        runs = [self._runs(at, count) for at, count in zip(past, kept, strict=True)]
        return [sum(b - a for a, b in own) - own[-1][1] + at + 1 for at, own in zip(past, runs, strict=True)], runs

    def _runs(self, position: int, kept: int) -> Runs:
        """The blocks that a token sees behind its past as runs of a state of `kept` keys; the last ends with its own block."""
        block = position // self.options.block
        return self._cut_runs(block, block + 1, history.rounded(position + 1, kept))

    def _cut_runs(self, block: int, count: int, end: int) -> Runs:
        """What a query block sees in a sequence of `count` blocks as runs of keys, none behind `end`."""
        found = _seen_runs(self.options, block, count)
        first, last = found[-1]
        return (*found[:-1], (first, min(last, end)))

    def _shown(self, past: int, total: int, causal: bool) -> Iterator[tuple[int, Runs]]:
        """For each query block of positions past..total, where it ends among the queries and the runs of keys it sees."""
        size = self.options.block
        for block in range(past // size, -(-total // size)):
            runs = self._cut_runs(block, block + 1 if causal else -(-total // size), total)
            yield min(total, (block + 1) * size) - past, runs

    @property
    def keeps_all(self) -> bool:
        return True

    def touched(self, state: dict[str, Tensor], position: int) -> Sequence[Tensor]:
        return ()

    def cut(self, state: dict[str, Tensor], tokens: int, total: int) -> None:
        history.cut(state, tokens, total)

    def carry(self, state: dict[str, Tensor], into: dict[str, Tensor], tokens: int) -> None:
        history.carry(state, into, tokens)

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        return history.keys_and_values(self.shape, max_tokens)

    def law(self, queries: int, keys: int, *, causal: bool) -> Cost:
        options, shape = self.options, self.shape
        window = options.window_blocks // 2 + 1 if causal else options.window_blocks
        whole = min(keys, (options.global_blocks + options.closing_blocks) * options.block)
        seen = min(keys, whole + (window + options.random_blocks) * options.block)
        seen = keys if keys <= options.full_blocks * options.block else seen
        pairs = queries * seen + min(whole, queries) * (0 if causal else keys - seen)
        if queries == 1 and causal:
            runs = self._runs(keys - 1, history.whole(keys))
            workspace = self.softmax.step_bytes(shape, sum(b - a for a, b in runs), len(runs))
        else:
            workspace = self.softmax.pattern_bytes(shape, queries, self._shown(keys - queries, keys, causal))
        return Cost(4 * shape.query_heads * shape.head_width * pairs, workspace, self.state_bytes(keys))


@lru_cache(maxsize=1 << 16)
def _seen(options: BigBirdOptions, block: int, count: int) -> tuple[int, ...]:
    """The definition: all blocks for a global one; else window, globals and the drawn, deduplicated."""
    closing = max(count - options.closing_blocks, 0)
    if block < options.global_blocks or block >= closing or count <= options.full_blocks:
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


@lru_cache(maxsize=1 << 16)
def _seen_runs(options: BigBirdOptions, block: int, count: int) -> tuple[tuple[int, int], ...]:
    """What `_seen` names as runs of keys, neighbours as one."""
    found: list[tuple[int, int]] = []
    for seen in _seen(options, block, count):
        start = seen * options.block
        first = found.pop()[0] if found and found[-1][1] == start else start
        found.append((first, start + options.block))
    return tuple(found)
