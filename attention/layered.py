"""A backend per layer, as one backend behind the same verbs: `layered`, as its options say, and `native`, as a checkpoint does.

Needles need few layers: of the embedded model's six the last one alone, seeing everything, finds what all of them would, so a
plan of windows with a dense or a topk layer has the recall of dense at little more than a window's price. A checkpoint with
windows of its own is served by `native`: Mistral 7B sees a window in every layer, Qwen2 in its last ones, Gemma 3 everything in
every sixth layer only. There a layer without a window is dense, one with a window is a sliding window, whose sinks are the
checkpoint's, and scores may have a cap, as Gemma 2's (`kernels/softmax/capped.py`), or biases by distance.

Layers of one kind share a backend. A cost is that of a layer on average, with the workspace of the widest, so that `layers`
times one is the model's, as everywhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from attention import relative
from attention.backends import named, names
from attention.backends.bigbird import BigBird, BigBirdOptions
from attention.backends.dense import Dense, DenseOptions
from attention.backends.sliding_window import SlidingWindow, SlidingWindowOptions
from attention.interface import AttentionBackend, BackendOptions
from attention.kernels import implementation
from attention.kernels.softmax.biased import Biased
from attention.parts import Parts
from attention.pool import StatePool, StateTensor
from attention.shapes import Cost, HeadShape, Segments

NATIVE, LAYERED = "native", "layered"
MOST_LAYERS = 1024
Kind = dict[str, dict[str, Any] | None]  # one backend by name, with its options


class PerLayer(AttentionBackend):
    """Layers of several kinds, each the backend of its own. `layers` holds each layer's, `counts` how many layers each has."""

    takes_int8 = True  # where each layer's does

    def __init__(self, options: BackendOptions, shape: HeadShape, layers: Sequence[AttentionBackend]) -> None:
        super().__init__(options, shape)
        self.layers = tuple(layers)
        self.counts: Mapping[AttentionBackend, int] = Counter(self.layers)
        self.impl = "+".join(sorted({kind.impl for kind in self.counts}))
        self.exact = all(kind.exact for kind in self.counts)

    @property
    def directions(self) -> tuple[bool, ...]:
        return tuple(causal for causal in (True, False) if all(causal in kind.directions for kind in self.counts))

    @property
    def keeps_all(self) -> bool:
        return all(kind.keeps_all for kind in self.counts)

    @property
    def edge(self) -> int:
        return max(kind.edge for kind in self.counts)

    def runway(self, past: int) -> int:
        return min(kind.runway(past) for kind in self.counts)

    def visible(self, i: Tensor, j: Tensor, length: int | Tensor) -> Tensor:
        """What any of the layers sees."""
        seen = [kind.visible(i, j, length) for kind in self.counts]
        return torch.stack(torch.broadcast_tensors(*seen)).any(0)

    def new_pool(self, layers: int, max_bytes: int) -> StatePool:
        if layers != len(self.layers):
            raise ValueError(f"{self.name} was built for {len(self.layers)} layers, received {layers}")
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
        by_steps: bool = False,
    ) -> Parts:
        if pool.backends != self.layers:
            raise ValueError(f"the pool must be of this backend (its `new_pool`), received one of {len(pool.backends)} layers")
        yield from pool.backend(layer).extending(q, k, v, segments, pool, layer, slots, out, by_steps)

    def law(self, queries: int, keys: int, *, causal: bool) -> Cost:
        costs = {kind: kind.law(queries, keys, causal=causal) for kind in self.counts}
        flops = sum(count * costs[kind].flops for kind, count in self.counts.items())
        workspace = max(cost.workspace_bytes for cost in costs.values())
        return Cost(flops // len(self.layers), workspace, self.state_bytes(keys))

    def state_bytes(self, max_tokens: int) -> int:
        total = sum(count * kind.state_bytes(max_tokens) for kind, count in self.counts.items())
        return -(-total // len(self.layers))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool) -> Tensor:
        raise ValueError(f"{self.name} has a backend per layer: ask one of its `layers`")

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> Parts:
        raise AssertionError("a layer's own backend answers")

    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        raise AssertionError("a layer's own backend answers")

    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        raise AssertionError("a layer's own backend knows it")


class LayeredOptions(BackendOptions):
    """What each layer is."""

    layers: dict[str, Kind] = Field(
        default_factory=dict, description="by layer, as in `5`, or layers, as in `0-4`: a backend's name and its options"
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _by_text(cls, layers: Any) -> Any:
        """YAML reads the 5 of `5: {dense: {}}` as a number."""
        return {str(key): value for key, value in layers.items()} if isinstance(layers, Mapping) else layers

    @field_validator("layers")
    @classmethod
    def _each_layer_has_one_backend(cls, layers: dict[str, Kind]) -> dict[str, Kind]:
        told = sorted((layer, key) for key in layers for layer in _range(key))
        for layer, (found, key) in enumerate(told):
            if found != layer:
                fault = f"layer {layer} has no backend" if found > layer else f"layer {found} has two, the second in {key}"
                raise ValueError(f"each layer must have one backend, from layer 0 on: {fault}")
        for kind in layers.values():
            _options(kind)
        return layers

    def kinds(self) -> list[Kind]:
        """What each layer is, in order."""
        return [kind for _, kind in sorted((layer, kind) for key, kind in self.layers.items() for layer in _range(key))]


class Layered(PerLayer):
    """A backend per layer, as the options say.

    Raises:
        ValueError: no layer, or a backend without a causal form.
    """

    Options = LayeredOptions
    options: LayeredOptions

    def __init__(self, options: LayeredOptions, shape: HeadShape) -> None:
        if not options.layers:
            raise ValueError(f"{LAYERED} is what its option layers says of each layer, and it says nothing")
        told = [_options(kind) for kind in options.kinds()]
        kinds = {each: _made(*each, shape) for each in dict.fromkeys(told)}
        super().__init__(options, shape, [kinds[each] for each in told])

    @property
    def name(self) -> str:
        return LAYERED


class NativeOptions(BackendOptions):
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


class Native(PerLayer):
    """Dense and windowed layers, as a checkpoint has them.

    Raises:
        ValueError: no layer, or a window below one.
    """

    Options = NativeOptions
    options: NativeOptions

    def __init__(self, options: NativeOptions, shape: HeadShape) -> None:
        if not options.windows:
            raise ValueError(f"{NATIVE} is the pattern of a checkpoint with windows of its own, and there is none")
        kinds = {window: _build(window, options, shape) for window in dict.fromkeys(options.windows)}
        super().__init__(options, shape, [kinds[window] for window in options.windows])

    @property
    def name(self) -> str:
        return NATIVE

    @property
    def directions(self) -> tuple[bool, ...]:
        return super().directions if self.options.score_bias is None else (False,)


def _range(key: str) -> range:
    """The layers that a key names. Raises ValueError for one that names none."""
    found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", key)
    layers = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
    if not layers or layers[-1] >= MOST_LAYERS:
        raise ValueError(f"layers are named by a number below {MOST_LAYERS} or two, as in 5 or 0-4, received {key!r}")
    return layers


def _options(kind: Kind) -> tuple[type[AttentionBackend], BackendOptions]:
    """The backend and the options that a kind names. Raises ValueError where it does not name one backend of `names()`."""
    if len(kind) != 1 or not set(kind) <= set(names()):
        raise ValueError(f"a layer has one backend of {', '.join(names())}, received {', '.join(kind) or 'none'}")
    [(name, options)] = kind.items()
    return named(name), named(name).Options.model_validate(options or {})


def _made(cls: type[AttentionBackend], options: BackendOptions, shape: HeadShape) -> AttentionBackend:
    """The backend of a layer. Raises ValueError for one without a causal form."""
    made = cls(options, shape)
    if True not in made.directions:
        raise ValueError(f"{made.name} has no causal form, so it can be no layer of {LAYERED}")
    return made


def _build(window: int | None, options: NativeOptions, shape: HeadShape) -> AttentionBackend:
    cap, biases, impl = options.score_cap, options.score_bias, str(options.impl)
    if biases is not None:
        if impl not in ("auto", "torch"):
            raise ValueError(f"impl is {impl!r}, but biased scores are computed by torch alone; allowed here: 'auto', 'torch'")
        impl = "torch"
    capped = None
    if cap is not None:
        impl, capped = implementation.capped(impl, shape, cap)
    if biases is not None and (cap is not None or window is not None):
        raise ValueError("score_bias is for layers that see everything, their scores uncapped")
    if options.blocks is not None and (cap is not None or biases is not None or window is not None):
        raise ValueError("blocks are for layers without windows, caps and biases")
    built: Dense | SlidingWindow | BigBird
    if options.blocks is not None:
        built = BigBird(_bigbird(options, impl), shape)
    elif window is None:
        built = Dense(DenseOptions.model_validate({"impl": impl}), shape)
    else:
        chosen = {"window": window, "sinks": options.sinks, "impl": impl}
        built = SlidingWindow(SlidingWindowOptions.model_validate(chosen), shape)
    if capped is not None:
        built.softmax, built.score_cap = capped, cap
    if biases is not None:
        built.score_bias = relative.table(biases).to(shape.device)
        built.softmax = Biased(built.score_bias)
    return built


def _bigbird(options: NativeOptions, impl: str) -> BigBirdOptions:
    """As BigBird's checkpoints have it: the first and the last block are global, and a short sequence sees everything."""
    assert options.blocks is not None, "asked for blocks only"
    block, drawn = options.blocks
    chosen = {"block": block, "random_blocks": drawn, "global_blocks": 1, "closing_blocks": 1, "full_blocks": 5 + 2 * drawn}
    return BigBirdOptions.model_validate(chosen | {"impl": impl})


def layers_of(backend: AttentionBackend, count: int) -> Sequence[AttentionBackend]:
    """The backend of each of a model's `count` layers."""
    return backend.layers if isinstance(backend, PerLayer) else (backend,) * count


def shares(backend: AttentionBackend) -> Mapping[AttentionBackend, float]:
    """The backends of a model's layers, and which part of the layers each has: itself alone but for a `PerLayer`."""
    if not isinstance(backend, PerLayer):
        return {backend: 1.0}
    return {kind: count / len(backend.layers) for kind, count in backend.counts.items()}
