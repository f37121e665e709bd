"""One text under one backend, read piece by piece with nothing around the model: what benchmarks and the card's tables time."""

from __future__ import annotations

import torch
from torch import Tensor

from attention import AttentionBackend, Passage, Segments
from service.model.transformer import Transformer


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
        segments, is_decode = Segments((len(tokens),), (self.past,)), self.past > 0 and len(tokens) == 1

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._backend.extend(q, k, v, segments, self._pool, layer, [self._slot])

        passage = Passage.of(self._pool, [self._slot], segments) if is_decode else None
        hidden = self._model.hidden(tokens, segments.positions(), attend, is_decode=is_decode, passage=passage)
        self.past += len(tokens)
        return self._model.logits(hidden[-1:])
