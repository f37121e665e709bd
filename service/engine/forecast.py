"""What a computation will take, before it runs: seconds by a pace measured at start, bytes by the laws of cost.

`Pace` is this machine's speed: two straight lines, one for the model without attention, one per backend for a layer's
attention over its flops. `Course` cuts a sequence's prefill into chunks of about equal seconds, by position alone, so that
the same prompt is always computed in the same chunks, whatever else is running. Measuring costs tenths of a second.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from attention import AttentionBackend, Segments
from service.model.transformer import Transformer

SMALLEST_CHUNK = 16  # tokens; below, a product costs the same as for one row
REPEATS = 5


@dataclass(frozen=True)
class Line:
    """seconds = fixed + slope * amount, neither below zero."""

    fixed: float
    slope: float

    def __call__(self, amount: float) -> float:
        return self.fixed + self.slope * amount

    @classmethod
    def through(cls, low: tuple[float, float], high: tuple[float, float]) -> Line:
        """The line through two (amount, seconds) measurements."""
        slope = max(0.0, (high[1] - low[1]) / (high[0] - low[0]))
        return cls(max(0.0, low[1] - slope * low[0]), slope)


@dataclass(frozen=True)
class Pace:
    """Seconds of one model call under one backend."""

    layers: int
    model: Line  # over tokens, attention left out
    attention: Line  # over flops, one layer
    backend: AttentionBackend

    def seconds(self, queries: int, keys: int) -> float:
        """Predicted seconds of processing `queries` tokens at the end of a sequence of `keys`."""
        flops = self.backend.cost(queries, keys, causal=True).flops
        return self.model(queries) + self.layers * self.attention(flops)


def measure_model(model: Transformer, tokens: int = 256) -> Line:
    """Time the model with attention left out, on 1 and on `tokens` tokens."""

    def run(count: int) -> Callable[[], Tensor]:
        ids = torch.zeros(count, dtype=torch.long, device=model.device)
        return lambda: model.hidden(ids, ids, lambda layer, q, k, v: q)

    return Line.through((1, _seconds(run(1))), (tokens, _seconds(run(tokens))))


def measure_attention(backend: AttentionBackend, history: int, tokens: int = 64) -> Line:
    """Time one layer's `extend` for one token without history and for `tokens` tokens behind `history` others."""
    shape = backend.shape
    pool = backend.new_pool(1, backend.state_bytes(history + tokens))
    slot = pool.allocate(history + tokens)
    for tensor in pool.tensors(slot).values():
        tensor.zero_()

    def run(count: int, past: int) -> Callable[[], Tensor]:
        sizes = (shape.query_heads, shape.key_value_heads, shape.key_value_heads)
        q, k, v = (torch.randn(count, n, shape.head_width, device=shape.device).to(shape.dtype) for n in sizes)
        return lambda: backend.extend(q, k, v, Segments((count,), (past,)), pool, 0, (slot,))

    points = [(1, 0), (tokens, history)]
    low, high = ((backend.cost(n, n + past, causal=True).flops, _seconds(run(n, past))) for n, past in points)
    return Line.through(low, high)


def _seconds(run: Callable[[], Tensor]) -> float:
    """Median seconds of a call, its first run left out."""
    times = []
    with torch.inference_mode():
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            run()[0, ..., 0].sum().item()  # .item() waits for an accelerator
            times.append(time.perf_counter() - start)
    return median(times[1:])


class Course:
    """How a prefill of any length up to `max_length` runs under one backend: its chunks, seconds and workspace."""

    def __init__(self, model: Transformer, pace: Pace, max_length: int, chunk_seconds: float, max_chunk: int) -> None:
        self.pace = pace
        self.chunk_seconds = chunk_seconds
        self._model = model
        self._ends: list[int] = [0]
        self._seconds: list[float] = [0.0]
        self._bytes: list[int] = [0]
        while self._ends[-1] < max_length:
            past = self._ends[-1]
            end = min(max_length, past + self._chunk(past, chunk_seconds, max_chunk))
            self._ends.append(end)
            self._seconds.append(self._seconds[-1] + pace.seconds(end - past, end))
            self._bytes.append(max(self._bytes[-1], self.step_bytes(end - past, end)))

    def _chunk(self, past: int, chunk_seconds: float, max_chunk: int) -> int:
        """The largest power of two of tokens that stays within the seconds; never below SMALLEST_CHUNK."""
        chunk = max_chunk
        while chunk > SMALLEST_CHUNK and self.pace.seconds(chunk, past + chunk) > chunk_seconds:
            chunk //= 2
        return chunk

    def next_end(self, past: int) -> int:
        """Where the chunk that begins at position `past`, or lies around it, ends."""
        return self._ends[bisect_right(self._ends, past)]

    def seconds(self, length: int) -> float:
        """Predicted seconds of a whole prefill."""
        done = bisect_right(self._ends, length) - 1
        rest = length - self._ends[done]
        return self._seconds[done] + (self.pace.seconds(rest, length) if rest else 0.0)

    def decode_seconds(self, length: int) -> float:
        """Predicted seconds of one decode step behind `length` tokens."""
        return self.pace.seconds(1, length + 1)

    def prefill_bytes(self, length: int) -> int:
        """Peak workspace of any chunk of a prefill of `length` tokens."""
        done = bisect_right(self._ends, length) - 1
        rest = length - self._ends[done]
        return max(self._bytes[done], self.step_bytes(rest, length) if rest else 0)

    def step_bytes(self, queries: int, keys: int) -> int:
        """Workspace of processing `queries` tokens at the end of `keys`, by the laws of model and backend."""
        attention = self.pace.backend.cost(queries, keys, causal=True).workspace_bytes
        return self._model.workspace_bytes(queries, attention)
