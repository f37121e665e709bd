"""What every attention backend is: its inputs, its two verbs, its state and its cost law.

In this file are the words that all backends share. No attention is computed here; that is `backends/<name>.py`.

Legend of shapes, used at line ends throughout `attention` and `service.model`:

    T   packed tokens: the new tokens of all sequences of a batch, one behind the other, never padded
    N   keys one sequence can see: its earlier tokens and its new ones
    H   query heads        G   key-value heads (H is a multiple of G)        R   H // G query heads per key-value head
    D   head width         m   random features

A backend answers whole sequences (`attend`) or continues them from a state (`extend`). Both are inference: no gradients.
`Parts` is a computation that can pause: each step of the iterator does a part of about a millisecond, the last one ends it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

Parts = Iterator[None]

MOST_TOKENS = 1 << 31  # no sequence is longer, and no option that counts tokens means more
MOST_SEED = (1 << 63) - 1

CPU = torch.device("cpu")
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def finish(parts: Parts) -> None:
    """Run a computation to its end without a pause."""
    deque(parts, maxlen=0)


class BackendOptions(BaseModel):
    """Base of every backend's options: immutable, unknown keys refused, every field with a default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class HeadShape:
    """The heads a backend is built for.

    Raises:
        ValueError: a count below one, query heads that are no multiple of the key-value heads, or a dtype that the
            device cannot multiply at a usable speed (float16 on CPU: 1 GFLOP/s).
    """

    query_heads: int  # H
    key_value_heads: int  # G
    head_width: int  # D
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", torch.device(self.device))
        for field in ("query_heads", "key_value_heads", "head_width"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, received {getattr(self, field)}")
        if self.query_heads % self.key_value_heads:
            raise ValueError(
                f"query_heads must be a multiple of key_value_heads, received {self.query_heads} and {self.key_value_heads}"
            )
        allowed = CPU_DTYPES if self.device.type == "cpu" else CUDA_DTYPES
        if self.dtype not in allowed:
            raise ValueError(f"dtype on {self.device.type} must be one of {allowed}, received {self.dtype}")

    @property
    def group(self) -> int:
        """R: query heads that share one key-value head."""
        return self.query_heads // self.key_value_heads

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.dtype.itemsize


@dataclass(frozen=True)
class Segments:
    """Where each sequence of a packed batch begins and ends, and how many of its tokens came before.

    Args:
        lengths: new tokens of each sequence, in packing order; each at least 1.
        past: tokens of each sequence already in its state; zeros when left out.

    Raises:
        ValueError: no sequence, an empty sequence, or `past` of another length or below zero.
    """

    lengths: tuple[int, ...]
    past: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(self.lengths))
        object.__setattr__(self, "past", tuple(self.past) or (0,) * len(self.lengths))
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"segments need at least one sequence of at least one token, received lengths {self.lengths}")
        if len(self.past) != len(self.lengths) or min(self.past) < 0:
            raise ValueError(f"past needs one count >= 0 for each of {len(self.lengths)} sequences, received {self.past}")

    @cached_property
    def total(self) -> int:
        """T: packed tokens."""
        return sum(self.lengths)

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """(start, end, past) of each sequence; start and end index the packed axis."""
        start = 0
        for length, past in zip(self.lengths, self.past, strict=True):
            yield start, start + length, past
            start += length

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Position of each packed token in its own sequence, int64 (T,)."""
        parts = [torch.arange(past, past + end - start, device=device) for start, end, past in self.spans()]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def last(self) -> list[int]:
        """Packed index of the last new token of each sequence."""
        return [end - 1 for _, end, _ in self.spans()]


@dataclass(frozen=True)
class Cost:
    """What one sequence costs one layer: the law that admission, plans and audits read.

    `flops` counts a multiply and an add as two. `workspace_bytes` is the peak of temporaries during the call, the
    answer included, inputs and state excluded. `state_bytes` is what stays between calls.
    """

    flops: int
    workspace_bytes: int
    state_bytes: int


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a slot's state, for one layer: its shape, dtype and initial value."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: float | None = None  # None: left uninitialised, every element is written before it is read

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count

    def new(self, device: torch.device, layers: tuple[int, ...] = ()) -> Tensor:
        """The tensor itself, (*layers, *shape), at its initial value."""
        tensor = torch.empty((*layers, *self.shape), dtype=self.dtype, device=device)
        return tensor if self.fill is None else tensor.fill_(self.fill)


@dataclass
class _Slot:
    max_tokens: int
    tensors: dict[str, Tensor]  # (layers, ...)
    views: list[dict[str, Tensor]]  # of each layer, made once, since a decode step asks for many
    held: list[int]  # tokens in the state of each layer, or UNDEFINED


UNDEFINED = -1  # in the place of a count: while an extend is under way, and after one that was given up


class PoolExhausted(Exception):
    """The pool has no room for this slot now. Nothing was allocated."""

    def __init__(self, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(f"state needs {needed_bytes} bytes, {free_bytes} are free")
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class StatePool:
    """Decode states of many sequences, each in a slot of its own, within a byte limit.

    A slot is a dict of tensors, each with a leading axis of layers. What stands in them is its backend's affair; the
    pool counts bytes, and how many tokens each layer's state is of. A slot's memory is its own, so a release gives it back
    whole.
    """

    def __init__(self, backend: AttentionBackend, layers: int, max_bytes: int) -> None:
        if layers < 1 or max_bytes < 0:
            raise ValueError(f"a pool needs at least 1 layer and no less than 0 bytes, received {layers} and {max_bytes}")
        self.backend = backend
        self.layers = layers
        self.max_bytes = max_bytes
        self.bytes_in_use = 0
        self._slots: dict[int, _Slot] = {}
        self._next = 0

    def slot_bytes(self, max_tokens: int) -> int:
        """Bytes that a slot for a sequence of up to `max_tokens` tokens takes."""
        return self.layers * self.backend.state_bytes(max_tokens)

    def allocate(self, max_tokens: int) -> int:
        """Take a slot for a sequence of up to `max_tokens` tokens; returns its number, never used before.

        Raises:
            PoolExhausted: the slot does not fit beside the slots in use.
            ValueError: not even one token, or more than a sequence can have.
        """
        if not 1 <= max_tokens <= MOST_TOKENS:
            raise ValueError(f"a slot is for 1 to {MOST_TOKENS} tokens, received {max_tokens}")
        self._need(self.slot_bytes(max_tokens))
        device = self.backend.shape.device
        specs = self.backend.state(max_tokens).items()
        return self._keep(max_tokens, {name: spec.new(device, (self.layers,)) for name, spec in specs}, [0] * self.layers)

    def copy(self, slot: int) -> int:
        """A new slot that continues from where `slot` stands, so that several answers share one prefill.

        Raises:
            PoolExhausted: the copy does not fit.
        """
        old = self._slots[slot]
        self._need(self.slot_bytes(old.max_tokens))
        return self._keep(old.max_tokens, {name: tensor.clone() for name, tensor in old.tensors.items()}, list(old.held))

    def release(self, slot: int) -> None:
        """Give a slot's bytes back. Raises KeyError for a slot that is not in use."""
        self.bytes_in_use -= self.slot_bytes(self._slots.pop(slot).max_tokens)

    def tensors(self, slot: int) -> dict[str, Tensor]:
        """The state tensors of a slot, each (layers, ...)."""
        return self._slots[slot].tensors

    def pretend(self, slot: int, tokens: int) -> None:
        """Take what stands in a slot for the state of so many tokens, at every layer: for measurements."""
        entry = self._slots[slot]
        if not 0 <= tokens <= entry.max_tokens:
            raise ValueError(f"slot {slot} holds 0 to {entry.max_tokens} tokens, received {tokens}")
        entry.held[:] = [tokens] * self.layers

    def take(self, slots: Sequence[int], layer: int, segments: Segments) -> list[dict[str, Tensor]]:
        """The state of each slot at one layer, to be extended by `segments`; undefined until `settle`.

        Raises:
            ValueError: no such layer or slot, a slot named twice or not for each sequence, one without room for the new tokens,
                or one whose state is not that of `past` tokens. Nothing is taken then.
        """
        if not 0 <= layer < self.layers:
            raise ValueError(f"the pool has layers 0 to {self.layers - 1}, received {layer}")
        if len(set(slots)) != len(segments.lengths) or len(slots) != len(segments.lengths):
            raise ValueError(f"slots must name {len(segments.lengths)} slots, one per sequence, received {tuple(slots)}")
        taken = []
        for slot, length, past in zip(slots, segments.lengths, segments.past, strict=True):
            entry = self._slots.get(slot)
            if entry is None or past + length > entry.max_tokens or entry.held[layer] != past:
                raise ValueError(_why_not(slot, entry, layer, length, past))
            taken.append(entry)
        for entry in taken:
            entry.held[layer] = UNDEFINED
        return [entry.views[layer] for entry in taken]

    def settle(self, slots: Sequence[int], layer: int, segments: Segments) -> None:
        """Note that slots that were taken hold the new tokens, too."""
        for slot, length, past in zip(slots, segments.lengths, segments.past, strict=True):
            self._slots[slot].held[layer] = past + length

    def __len__(self) -> int:
        return len(self._slots)

    def _need(self, needed: int) -> None:
        if self.bytes_in_use + needed > self.max_bytes:
            raise PoolExhausted(needed, self.max_bytes - self.bytes_in_use)

    def _keep(self, max_tokens: int, tensors: dict[str, Tensor], held: list[int]) -> int:
        views = [{name: tensor[layer] for name, tensor in tensors.items()} for layer in range(self.layers)]
        slot, self._next = self._next, self._next + 1
        self._slots[slot] = _Slot(max_tokens, tensors, views, held)
        self.bytes_in_use += self.slot_bytes(max_tokens)
        return slot


