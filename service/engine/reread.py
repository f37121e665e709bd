"""The served-truth check on real tokens: what was served last, read again, each layer's answer held to its definition.

Seeded input has scores of one size and no structure; a text has both. `truth.comparing` judges a layer.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from attention import Segments, truth
from service.engine.allowlist import Lane
from service.engine.runner import Runner

TAIL = 256  # tokens of what was served last


@torch.inference_mode()
def checking(runner: Runner, lane: Lane, tokens: array[int], is_causal: bool) -> Generator[None, None, truth.Truth]:
    """Read a text under a lane of its own and compare what its layers answer, in parts. The worst layer's verdict.

    lane: one that nothing else uses; room for the text is taken in its pool.
    """
    segments, slots = Segments((len(tokens),)), [lane.allocate(len(tokens))]
    worst = truth.Truth(0.0, truth.BOUNDS[lane.backend.shape.dtype])

    def answering(layer: int, question: tuple[Tensor, Tensor, Tensor], given: Segments, out: Tensor) -> Iterator[None]:
        nonlocal worst
        yield from lane.answering(layer, question, given, slots, out)
        verdict = yield from truth.comparing(lane.pool.backends[layer], *question, out, causal=is_causal)
        worst = truth.worst((worst, verdict))

    yield from runner.hidden(tokens, segments, answering, [len(tokens)])
    lane.release(slots[0])
    return worst
