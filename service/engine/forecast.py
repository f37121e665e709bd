"""What a computation will take, before it runs: seconds by a pace measured at start, bytes by the laws of cost.

`Pace` is this machine's speed: straight lines, two for the model without attention, over tokens and over rows of a decode step,
three per backend for a layer's attention over its flops: of many tokens, which is bound by arithmetic, of one, which is bound
by memory, and of one more in the same step. `Course` cuts a prefill into
chunks by position. `row_multiple` is what this machine's products ask of packed rows. Measuring costs tenths of a second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from attention import AttentionBackend, Segments, result, shares
from service.model.transformer import Transformer

T = TypeVar("T")

DONE = object()  # no part, but the end
REPEATS = 7
ROWS = 8  # of a decode step, that are timed
START_SECONDS = 0.02  # of steps, for which the pace measured at the start counts
DRIFT_SECONDS = 1.5  # of steps, for which all that were seen before count at most
HALF_LIFE_SECONDS = 120.0
MOST_DRIFT = math.log(10)  # either way: a step that was held up longer says nothing of the backend
REMEMBERED = 1 << 14  # predictions of a step, some 200 bytes each: whoever schedules asks for the same ones again
PROBE_HISTORY = 8192  # tokens before the measured ones: enough for the products to reach their speed, and to leave the caches


@dataclass(frozen=True)
class Ramp:
    """seconds = fixed + slope * amount, neither below zero."""

    fixed: float
    slope: float

    def __call__(self, amount: float) -> float:
        return self.fixed + self.slope * amount

    @classmethod
    def through(cls, low: tuple[float, float], high: tuple[float, float]) -> Ramp:
        """The line through two (amount, seconds) measurements."""
        slope = max(0.0, (high[1] - low[1]) / (high[0] - low[0])) if high[0] > low[0] else 0.0
        return cls(max(0.0, low[1] - slope * low[0]), slope)


@dataclass(frozen=True)
class Attending:
    """Seconds of one layer's attention over its flops."""

    many: Ramp
    one: Ramp  # of a single token
    more: Ramp  # of one more token of the same sequence, in the same step

    def __call__(self, queries: int, flops: float) -> float:
        return (self.one if queries == 1 else self.many)(flops)


@dataclass(frozen=True)
class Pace:
    """Seconds of one model call under one backend."""

    layers: int
    model: Ramp  # over tokens, attention left out
    rows: Ramp  # over rows of a decode step, likewise, with the logits of each
    attention: Mapping[AttentionBackend, Attending]  # one layer of each kind that the backend has
    backend: AttentionBackend

    def seconds(self, start: int, end: int) -> float:
        """Predicted seconds of a call for the tokens of a sequence from `start` to `end`."""
        return self.model(end - start) + self.attention_seconds(end - start, end)

    def attention_seconds(self, queries: int, keys: int) -> float:
        """Predicted seconds of all layers' attention for `queries` tokens at the end of a sequence of `keys`."""
        return self._attending(lambda kind: self.attention[kind](queries, kind.cost(queries, keys, causal=True).flops))

    def row_seconds(self, keys: int) -> float:
        """Predicted seconds that one more token of a sequence of `keys` adds to a decode step of it."""
        more = self._attending(lambda kind: self.attention[kind].more(kind.cost(1, keys, causal=True).flops))
        return self.rows.slope + more

    def _attending(self, seconds: Callable[[AttentionBackend], float]) -> float:
        """What a layer of each kind takes, over all layers."""
        return self.layers * sum(share * seconds(kind) for kind, share in shares(self.backend).items())


def measure_model(model: Transformer, has_guesses: bool, tokens: int = 256) -> tuple[Ramp, Ramp]:
    """Time the model with attention left out.

    Returns the line through 1 and `tokens` tokens, with the logits of the last one, and that through 1 and ROWS rows of a
    decode step, with the logits of each; where nothing is to be guessed, a row is taken for as long as a step.
    """

    def run(count: int, is_decode: bool) -> Callable[[], Iterator[None]]:
        ids = torch.zeros(count, dtype=torch.long, device=model.device)
        positions = torch.arange(count, device=model.device) % model.config.max_length

        def compute() -> Iterator[None]:
            hidden = model.hidden(ids, positions, lambda layer, q, k, v: q, is_decode=is_decode)
            asked = hidden if is_decode else hidden[-1:]
            (model.logits(asked) if model.config.is_causal else asked)[0, 0].item()  # which waits for an accelerator
            yield

        return compute

    with torch.inference_mode():
        one, many = (result(_seconds(run(*each))) for each in ((1, True), (tokens, False)))
        rows = result(_seconds(run(ROWS, True))) if has_guesses else ROWS * one
    return Ramp.through((1, one), (tokens, many)), Ramp.through((1, one), (ROWS, rows))