def _why_not(slot: int, entry: _Slot | None, layer: int, length: int, past: int) -> str:
    """Why a slot cannot be extended by `length` tokens behind `past`."""
    if entry is None:
        return f"slot {slot} is not in use"
    if past + length > entry.max_tokens:
        return f"slot {slot} holds at most {entry.max_tokens} tokens, received {past + length}"
    if entry.held[layer] == UNDEFINED:
        return f"slot {slot} is being extended at layer {layer}, or was by a call that did not end; its state is undefined"
    return f"past of slot {slot} must be the {entry.held[layer]} tokens in its state at layer {layer}, received {past}"


class AttentionBackend(ABC):
    """One way to attend. A subclass is one file in `backends/`; the file's name is the backend's name.

    `attend` and `extend` check their input and go through the sequences; a backend says how one sequence is answered
    (`attend_sequence`), how one is continued (`extend_sequence`), and, where that is faster, how many are continued by one
    token each (`step`).

    Attributes:
        Options: the backend's own options.
        impl: the implementation in force, see `implementation`.
        exact: True when the backend is a softmax over the keys that `visible` names; False for kernels of their own.
        score_cap: where it is set, a score s is weighed as cap tanh(s / cap).
    """

    Options: ClassVar[type[BackendOptions]]
    exact: ClassVar[bool] = True
    impl: str = "torch"
    score_cap: float | None = None

    def __init__(self, options: BackendOptions, shape: HeadShape) -> None:
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
    ) -> Parts:
        """`extend` into a tight `out` (T, H, D), pausing between parts so that its caller may do something more urgent.

        Until it ends, out and the slots' state at `layer` are undefined. A batch of single tokens does not pause.
        """
        self.check_extend(q, k, v, segments, pool, out)
        states = pool.take(slots, layer, segments)
        if segments.total == len(slots):
            self.step(q, k, v, segments.past, states, out)
        else:
            yield from self._extend_mixed(q, k, v, segments, states, out)
        pool.settle(slots, layer, segments)

    def _extend_mixed(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> Parts:
        """Sequences of one token by a step, as they would be alone, and the others one after the other."""
        spans = list(zip(states, segments.spans(), strict=True))
        if single := [(state, start, past) for state, (start, end, past) in spans if end - start == 1]:
            alone, rows, pasts = zip(*single, strict=True)
            answers, index = out.new_empty(len(rows), *out.shape[1:]), list(rows)
            self.step(q[index], k[index], v[index], pasts, alone, answers)
            out[index] = answers
            yield
        for state, (start, end, past) in spans:
            if end - start > 1:
                yield from self.extend_sequence(q[start:end], k[start:end], v[start:end], past, state, out[start:end])

    @abstractmethod
    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> Parts:
        """Answer one whole sequence into `out` (T, H, D)."""

    @abstractmethod
    def extend_sequence(self, q: Tensor, k: Tensor, v: Tensor, past: int, state: dict[str, Tensor], out: Tensor) -> Parts:
        """Append one sequence's new tokens to its state at one layer and answer them into `out` (T, H, D)."""

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, past: Sequence[int], states: Sequence[dict[str, Tensor]], out: Tensor
    ) -> None:
        """Append one token to each of many sequences: q (B, H, D), one `past` and one state per sequence."""
        for i, state in enumerate(states):
            finish(self.extend_sequence(q[i : i + 1], k[i : i + 1], v[i : i + 1], past[i], state, out[i : i + 1]))

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
        return self.law(queries, keys, causal=causal)

    @abstractmethod
    def law(self, queries: int, keys: int, *, causal: bool) -> Cost:
        """`cost` of 1 <= queries <= keys."""

    def visible(self, i: Tensor, j: Tensor, length: int | Tensor) -> Tensor:
        """Whether query position `i` sees key position `j` in a sequence of `length` tokens: an exact backend's definition.

        Broadcasts int64 positions to a bool tensor. A causal answer is that of the sequence as it stood when the token
        came: `visible(i, j, i + 1) & (j <= i)`.
        """
        raise NotImplementedError(f"{self.name} is no softmax over a set of keys")

    def kernel(self, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """What each key weighs for each query: (..., N, D) and (..., M, D) to (..., N, M), up to a factor per query.

        The definition of a backend that is no softmax, in the inputs' dtype. `i` and `j` are the int64 positions of queries
        and keys, (N, 1) and (1, M).
        """
        raise NotImplementedError(f"{self.name} is a softmax, defined by visible")

    @property
    def edge(self) -> int:
        """Sequence length from which all parts of the pattern are in play: checks look on both sides of it."""
        return 1

    def state_bytes(self, max_tokens: int) -> int:
        """Bytes of `state(max_tokens)`: one layer, one sequence."""
        return sum(spec.nbytes for spec in self.state(max_tokens).values())

    def new_pool(self, layers: int, max_bytes: int) -> StatePool:
        """An empty pool for models of `layers` layers that never holds more than `max_bytes`."""
        return StatePool(self, layers, max_bytes)

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

    def check_extend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, pool: StatePool, out: Tensor) -> None:
        """`check`, and that this backend can continue sequences of this pool and write the answer."""
        self.check(q, k, v, segments)
        if True not in self.directions:
            raise ValueError(f"{self.name} has no causal form, so no sequence can be continued with it")
        if pool.backend is not self:
            raise ValueError(f"the pool must be of this backend (its `new_pool`), received one of {pool.backend.describe()}")
        if out.shape != q.shape or out.dtype != q.dtype or out.device != q.device or not out.is_contiguous():
            wanted = f"tight, {tuple(q.shape)}, {q.dtype} on {q.device}"
            raise ValueError(
                f"out must be {wanted}, received {tuple(out.shape)}, {out.dtype} on {out.device}, strides {out.stride()}"
            )
