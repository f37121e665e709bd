"""Texts under one backend, read piece by piece with nothing around the model: what benchmarks and the card's tables time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attention import AttentionBackend, Passage, Segments, StatePool
from service.model.transformer import Transformer


def extended(
    model: Transformer, backend: AttentionBackend, pool: StatePool, slots: Sequence[int], tokens: Tensor, segments: Segments
) -> Tensor:
    """The hidden states (T, C) of further tokens, int64 (T,), of texts in some slots; one token of each is a decode step."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return backend.extend(q, k, v, segments, pool, layer, slots)

    is_decode = segments.total == len(slots) and min(segments.past) > 0
    passage = Passage.of(pool, slots, segments) if is_decode else None
    return model.hidden(tokens, segments.positions(), attend, is_decode=is_decode, passage=passage)


class Continuation:
    """A text of up to `most` tokens, its state kept between reads. `past`: how many it has."""

    def __init__(self, model: Transformer, backend: AttentionBackend, most: int) -> None:
        self.past = 0
        self._model, self._backend = model, backend
        self._pool = backend.new_pool(model.config.num_hidden_layers, 2**40)
        self._slot = self._pool.allocate(most)

    @property
    def state_bytes(self) -> int:
        """Memory of its state."""
        return self._pool.bytes_in_use

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> Tensor:
        """Take in some more tokens, int64 (T,): the logits behind the last, float32 (1, V)."""
        segments = Segments((len(tokens),), (self.past,))
        hidden = extended(self._model, self._backend, self._pool, [self._slot], tokens, segments)
        self.past += len(tokens)
        return self._model.logits(hidden[-1:])
