"""What every attention backend is: its inputs, its two verbs, its state and its cost law.

In this file are the words that all backends share. No attention is computed here; that is `backends/<name>.py`.

Legend of shapes, used at line ends throughout `attention` and `service.model`:

    T   packed tokens: the new tokens of all sequences of a batch, one behind the other, never padded
    N   keys one sequence can see: its earlier tokens and its new ones
    H   query heads        G   key-value heads (H is a multiple of G)        R   H // G query heads per key-value head
    D   head width         m   random features

A backend answers whole sequences (`attend`) or continues them from a state (`extend`). Both are inference: no gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

CPU = torch.device("cpu")
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


class PoolExhausted(Exception):
    """The pool has no room for this slot now. Nothing was allocated."""

    def __init__(self, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(f"state needs {needed_bytes} bytes, {free_bytes} are free")
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class StatePool:
    """Decode states of many sequences, each in a slot of its own, within a byte limit.

    A slot is a dict of tensors, each with a leading axis of layers. What stands in them is its backend's affair; the
    pool counts bytes. A slot's memory is its own, so a release gives it back whole.
    """

    def __init__(self, backend: AttentionBackend, layers: int, max_bytes: int) -> None:
        self.backend = backend
        self.layers = layers
        self.max_bytes = max_bytes
        self.bytes_in_use = 0
        self._slots: dict[int, dict[str, Tensor]] = {}
        self._slot_bytes: dict[int, int] = {}
        self._next = 0

    def slot_bytes(self, max_tokens: int) -> int:
        """Bytes that a slot for a sequence of up to `max_tokens` tokens takes."""
        return self.layers * self.backend.state_bytes(max_tokens)

    def allocate(self, max_tokens: int) -> int:
        """Take a slot for a sequence of up to `max_tokens` tokens; returns its number, never used before.

        Raises:
            PoolExhausted: the slot does not fit beside the slots in use.
        """
        needed = self.slot_bytes(max_tokens)
        if self.bytes_in_use + needed > self.max_bytes:
            raise PoolExhausted(needed, self.max_bytes - self.bytes_in_use)
        tensors = {
            name: spec.new(self.backend.shape.device, (self.layers,)) for name, spec in self.backend.state(max_tokens).items()
        }
        slot, self._next = self._next, self._next + 1
        self._slots[slot], self._slot_bytes[slot] = tensors, needed
        self.bytes_in_use += needed
        return slot

    def release(self, slot: int) -> None:
        """Give a slot's bytes back. Raises KeyError for a slot that is not in use."""
        del self._slots[slot]
        self.bytes_in_use -= self._slot_bytes.pop(slot)

    def copy(self, slot: int) -> int:
        """A new slot that continues from where `slot` stands, so that several answers share one prefill.

        Raises:
            PoolExhausted: the copy does not fit.
        """
        needed = self._slot_bytes[slot]
        if self.bytes_in_use + needed > self.max_bytes:
            raise PoolExhausted(needed, self.max_bytes - self.bytes_in_use)
        tensors = {name: tensor.clone() for name, tensor in self._slots[slot].items()}
        new, self._next = self._next, self._next + 1
        self._slots[new], self._slot_bytes[new] = tensors, needed
        self.bytes_in_use += needed
        return new

    def tensors(self, slot: int) -> dict[str, Tensor]:
        """The state tensors of a slot, each (layers, ...)."""
        return self._slots[slot]

    def __len__(self) -> int:
        return len(self._slots)


