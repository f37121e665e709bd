"""The served-truth check: does a built backend, on this machine, at its own options, answer what its definition says?

Seeded input at a length that brings all parts of the pattern into play, three sequences in a batch, through `attend` in each
direction and through `extend` in uneven chunks with single steps between; a sample of rows is compared with `reference`. It
takes a fraction of a second, so the service runs it at start-up and before every switch, there in parts between the steps of
its requests (`checking`). No input is longer than the model's context, nor than `MOST`: where a pattern's edge lies beyond
that, the verdict says what was not covered.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from attention import reference
from attention.interface import AttentionBackend
from attention.parts import result
from attention.shapes import Segments

# Largest error allowed on values drawn from N(0, 1), with scores of standard deviation 1 (largest about 5). bfloat16 rounds a
# score of 4 to 2^-7, a weight to 2^-9 and an answer of 4 to 2^-7, and errors of 3 x 2^-7 = 0.023 are seen; the others keep
# the same distance to their epsilon. A wrong mask, a lost key or a stale state is off by 0.1 and more.
BOUNDS = {torch.bfloat16: 6e-2, torch.float16: 1e-2, torch.float32: 2e-5, torch.float64: 1e-12}
MOST = 16384  # tokens: a wider pattern would be checked for seconds and gigabytes, and the arithmetic is the same
BEYOND = 131  # tokens behind the pattern's edge: more than a kernel's block of rows, and no multiple of it
SAMPLE = 48  # rows compared per sequence, the first and last among them
ROWS = 8  # of them whose reference is computed at once
USUAL = 5.0  # the largest scores and values of such input


@dataclass(frozen=True)
class Truth:
    """The verdict: the largest error seen, the bound it is held to, what the input was too short for (empty: nothing), and what
    the answers were held to."""

    error: float
    bound: float
    uncovered: str = ""
    of: str = "its definition"

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound; an error that is no number is not."""
        return self.error <= self.bound

    @property
    def told(self) -> str:
        """How far off what, in words."""
        return f"off {self.of} by {self.error:.2g}, allowed: {self.bound:.2g}"


Checking = Generator[None, None, "Truth"]
"""A check in parts, between which its caller may do something more urgent; it returns the verdict."""


@torch.inference_mode()
def check(backend: AttentionBackend, seed: int = 0, max_length: int = MOST) -> Truth:
    """Compare a backend's answers, in each direction, with its definition's on seeded input. Changes nothing.

    max_length: tokens of the longest sequence that will be asked for; no longer input is needed.
    """
    longest = _longest(backend, max_length)
    verdict = result(checking(backend, seed, max_length)) if True in backend.directions else None
    segments = _segments(longest)
    q, k, v = _input(backend, segments.total, seed)
    errors = [] if verdict is None else [verdict.error]
    for causal in backend.directions:
        wanted = result(_wanted(backend, q, k, v, segments, causal))
        errors.append(_distance(backend.attend(q, k, v, segments, causal=causal), wanted))
    return Truth(max(errors, key=_nan_last), BOUNDS[backend.shape.dtype], _uncovered(backend, longest, max_length))


@torch.inference_mode()
def checking(backend: AttentionBackend, seed: int = 0, max_length: int = MOST, *, causal: bool = True) -> Checking:
    """`check` of what a service asks for alone, in parts: `extend` of a causal backend, whole sequences of one both ways."""
    longest = _longest(backend, max_length)
    segments = _segments(longest)
    q, k, v = _input(backend, segments.total, seed)
    yield
    answer = yield from (_extended if causal else _attended)(backend, q, k, v, segments)
    wanted = yield from _wanted(backend, q, k, v, segments, causal)
    return Truth(_distance(answer, wanted), BOUNDS[backend.shape.dtype], _uncovered(backend, longest, max_length))


def worst(verdicts: Iterable[Truth]) -> Truth:
    """Of some verdicts, one that has failed, else the one nearest to its bound."""
    return max(verdicts, key=lambda verdict: (not verdict.passed, verdict.error / verdict.bound))


