"""The shapes of a call: the heads a backend is built for, the sequences of a packed batch, and what one of them costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

CPU = torch.device("cpu")
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALE_BYTES = 4  # of the scale behind a head in 8 bits, see kernels/int8.py
MOST_TOKENS = 1 << 31  # no sequence is longer, and no option that counts tokens means more


@dataclass(frozen=True)
class HeadShape:
    """The heads a backend is built for.

    Raises:
        ValueError: a count below one, query heads that are no multiple of the key-value heads, a dtype that the
            device cannot multiply at a usable speed (float16 on CPU: 1 GFLOP/s), or `kv` of another dtype than int8.
    """

    query_heads: int  # H
    key_value_heads: int  # G
    head_width: int  # D
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    kv: torch.dtype | None = None  # in which keys and values are kept: int8, see kernels/int8.py; None: in `dtype`

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
        if self.kv not in (None, torch.int8) or (self.kv is not None and self.head_width % SCALE_BYTES):
            wanted = f"int8, with heads whose width is a multiple of {SCALE_BYTES}"
            raise ValueError(f"kv must be {wanted}, or None, received {self.kv} and heads of {self.head_width}")

    @property
    def group(self) -> int:
        """R: query heads that share one key-value head."""
        return self.query_heads // self.key_value_heads

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.dtype.itemsize

    @property
    def kept_dtype(self) -> torch.dtype:
        """In which keys and values are kept."""
        return self.dtype if self.kv is None else self.kv

    @property
    def kept_width(self) -> int:
        """Elements that are kept of a head's key, or value: D, and in 8 bits the scale's bytes."""
        return self.head_width if self.kv is None else self.head_width + SCALE_BYTES

    @property
    def kept_bytes(self) -> int:
        """Bytes of a token's keys, of all heads, as they are kept; of its values as many."""
        return self.key_value_heads * self.kept_width * self.kept_dtype.itemsize


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
        if self.total == len(self.past):
            return torch.tensor(self.past, device=device)
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