class AttentionBackend(ABC):
    """One way to attend. A subclass is one file in `backends/`; the file's name is the backend's name.

    Class attributes:
        Options: the backend's own options.
        exact: True when the backend is a softmax over the keys that `visible` names; False for kernels of their own.
        directions: the values of `causal` that `attend` takes. `extend` needs True among them.
    """

    Options: ClassVar[type[BackendOptions]]
    exact: ClassVar[bool] = True
    directions: ClassVar[tuple[bool, ...]] = (True, False)

    def __init__(self, options: BackendOptions, shape: HeadShape) -> None:
        self.options = options
        self.shape = shape

    @property
    def name(self) -> str:
        """The name in configs, requests and metrics: that of the backend's file."""
        return type(self).__module__.rsplit(".", 1)[-1]

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool) -> Tensor:
        """Answer whole sequences; keeps nothing.

        Args:
            q: (T, H, D). k, v: (T, G, D). All of the backend's dtype and device.
            segments: the sequences; every `past` is 0.
            causal: a token sees itself and what came before only.

        Returns:
            (T, H, D), the inputs' dtype. A row that sees nothing is zeros.

        Raises:
            ValueError: wrong shape, dtype or device, a past that is not 0, or a direction the backend does not define.
        """

    @abstractmethod
    def extend(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, pool: StatePool, layer: int, slots: Sequence[int]
    ) -> Tensor:
        """Append these tokens to each slot's state and answer them, causally. A prefill chunk and a decode step alike.

        Args:
            q: (T, H, D). k, v: (T, G, D).
            segments: new tokens and tokens in state of each sequence; `past` is what earlier calls appended.
            pool: a pool of this backend. `slots` names one slot per sequence. Changed: the slots' tensors at `layer`.

        Returns:
            (T, H, D), the inputs' dtype.

        Raises:
            ValueError: wrong shape, dtype or device, a slot count that differs, or a backend without a causal form.
        """

    @abstractmethod
    def state(self, max_tokens: int) -> dict[str, StateTensor]:
        """What one layer keeps of a sequence of up to `max_tokens` tokens."""

    @abstractmethod
    def cost(self, queries: int, keys: int, *, causal: bool) -> Cost:
        """Cost of `queries` new tokens at the end of a sequence of `keys` tokens (the new ones included), one layer."""

    def visible(self, i: Tensor, j: Tensor, length: int) -> Tensor:
        """Whether query position `i` may see key position `j` in a sequence of `length` tokens, causality left aside.

        Broadcasts int64 positions to a bool tensor. The definition of an exact backend; a causal answer is this
        predicate and `j <= i`.
        """
        raise NotImplementedError(f"{self.name} is no softmax over a set of keys")

    def state_bytes(self, max_tokens: int) -> int:
        """Bytes of `state(max_tokens)`: one layer, one sequence."""
        return sum(spec.nbytes for spec in self.state(max_tokens).values())

    def new_pool(self, layers: int, max_bytes: int) -> StatePool:
        """An empty pool for models of `layers` layers that never holds more than `max_bytes`."""
        return StatePool(self, layers, max_bytes)

    def describe(self) -> dict[str, object]:
        """Name, options and implementation in force, for receipts and `/info`."""
        return {"name": self.name, "options": self.options.model_dump(), "exact": self.exact}

    def check(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> None:
        """Raise ValueError unless q, k, v fit this backend and `segments`."""
        shape = self.shape
        groups = shape.key_value_heads
        for label, tensor, heads in (("q", q, shape.query_heads), ("k", k, groups), ("v", v, groups)):
            wanted = (segments.total, heads, shape.head_width)
            if tuple(tensor.shape) != wanted:
                raise ValueError(f"{label} must have shape {wanted}, received {tuple(tensor.shape)}")
            if tensor.dtype != shape.dtype or tensor.device.type != shape.device.type:
                raise ValueError(f"{label} must be {shape.dtype} on {shape.device}, received {tensor.dtype} on {tensor.device}")

    def check_attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> None:
        """`check`, and that the call is one of whole sequences in a direction this backend defines."""
        self.check(q, k, v, segments)
        if any(segments.past):
            raise ValueError(f"attend takes whole sequences, received past {segments.past}; use extend")
        if causal not in self.directions:
            wanted = "causal" if True in self.directions else "bidirectional"
            raise ValueError(f"{self.name} is {wanted} only, received causal={causal}")

    def check_extend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, slots: Sequence[int]) -> None:
        """`check`, and that this backend can continue sequences, one slot each."""
        self.check(q, k, v, segments)
        if True not in self.directions:
            raise ValueError(f"{self.name} has no causal form, so no sequence can be continued with it")
        if len(slots) != len(segments.lengths):
            raise ValueError(f"slots must name {len(segments.lengths)} slots, one per sequence, received {len(slots)}")