def comparing(backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, answer: Tensor, *, causal: bool) -> Checking:
    """Compare an answer (T, H, D) to one whole sequence of any numbers, q (T, H, D), k and v (T, G, D), in parts.

    The bound grows with what rounding errors grow with: the largest score and the largest value, beyond those of seeded input.
    """
    q, k, v = (x.cpu().double() for x in (q, k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(backend.shape.group, 1)) / math.sqrt(q.shape[-1])
    bound = BOUNDS[backend.shape.dtype] * math.prod(max(1.0, float(x.abs().amax()) / USUAL) for x in (scores, v))
    del scores
    yield
    errors = [0.0]
    for rows in torch.linspace(0, len(q) - 1, min(SAMPLE, len(q))).long().split(ROWS):
        wanted = reference.answer(backend, q, k, v, causal=causal, rows=rows)
        errors.append(float((answer[rows].cpu().double() - wanted).abs().amax()))
        yield
    return Truth(max(errors, key=_nan_last), bound)


def _longest(backend: AttentionBackend, max_length: int) -> int:
    return min(backend.edge + BEYOND, max_length, MOST)


def _segments(longest: int) -> Segments:
    return Segments((1, min(17, longest), longest))


def _uncovered(backend: AttentionBackend, checked: int, max_length: int) -> str:
    """What an input of `checked` tokens was too short for, of what sequences up to `max_length` can show."""
    if checked >= min(backend.edge, max_length):
        return ""
    return f"the pattern reaches {backend.edge} tokens, {checked} were checked: what lies beyond is unchecked"


def _input(backend: AttentionBackend, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal q, k, v of `tokens` tokens in the backend's shape."""
    shape, generator = backend.shape, torch.Generator().manual_seed(seed)
    heads = (shape.query_heads, shape.key_value_heads, shape.key_value_heads)
    q, k, v = (torch.randn(tokens, count, shape.head_width, generator=generator) for count in heads)
    return tuple(x.to(shape.device, shape.dtype) for x in (q, k, v))  # type: ignore[return-value]


def _wanted(
    backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool
) -> Generator[None, None, dict[int, Tensor]]:
    """The reference's answer by packed index, for a sample of rows of each sequence."""
    wanted: dict[int, Tensor] = {}
    at_once = ROWS if backend.exact else SAMPLE  # a kernel works the features of all keys out for any number of rows
    for start, end, _ in segments.spans():
        span = slice(start, end)
        for rows in torch.linspace(0, end - start - 1, min(SAMPLE, end - start)).long().split(at_once):
            answers = reference.answer(backend, q[span].cpu(), k[span].cpu(), v[span].cpu(), causal=causal, rows=rows)
            wanted.update(zip((rows + start).tolist(), answers, strict=True))
            yield
    return wanted


def _distance(answer: Tensor, wanted: dict[int, Tensor]) -> float:
    rows = answer[list(wanted)].cpu().double()
    return float((rows - torch.stack(list(wanted.values()))).abs().amax())


def _nan_last(error: float) -> tuple[bool, float]:
    return error != error, error


def _attended(backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Generator[None, None, Tensor]:
    """The whole batch both ways."""
    answer = torch.empty_like(q)
    for start, end, _ in segments.spans():
        yield from backend.attend_sequence(q[start:end], k[start:end], v[start:end], False, answer[start:end])
    return answer


def _extended(backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Generator[None, None, Tensor]:
    """The whole batch through `extend`: half of each sequence, one token, the rest but one, one."""
    pool = backend.new_pool(1, sum(backend.state_bytes(length) for length in segments.lengths))
    slots = [pool.allocate(length) for length in segments.lengths]
    answer, past = torch.empty_like(q), [0] * len(slots)
    for share in (lambda left: left // 2, lambda left: 1, lambda left: left - 1, lambda left: left):
        take = [max(0, share(length - done)) for length, done in zip(segments.lengths, past, strict=True)]
        live = [n for n, count in enumerate(take) if count]
        if not live:
            continue
        starts = [start for start, _, _ in segments.spans()]
        index = torch.cat([torch.arange(starts[n] + past[n], starts[n] + past[n] + take[n]) for n in live])
        step = Segments(tuple(take[n] for n in live), tuple(past[n] for n in live))
        out = q.new_empty(len(index), *q.shape[1:])
        yield from backend.extending(q[index], k[index], v[index], step, pool, 0, [slots[n] for n in live], out)
        answer[index] = out
        yield
        past = [done + count for done, count in zip(past, take, strict=True)]
    return answer
