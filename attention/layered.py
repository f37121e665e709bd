"""A backend per layer: the windows that a checkpoint was trained with, layer by layer, as one backend, `native`.

Mistral 7B sees a window in every layer, Qwen2 in its last ones, Gemma 3 everything in every sixth layer only. A layer without a
window is dense, one with a window is a sliding window, whose sinks are the checkpoint's; layers of one kind share a backend.
Scores may have a cap, as Gemma 2's (`kernels/softmax/capped.py`). A cost is that of a layer on average, with the workspace of
the widest, so that `layers` times one is the model's, as everywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from attention import relative
from attention.backends.bigbird import BigBird, BigBirdOptions
from attention.backends.dense import Dense, DenseOptions
from attention.backends.sliding_window import SlidingWindow, SlidingWindowOptions
from attention.interface import AttentionBackend, BackendOptions
from attention.kernels import implementation
from attention.kernels.softmax.biased import Biased
from attention.kernels.softmax.capped import Capped
from attention.parts import Parts
from attention.pool import StatePool, StateTensor
from attention.shapes import Cost, HeadShape, Segments

NAME = "native"


class LayeredOptions(BackendOptions):
    """The windows, layer by layer, the cap of scores, and who computes them."""

    windows: tuple[int | None, ...] = Field(
        (), description="of each layer: earlier tokens that a token sees, null for all of them; the checkpoint says it"
    )
    sinks: int = Field(0, ge=0, description="first tokens that stay visible in layers with a window; the checkpoint says it")
    score_cap: float | None = Field(None, gt=0, description="a score s is weighed as cap tanh(s / cap); the checkpoint says it")
    blocks: tuple[int, int] | None = Field(
        None, description="BigBird's: tokens of a block, and blocks drawn for each; the checkpoint says it"
    )
    score_bias: tuple[tuple[float, ...], ...] | None = Field(
        None,
        exclude=True,  # hundreds of numbers: `describe` is a label of metrics
        description="of each head: added to scores by distance, see attention.relative; the checkpoint says it",
    )
    impl: implementation.Impl = "auto"


class Layered(AttentionBackend):
    """Dense and windowed layers. `layers` holds each layer's backend, `counts` how many layers each has.

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
        self.layers: tuple[AttentionBackend, ...] = tuple(kinds[window] for window in options.windows)
        self.counts: Mapping[AttentionBackend, int] = Counter(self.layers)
        self.impl = "+".join(sorted({kind.impl for kind in self.counts}))

    @property
    def name(self) -> str:
        return NAME

    @property
    def directions(self) -> tuple[bool, ...]:
        if self.options.score_bias is not None:
            return (False,)
        return tuple(causal for causal in (True, False) if all(causal in kind.directions for kind in self.counts))

    @property
    def keeps_all(self) -> bool:
        return all(kind.keeps_all for kind in self.counts)

    @property
    def edge(self) -> int:
        return max(kind.edge for kind in self.counts)

    def visible(self, i: Tensor, j: Tensor, length: int | Tensor) -> Tensor:
        """What any of the layers sees."""
        seen = [kind.visible(i, j, length) for kind in self.counts]
        return torch.stack(torch.broadcast_tensors(*seen)).any(0)

    def new_pool(self, layers: int, max_bytes: int) -> StatePool:
        if layers != len(self.layers):
            raise ValueError(f"{NAME} was built for {len(self.layers)} layers, received {layers}")
        return StatePool(self.layers, max_bytes)

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
        if pool.backends != self.layers:
            raise ValueError(f"the pool must be of this backend (its `new_pool`), received one of {len(pool.backends)} layers")
        yield from pool.backend(layer).extending(q, k, v, segments, pool, layer, slots, out)

    def law(self, queries: int, keys: int, *, causal: bool) -> Cost:
        costs = {kind: kind.law(queries, keys, causal=causal) for kind in self.counts}
        flops = sum(count * costs[kind].flops for kind, count in self.counts.items())
        workspace = max(cost.workspace_bytes for cost in costs.values())
        return Cost(flops // len(self.layers), workspace, self.state_bytes(keys))

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


def _build(window: int | None, options: LayeredOptions, shape: HeadShape) -> AttentionBackend:
    cap, biases, impl = options.score_cap, options.score_bias, options.impl
    if cap is not None or biases is not None:
        if impl not in ("auto", "torch"):
            kind = "capped" if biases is None else "biased"
            raise ValueError(f"impl is {impl!r}, but {kind} scores are computed by torch alone; allowed here: 'auto', 'torch'")
        impl = "torch"
    if biases is not None and (cap is not None or window is not None):
        raise ValueError("score_bias is for layers that see everything, their scores uncapped")
    if options.blocks is not None and (cap is not None or biases is not None or window is not None):
        raise ValueError("blocks are for layers without windows, caps and biases")
    built: Dense | SlidingWindow | BigBird
    if options.blocks is not None:
        built = BigBird(_bigbird(options, impl), shape)
    elif window is None:
        built = Dense(DenseOptions(impl=impl), shape)
    else:
        built = SlidingWindow(SlidingWindowOptions(window=window, sinks=options.sinks, impl=impl), shape)
    if cap is not None:
        built.softmax, built.score_cap = Capped(cap), cap
    if biases is not None:
        built.score_bias = relative.table(biases).to(shape.device)
        built.softmax = Biased(built.score_bias)
    return built


def _bigbird(options: LayeredOptions, impl: str) -> BigBirdOptions:
    """As BigBird's checkpoints have it: the first and the last block are global, and a short sequence sees everything."""
    assert options.blocks is not None, "asked for blocks only"
    block, drawn = options.blocks
    chosen = {"block": block, "random_blocks": drawn, "global_blocks": 1, "closing_blocks": 1, "full_blocks": 5 + 2 * drawn}
    return BigBirdOptions.model_validate(chosen | {"impl": impl})


def shares(backend: AttentionBackend) -> Mapping[AttentionBackend, float]:
    """The backends of a model's layers, and which part of the layers each has: itself alone for all but `native`."""
    if not isinstance(backend, Layered):
        return {backend: 1.0}
    return {kind: count / len(backend.layers) for kind, count in backend.counts.items()}