Measuring = Generator[None, None, T]
"""A measurement in parts, which may be run between the steps of requests: its pauses are not counted."""


@torch.inference_mode()
def measure_attention(
    backend: AttentionBackend, max_length: int, chunk: int, has_guesses: bool, has_history: bool = True
) -> Measuring[dict[AttentionBackend, Attending]]:
    """Time one layer of each kind that a backend has, as it comes in chunks of so many tokens and token by token.

    has_guesses: tokens may be guessed; else one more in a step is taken for as long as one alone.
    has_history: sequences are continued, not only read whole.
    """
    found = {}
    for kind in shares(backend):
        found[kind] = yield from _measure_layer(kind, max_length, chunk, has_guesses, has_history)
    return found


def _measure_layer(
    backend: AttentionBackend, max_length: int, chunk: int, has_guesses: bool, has_history: bool
) -> Measuring[Attending]:
    """Time one layer's `extend` for one token without history, and for one and a chunk at the end of a long sequence."""
    shape = backend.shape
    tokens = min(chunk, max_length)
    history = min(PROBE_HISTORY, max_length - tokens) if has_history else 0
    pool = backend.new_pool(1, backend.state_bytes(history + tokens))
    slot = pool.allocate(history + tokens)
    for tensor in pool.tensors(slot).values():
        tensor.zero_()

    def run(count: int, past: int) -> Callable[[], Iterator[None]]:
        sizes = (shape.query_heads, shape.key_value_heads, shape.key_value_heads)
        q, k, v = (torch.randn(count, n, shape.head_width, device=shape.device).to(shape.dtype) for n in sizes)

        def extend() -> Iterator[None]:
            pool.pretend(slot, past)
            out = torch.empty_like(q)
            is_step = has_history and count <= ROWS
            yield from backend.extending(q, k, v, Segments((count,), (past,)), pool, 0, (slot,), out, by_steps=is_step)
            out[0, 0, 0].item()  # waits for an accelerator

        return extend

    def point(count: int, past: int, seconds: float) -> tuple[float, float]:
        return backend.cost(count, past + count, causal=True).flops, seconds

    least = yield from _seconds(run(1, 0))
    seconds = yield from _seconds(run(tokens, history))
    many = Ramp.through(point(1, 0, least), point(tokens, history, seconds))
    if not has_history:
        return Attending(many, many, many)
    last = history + tokens - 1
    most = yield from _seconds(run(1, last))
    one, more = Ramp.through(point(1, 0, least), point(1, last, most)), []
    if not has_guesses:
        return Attending(many, one, one)
    for past, alone in ((0, least), (max(0, last + 1 - ROWS), most)):
        count = min(ROWS, backend.runway(past), last + 1 - past)
        seconds = (yield from _seconds(run(count, past))) if count > 1 else 2 * alone
        more.append(point(1, past, max(0.0, seconds - alone) / max(1, count - 1)))
    return Attending(many, one, Ramp.through(*more))


def row_multiple(model: Transformer, rows: int = 512) -> int | None:
    """The least number to whose multiples packed rows must be padded for a row's numbers not to depend on its mates.

    A matrix library may compute the same row differently in a product of another height. It is tried out here, on this
    model and machine, attention left out: 1 for oneDNN's bfloat16 products, 4 for MKL's float32 ones, where we tried it.

    Returns:
        1, 4, 8 or 16; None when none of them helps, and answers may differ in the last bits by what shares the batch.
    """
    ids = torch.arange(rows, device=model.device) % min(model.config.vocab_size, model.config.max_length)  # positions, too

    def compute(count: int) -> tuple[Tensor, Tensor]:
        hidden = model.hidden(ids[:count], ids[:count], lambda layer, q, k, v: q)
        return hidden, model.logits(hidden[:16]) if model.config.is_causal else hidden[:0]

    with torch.inference_mode():
        hidden, logits = compute(rows)
        for multiple in (1, 4, 8, 16):
            counts = {multiple * factor for factor in (1, 2, 3, 4, 5, 7, 8, 16, 25) if multiple * factor <= rows}
            trials = [(count, *compute(count)) for count in counts]
            if all(torch.equal(h, hidden[:n]) and torch.equal(x, logits[: min(n, 16)]) for n, h, x in trials):
                return multiple
    return None


def _seconds(run: Callable[[], Iterator[None]]) -> Measuring[float]:
    """Least seconds of a computation in parts: what the machine can do when nothing else wants it."""
    times = []
    for _ in range(REPEATS):
        parts, seconds, is_over = run(), 0.0, False
        while not is_over:
            start = time.perf_counter()
            is_over = next(parts, DONE) is DONE
            seconds += time.perf_counter() - start
            yield
        times.append(seconds)
    return min(times)


