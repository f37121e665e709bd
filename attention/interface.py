"""What every attention backend is: its two verbs, its state and its cost law.

Read this file and you can write a backend. No attention is computed here; that is `backends/<name>.py`, by `kernels`.
The words it uses are told in `shapes` (what a call is given), `parts` (a computation that pauses) and `pool` (states).

Legend of shapes, used at line ends throughout `attention` and, but for C, `service.model`:

    T   packed tokens: the new tokens of all sequences of a batch, one behind the other, never padded
    C   new tokens of one sequence, or of a block of it
    N   keys one sequence can see: its earlier tokens and its new ones
    B   sequences that are continued by one token each
    H   query heads        G   key-value heads (H is a multiple of G)        R   H // G query heads per key-value head
    D   head width         m   random features

A backend answers whole sequences (`attend`) or continues them from a state (`extend`). Both are inference: no gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from attention import steps
from attention.kernels import int8
from attention.kernels.library import Told
from attention.parts import Parts, finish
from attention.pool import StatePool, StateTensor
from attention.shapes import MOST_TOKENS, Cost, HeadShape, Segments

MOST_SEED = (1 << 63) - 1


class BackendOptions(BaseModel):
    """Base of every backend's options: immutable, unknown keys refused, every field with a default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class AttentionBackend(ABC):
    """One way to attend. A subclass is one file in `backends/`; the file's name is the backend's name.

    `attend` and `extend` check their input and go through the sequences; a backend says how one sequence is answered
    (`attend_sequence`), how one is continued (`extend_sequence`), and, where that is faster, how many are continued by one
    token each (`step`).

    Attributes:
        Options: the backend's own options.
        impl: the implementation in force, see `kernels.implementation`.
        packed: by the value of `causal`, what answers a whole packed batch in one call, where the implementation can.
        exact: True when the backend is a softmax over the keys that `visible` names; False for kernels of their own.
        takes_int8: whether its states are keys and values, which may lie in 8 bits (`HeadShape.kv`).
        score_cap: where it is set, a score s is weighed as cap tanh(s / cap).
        score_bias: where it is set, what is added to scores by distance, a `relative.table`.
    """

    Options: ClassVar[type[BackendOptions]]
    exact: bool = True
    impl: str = "torch"
    takes_int8: ClassVar[bool] = False
    packed: Mapping[bool, Callable[[Tensor, Tensor, Tensor, Segments], Tensor]] = MappingProxyType({})
    score_cap: float | None = None
    score_bias: Tensor | None = None

    def __init__(self, options: BackendOptions, shape: HeadShape) -> None:
        if shape.kv is not None and not self.takes_int8:
            raise ValueError(f"{self.name} cannot keep keys and values in 8 bits (kv: int8)")
        self.options = options
        self.shape = shape

    @property
    def name(self) -> str:
        """The name in configs, requests and metrics: that of the backend's file."""
        return type(self).__module__.rsplit(".", 1)[-1]

    @property
    def directions(self) -> tuple[bool, ...]:
        """The values of `causal` that `attend` takes. `extend` needs True among them."""
        return (True, False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool) -> Tensor:
        """Answer whole sequences; keeps nothing.

        Args:
            q: (T, H, D). k, v: (T, G, D). All of the backend's dtype and device.
            segments: the sequences; every `past` is 0.
            causal: a token sees itself and what came before only.

        Returns:
            (T, H, D), the inputs' dtype. A row that sees nothing is zeros.

        Raises:
            ValueError: wrong shape, strides, dtype or device, a past that is not 0, or a direction the backend does not define;
                a tensor that gradients are asked of.
        """
        self.check_attend(q, k, v, segments, causal)
        k, v = self.as_kept(k, v)
        if self.shape.kv is None and (packed := self.packed.get(causal)):
            return packed(q, k, v, segments)
        out = q.new_empty(q.shape)
        for start, end, _ in segments.spans():
            finish(self.attend_sequence(q[start:end], k[start:end], v[start:end], causal, out[start:end]))
        return out

    def extend(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, pool: StatePool, layer: int, slots: Sequence[int]
    ) -> Tensor:
        """Append these tokens to each slot's state and answer them, causally. A prefill chunk and a decode step alike.

        Args:
            q: (T, H, D). k, v: (T, G, D).
            segments: new tokens and tokens in state of each sequence; `past` is what earlier calls appended.
            pool: a pool of this backend. `slots` names one slot per sequence. Changed: the slots' state at `layer`.

        Returns:
            (T, H, D), the inputs' dtype.

        Raises:
            ValueError: wrong shape, strides, dtype or device, a tensor that gradients are asked of, another backend's pool, a
                slot count that differs, a slot that cannot hold so many tokens or does not hold `past`, or a backend
                without a causal form.
        """
        out = q.new_empty(q.shape)
        finish(self.extending(q, k, v, segments, pool, layer, slots, out))
        return out

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
        """`extend` into a tight `out` (T, H, D), pausing between parts so that its caller may do something more urgent.

        Until it ends, out and the slots' state at `layer` are undefined. A batch of single tokens does not pause.

        by_steps: each token is answered as a step of its own would answer it, bit for bit, and all but the first of a sequence
            can be taken back (`StatePool.take_back`). No sequence may have more of them than its `runway`.
        """
        self.check_extend(q, k, v, segments, pool, layer, out)
        if by_steps and any(end - start > self.runway(past) for start, end, past in segments.spans()):
            behind = f"behind {segments.past}, received {segments.lengths}"
            raise ValueError(f"{self.name} takes fewer single steps at once {behind}")
        k, v = self.as_kept(k, v)
        states = pool.take(slots, layer, segments)
        if segments.total == len(slots):
            self.step(q, k, v, segments.past, states, out)
        elif by_steps:
            yield from steps.through(self, q, k, v, segments, states, pool.undo(slots, layer), out)
        else:
            yield from self._extend_mixed(q, k, v, segments, states, out)
        pool.settle(slots, layer, segments, by_steps)

    def _extend_mixed(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> Parts:
        """Sequences of one token by a step, as they would be alone, and the others one after the other."""
        spans = list(zip(states, segments.spans(), strict=True))
        if single := [(state, start, past) for state, (start, end, past) in spans if end - start == 1]:
            alone, rows, pasts = zip(*single, strict=True)
            steps.step(self, q, k, v, rows, pasts, alone, out)
            yield
        for state, (start, end, past) in spans:
            if end - start > 1:
                yield from self.extend_sequence(q[start:end], k[start:end], v[start:end], past, state, out[start:end])

    def as_kept(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (T, G, D) as a state keeps them, and as they are attended to: in 8 bits int8 (T, G, D + 4)."""
        return (k, v) if self.shape.kv is None else int8.quantize(k, v, self.impl)

    @abstractmethod
    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> Parts:
        """Answer one whole sequence into `out` (T, H, D). k and v are as `as_kept` has them."""

    def attend_sequences(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, out: Tensor) -> Parts:
        """Answer whole sequences, both ways, into `out` (T, H, D), as `attend_sequence` does each of them."""
        for start, end, _ in segments.spans():
            yield from self.attend_sequence(q[start:end], k[start:end], v[start:end], False, out[start:end])

    @abstractmethod
    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        """Append one sequence's new tokens to its state at one layer and answer them into `out` (T, H, D). k, v: likewise."""

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, past: Sequence[int], states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> None:
        """Append one token to each of many sequences: q (B, H, D), one `past` and one state per sequence."""
        for i, state in enumerate(states):
            finish(self.extend_sequence(q[i : i + 1], k[i : i + 1], v[i : i + 1], past[i], state, out[i : i + 1]))

    def told(self, past: Sequence[int], states: Sequence[dict[str, Tensor]]) -> Told | None:
        """What answers `step` at each of the backend's layers from C, for one token of each of many sequences.

        states: as of `state`, each tensor (layers, ...). None: the step of this backend, or this step, is not all in C.
        """
        return None

    @abstractmethod
    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        """What one layer keeps of a sequence of up to `max_tokens` tokens."""

    def cost(self, queries: int, keys: int, *, causal: bool) -> Cost:
        """Cost of `queries` new tokens at the end of a sequence of `keys` tokens (the new ones included), one layer.

        Raises:
            ValueError: no new token, or more of them than the sequence has.
        """
        if not 1 <= queries <= keys <= MOST_TOKENS:
            raise ValueError(f"a cost is that of 1 to keys queries at the end of keys tokens, received {queries} of {keys}")
        cost = self.law(queries, keys, causal=causal)
        if self.shape.kv is None:
            return cost
        return replace(cost, workspace_bytes=cost.workspace_bytes + 2 * queries * self.shape.kept_bytes)  # what `as_kept` makes

    @abstractmethod
    def law(self, queries: int, keys: int, *, causal: bool) -> Cost:
        """`cost` of 1 <= queries <= keys."""

    def visible(self, i: Tensor, j: Tensor, length: int | Tensor) -> Tensor:
        """Whether query position `i` sees key position `j` in a sequence of `length` tokens: an exact backend's definition.

        Broadcasts int64 positions to a bool tensor. A causal answer is that of the sequence as it stood when the token
        came: `visible(i, j, i + 1) & (j <= i)`.
        """
        raise NotImplementedError(f"{self.name} is no softmax over a set of keys")

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """What each key weighs for each query: q (..., N, D), k and v (..., M, D) to (..., N, M), up to a factor per query.

        The definition of a backend that is no softmax, in the inputs' dtype. `i` and `j` are the int64 positions of queries
        and keys, (N, 1) and (1, M).
        """
        raise NotImplementedError(f"{self.name} is a softmax, defined by visible")

    @property
    def edge(self) -> int:
        """Sequence length from which all parts of the pattern are in play: checks look on both sides of it."""
        return 1

    @property
    def keeps_all(self) -> bool:
        """Whether a state keeps position p at index p for good, so that it holds the state of each of its beginnings."""
        return False

    def runway(self, past: int) -> int:
        """How many tokens behind `past` may be appended by steps at once, so that all but the first can be taken back."""
        return MOST_TOKENS

    def touched(self, state: dict[str, Tensor], position: int) -> Sequence[Tensor]:
        """Views of what of a state the token at a position, within a runway but not its first, writes over: all of it.

        A backend under which it only adds to the state says so by returning none, and says by `cut` what that leaves.
        """
        return list(state.values())

    def cut(self, state: dict[str, Tensor], tokens: int, total: int) -> None:  # noqa: B027 (most have nothing to clear)
        """Clear away what the last of `total` tokens of a sequence have added to a state, those behind the first `tokens`."""

    def undo_bytes(self, max_tokens: int, count: int) -> int:
        """Most bytes kept of a state of up to `max_tokens` tokens, at one layer, while `count` of them can be taken back."""
        state = {name: spec.new(torch.device("meta")) for name, spec in self.state(max_tokens).items()}
        return count * sum(view.nbytes for view in self.touched(state, max_tokens - 1))

    def carry(self, state: dict[str, Tensor], into: dict[str, Tensor], tokens: int) -> None:
        """Make a fresh state of one layer that of the first `tokens` tokens of another, which may be of another size.

        Both hold `tokens` tokens. `state` is of exactly so many, or of more where it `keeps_all`. What either lacks is
        not in play yet at so many tokens.
        """
        for name in state.keys() & into.keys():
            count = min(len(state[name]), len(into[name]))
            into[name][:count] = state[name][:count]

    def state_bytes(self, max_tokens: int) -> int:
        """Bytes of `state(max_tokens)`: one layer, one sequence."""
        return sum(spec.nbytes for spec in self.state(max_tokens).values())

    def new_pool(self, layers: int, max_bytes: int) -> StatePool:
        """An empty pool for models of `layers` layers that never holds more than `max_bytes`."""
        return StatePool([self] * layers, max_bytes)

    def describe(self) -> dict[str, object]:
        """Name, options and implementation in force, for receipts and `/info`."""
        return {"name": self.name, "options": self.options.model_dump(), "exact": self.exact, "impl": self.impl}

    def check(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> None:
        """Raise ValueError unless q, k, v fit this backend and `segments`."""
        shape, takes_gradients = self.shape, torch.is_grad_enabled()
        groups, width, dtype, device = shape.key_value_heads, shape.head_width, shape.dtype, shape.device.type
        for label, tensor, heads in (("q", q, shape.query_heads), ("k", k, groups), ("v", v, groups)):
            wanted = (segments.total, heads, width)
            if tensor.shape != wanted:
                raise ValueError(f"{label} must have shape {wanted}, received {tuple(tensor.shape)}")
            if tensor.dtype != dtype or tensor.device.type != device:
                raise ValueError(f"{label} must be {dtype} on {shape.device}, received {tensor.dtype} on {tensor.device}")
            if tensor.stride(2) != 1 and width > 1:
                raise ValueError(f"the elements of a head of {label} must lie side by side, received strides {tensor.stride()}")
            if takes_gradients and tensor.requires_grad:
                raise ValueError(f"attention here has no gradients, and {label} asks for them: use torch.inference_mode()")

    def check_attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> None:
        """`check`, and that the call is one of whole sequences in a direction this backend defines."""
        self.check(q, k, v, segments)
        if any(segments.past):
            raise ValueError(f"attend takes whole sequences, received past {segments.past}; use extend")
        if causal not in self.directions:
            wanted = "causal" if True in self.directions else "bidirectional"
            raise ValueError(f"{self.name} is {wanted} only, received causal={causal}")

    def check_extend(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, pool: StatePool, layer: int, out: Tensor
    ) -> None:
        """`check`, and that this backend can continue sequences of this pool and write the answer."""
        self.check(q, k, v, segments)
        if True not in self.directions:
            raise ValueError(f"{self.name} has no causal form, so no sequence can be continued with it")
        if (owner := pool.backend(layer)) is not self:
            raise ValueError(f"the pool must be of this backend (its `new_pool`), received one of {owner.describe()}")
        if out.shape != q.shape or out.dtype != q.dtype or out.device != q.device or not out.is_contiguous():
            wanted = f"tight, {tuple(q.shape)}, {q.dtype} on {q.device}"
            raise ValueError(
                f"out must be {wanted}, received {tuple(out.shape)}, {out.dtype} on {out.device}, strides {out.stride()}"
            )
