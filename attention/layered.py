"""A backend per layer: the windows that a checkpoint was trained with, layer by layer, as one backend, `native`.

Mistral 7B sees a window in every layer, Qwen2 in its last ones, Gemma 3 everything in every sixth layer only. A layer without a
window is dense, one with a window is a sliding window without sinks; layers of one kind share a backend and a pool. Scores may
have a cap, as Gemma 2's (`capped`). A cost is that of a layer on average, with the workspace of the widest, so that `layers`
times one is the model's, as everywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from attention import implementation
from attention.backends.dense import Dense, DenseOptions
from attention.backends.sliding_window import SlidingWindow, SlidingWindowOptions
from attention.capped import Capped
from attention.interface import AttentionBackend, BackendOptions, Cost, HeadShape, Parts, Segments, StatePool, StateTensor

NAME = "native"


class LayeredOptions(BackendOptions):
    """The windows, layer by layer, the cap of scores, and who computes them."""

    windows: tuple[int | None, ...] = Field(
        (), description="of each layer: earlier tokens that a token sees, null for all of them; the checkpoint says it"
    )
    score_cap: float | None = Field(None, gt=0, description="a score s is weighed as cap tanh(s / cap); the checkpoint says it")
    impl: implementation.Impl = Field("auto", description="torch, native (CPU), xformers (CUDA), or auto: what can run here")


class Layered(AttentionBackend):
    """Dense and windowed layers. `layers` holds each layer's backend.

    Raises:
        ValueError: no layer, or a window below one.
    """

    Options = LayeredOptions
    options: LayeredOptions

    def __init__(self, options: LayeredOptions, shape: HeadShape) -> None:
        super().__init__(options, shape)
        if not options.windows:
            raise ValueError(f"{NAME} is the pattern of a checkpoint with windows of its own, and there is none")
        kinds = {window: _build(window, options, shape) for window in dict.fromkeys(options.windows)}
        self.layers = tuple(kinds[window] for window in options.windows)
        self.counts: Mapping[AttentionBackend, int] = Counter(self.layers)
        self._place = [self.layers[:layer].count(kind) for layer, kind in enumerate(self.layers)]  # among those of its kind
        self.impl = "+".join(sorted({kind.impl for kind in self.counts}))

    @property
    def name(self) -> str:
        return NAME

    @property
    def directions(self) -> tuple[bool, ...]:
        return (True,)

    @property
    def edge(self) -> int:
        return max(kind.edge for kind in self.counts)

    def visible(self, i: Tensor, j: Tensor, length: int | Tensor) -> Tensor:
        """What any of the layers sees."""
        seen = [kind.visible(i, j, length) for kind in self.counts]
        return torch.stack(torch.broadcast_tensors(*seen)).any(0)

    def new_pool(self, layers: int, max_bytes: int) -> LayeredPool:
        return LayeredPool(self, layers, max_bytes)

    def extending(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Segments,
        pool: StatePool,
        layer: int,
        slots: Sequence[int],
        out: Tensor,
    ) -> Parts:
        self.check_extend(q, k, v, segments, pool, out)
        assert isinstance(pool, LayeredPool), "`new_pool` makes no other"
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"the pool has layers 0 to {len(self.layers) - 1}, received {layer}")
        kind = self.layers[layer]
        yield from kind.extending(q, k, v, segments, pool.of[kind], self._place[layer], pool.slots_of(kind, slots), out)

    def law(self, queries: int, keys: int, *, causal: bool) -> Cost:
        costs = {kind: kind.law(queries, keys, causal=causal) for kind in self.counts}
        flops = sum(count * costs[kind].flops for kind, count in self.counts.items())
        return Cost(flops // len(self.layers), max(cost.workspace_bytes for cost in costs.values()), self.state_bytes(keys))

    def state_bytes(self, max_tokens: int) -> int:
        total = sum(count * kind.state_bytes(max_tokens) for kind, count in self.counts.items())
        return -(-total // len(self.layers))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool) -> Tensor:
        raise ValueError(f"{NAME} has a backend per layer: ask one of its `layers`")

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> Parts:
        raise AssertionError("a layer's own backend answers")

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        raise AssertionError("a layer's own backend answers")

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        raise AssertionError("a layer's own backend knows it")


class LayeredPool(StatePool):
    """A pool per kind of layer behind one limit; a slot is one in each of them."""

    def __init__(self, backend: Layered, layers: int, max_bytes: int) -> None:
        if layers != len(backend.layers):
            raise ValueError(f"{NAME} was built for {len(backend.layers)} layers, received {layers}")
        super().__init__(backend, layers, max_bytes)
        self.of = {kind: kind.new_pool(count, max_bytes) for kind, count in backend.counts.items()}
        self._inner: dict[int, tuple[int, dict[AttentionBackend, int]]] = {}  # by slot: its tokens, its slot in each pool

    def slots_of(self, kind: AttentionBackend, slots: Sequence[int]) -> list[int]:
        """The slots in one of the pools; one that is not in use is -1, which no pool has."""
        return [self._inner[slot][1][kind] if slot in self._inner else -1 for slot in slots]

    def slot_bytes(self, max_tokens: int) -> int:
        return sum(pool.slot_bytes(max_tokens) for pool in self.of.values())

    def allocate(self, max_tokens: int) -> int:
        self._need(self.slot_bytes(max_tokens))
        return self._hold(max_tokens, lambda kind: self.of[kind].allocate(max_tokens))

    def copy(self, slot: int) -> int:
        max_tokens, inner = self._inner[slot]
        self._need(self.slot_bytes(max_tokens))
        return self._hold(max_tokens, lambda kind: self.of[kind].copy(inner[kind]))

    def release(self, slot: int) -> None:
        _, inner = self._inner.pop(slot)
        self._give_back(inner)

    def tensors(self, slot: int) -> dict[str, Tensor]:
        raise AssertionError("states differ by layer: ask the pools in `of`")

    def pretend(self, slot: int, tokens: int) -> None:
        for kind, inner in self._inner[slot][1].items():
            self.of[kind].pretend(inner, tokens)

    def __len__(self) -> int:
        return len(self._inner)

    def _hold(self, max_tokens: int, take: Callable[[AttentionBackend], int]) -> int:
        """A slot in every pool, or in none where one of them fails."""
        taken: dict[AttentionBackend, int] = {}
        try:
            for kind in self.of:
                taken[kind] = take(kind)
        except BaseException:
            self._give_back(taken)
            raise
        slot, self._next = self._next, self._next + 1
        self._inner[slot] = max_tokens, taken
        self.bytes_in_use = sum(pool.bytes_in_use for pool in self.of.values())
        return slot

    def _give_back(self, inner: Mapping[AttentionBackend, int]) -> None:
        for kind, slot in inner.items():
            self.of[kind].release(slot)
        self.bytes_in_use = sum(pool.bytes_in_use for pool in self.of.values())


def _build(window: int | None, options: LayeredOptions, shape: HeadShape) -> AttentionBackend:
    cap, impl = options.score_cap, options.impl
    if cap is not None:
        if impl not in ("auto", "torch"):
            raise ValueError(f"impl is {impl!r}, but capped scores are computed by torch alone; allowed here: 'auto', 'torch'")
        impl = "torch"
    built: Dense | SlidingWindow
    if window is None:
        built = Dense(DenseOptions(impl=impl), shape)
    else:
        built = SlidingWindow(SlidingWindowOptions(window=window, sinks=0, impl=impl), shape)
    if cap is not None:
        built.softmax, built.score_cap = Capped(cap), cap
    return built


def shares(backend: AttentionBackend) -> Mapping[AttentionBackend, float]:
    """The backends of a model's layers, and which part of the layers each has: itself alone for all but `native`."""
    if not isinstance(backend, Layered):
        return {backend: 1.0}
    return {kind: count / len(backend.layers) for kind, count in backend.counts.items()}