class Drift:
    """How many times as long as predicted the steps of each kind take, as the running engine measures them.

    A mean over the predicted seconds, in logarithms, so that one step that was held up counts little; the pace measured at the
    start counts for START_SECONDS of them, what was seen for DRIFT_SECONDS at most. With time it is forgotten, half of it in
    HALF_LIFE_SECONDS: what a neighbour on the machine did to a backend that has not run since says nothing of it now.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float, float]] = {}  # by kind: mean logarithm, seconds it is over, when it was noted

    def __call__(self, kind: str) -> float:
        """What to multiply a prediction by."""
        return math.exp(self._now(kind)[0])

    def now(self) -> dict[str, float]:
        """The same for each kind that was seen."""
        return {kind: self(kind) for kind in list(self._seen)}

    def note(self, kind: str, predicted: float, measured: float) -> None:
        """A step has ended."""
        if predicted > 0 and measured > 0:
            found = max(-MOST_DRIFT, min(MOST_DRIFT, math.log(measured / predicted)))
            known, seconds = self._now(kind)
            weight = predicted / (START_SECONDS + seconds + predicted)
            self._seen[kind] = known + weight * (found - known), min(seconds + predicted, DRIFT_SECONDS), time.monotonic()

    def _now(self, kind: str) -> tuple[float, float]:
        log, seconds, noted = self._seen.get(kind, (0.0, 0.0, 0.0))
        left = 0.5 ** ((time.monotonic() - noted) / HALF_LIFE_SECONDS)
        return log * left, seconds * left


class Course:
    """How a prefill of any length up to `max_length` runs under one backend: its chunks, seconds and workspace.

    A chunk is what passes through a layer at once. Chunks begin at multiples of `chunk`, whatever else is running, so the
    same prompt is always computed in the same pieces.
    """

    def __init__(self, model: Transformer, pace: Pace, max_length: int, chunk: int) -> None:
        self.pace = pace
        self.vocab_size = model.config.vocab_size
        self.vector_width = model.config.pooled.width(model.config.hidden_size)
        self._model = model
        self._chunk = chunk
        self._known_seconds = lru_cache(REMEMBERED)(pace.seconds)  # not of its own: a cycle would keep an old backend's states
        self._seconds: list[float] = [0.0]  # of all chunks before
        self._bytes: list[int] = [0]  # peak workspace of all chunks before
        for start in range(0, max_length, chunk):
            end = min(start + chunk, max_length)
            self._seconds.append(self._seconds[-1] + self.step_seconds(start, end))
            self._bytes.append(max(self._bytes[-1], self.step_bytes(start, end)))

    def next_end(self, past: int) -> int:
        """Where the chunk around position `past` ends."""
        return (past // self._chunk + 1) * self._chunk

    def step_seconds(self, start: int, end: int) -> float:
        """Predicted seconds of processing the tokens from `start` to `end`."""
        return self._known_seconds(start, end)

    def step_bytes(self, start: int, end: int) -> int:
        """Workspace of processing the tokens from `start` to `end`, by the laws of model and backend."""
        attention = self.pace.backend.cost(end - start, end, causal=True).workspace_bytes
        return self._model.workspace_bytes(end - start, attention)

    def seen_tokens(self, length: int) -> int:
        """How many tokens of a prompt its last one sees in one layer. Those outside a window act through deeper layers."""
        backend = self.pace.backend
        if not backend.exact:
            return length  # its state holds them all
        last, earlier = torch.tensor(length - 1), torch.arange(length)
        return int(backend.visible(last, earlier, length).sum())

    def seconds(self, length: int) -> float:
        """Predicted seconds of a whole prefill."""
        done, rest = divmod(length, self._chunk)
        return self._seconds[done] + (self.step_seconds(length - rest, length) if rest else 0.0)

    def decode_seconds(self, length: int) -> float:
        """Predicted seconds of a decode step that makes a sequence `length` tokens long."""
        return self.step_seconds(length - 1, length)

    def row_seconds(self, length: int) -> float:
        """Predicted seconds that one more token of a sequence of `length` adds to a decode step of it."""
        return self.pace.row_seconds(length)

    def rows_seconds(self, rows: int, one: float) -> float:
        """The same of a step of several rows, of which each alone takes `one` second."""
        return rows * one - (rows - 1) * self.pace.model.fixed  # which is paid once

    def prefill_bytes(self, length: int) -> int:
        """Peak workspace of any chunk of a prefill of `length` tokens."""
        done, rest = divmod(length, self._chunk)
        return max(self._bytes[done], self.step_bytes(length - rest, length) if rest else 0)
