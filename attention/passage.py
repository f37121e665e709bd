"""A decode step's attention at every layer of a pool, for a model that goes through its layers in C and asks there.

Bit for bit what `extend` answers layer by layer, which is the slow reading: a layer costs a call in C instead of a dozen
operators of torch. Where a backend's step is not all in C there is none (`AttentionBackend.told`).
"""

from __future__ import annotations

from collections.abc import Sequence

from attention.kernels.library import Told
from attention.pool import StatePool
from attention.shapes import Segments


class Passage:
    """One token of each of some sequences on its way: `begin` takes their states, `end` settles them.

    at: of each layer who answers it, what that is told, and the layer's number there, see `Answer` of given.h.
    """

    def __init__(
        self, pool: StatePool, slots: Sequence[int], segments: Segments, told: Sequence[tuple[Sequence[int], Told]]
    ) -> None:
        self._pool, self._slots, self._segments, self._told = pool, tuple(slots), segments, told
        self.at = [(0, 0, 0)] * len(pool.backends)
        for layers, each in told:
            addresses = each.addresses
            for number, layer in enumerate(layers):
                self.at[layer] = (*addresses, number)

    @classmethod
    def of(cls, pool: StatePool, slots: Sequence[int], segments: Segments) -> Passage | None:
        """That of a decode step of a sequence in each of `slots`; None where some layer's backend has none.

        Raises:
            ValueError: a slot that is not in use.
        """
        if segments.total != len(slots):
            return None
        told = []
        for backend, layers, states in pool.stacked(slots):
            each = backend.told(segments.past, states)
            if each is None:
                return None
            told.append((layers, each))
        return cls(pool, slots, segments, told)

    @property
    def nbytes(self) -> int:
        """Memory of the states."""
        return self._pool.bytes_of(self._slots)

    def begin(self) -> None:
        """Take the states: they are undefined until the end. Raises ValueError as `extend` does."""
        self._pool.take_whole(self._slots, self._segments)

    def end(self) -> None:
        """All layers have answered, and their states hold the tokens."""
        self._pool.settle_whole(self._slots, self._segments)
