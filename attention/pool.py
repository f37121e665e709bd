"""Decode states of many sequences within a byte limit.

What stands in a state is its backend's affair (`AttentionBackend.state`); here are its bytes, and how many tokens it is of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attention.shapes import MOST_TOKENS, Segments

if TYPE_CHECKING:
    from attention.interface import AttentionBackend

UNDEFINED = -1  # in the place of a count: while an extend is under way, and after one that was given up


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


class Undo:
    """What tokens that may be taken back wrote over in the state of one sequence at one layer.

    Its memory serves again: fresh memory costs a fault per page, more than the copy.
    """

    def __init__(self) -> None:
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by position: views of the state, and what stood there
        self._spare: list[Tensor] = []

    def keep(self, position: int, views: Sequence[Tensor]) -> None:
        """Keep what stands where the token at a position is about to write."""
        for view in views:
            fits = bool(self._spare) and self._spare[-1].shape == view.shape
            copy = self._spare.pop() if fits else torch.empty_like(view)
            self._kept.setdefault(position, []).append((view, copy.copy_(view)))

    def restore(self, tokens: int) -> None:
        """Write back what stood there behind the first `tokens` tokens of the sequence."""
        for position in sorted(self._kept, reverse=True):
            for written, before in self._kept[position] if position >= tokens else ():
                written.copy_(before)

    def forget(self) -> None:
        """All that is kept is of no use any more."""
        if not self._kept:
            return
        self._spare += [before for kept in self._kept.values() for _, before in reversed(kept)]
        self._kept.clear()

    @property
    def nbytes(self) -> int:
        return sum(
            tensor.nbytes for kept in (self._spare, *([b for _, b in own] for own in self._kept.values())) for tensor in kept
        )


@dataclass
class _Slot:
    max_tokens: int
    tensors: list[dict[str, Tensor]]  # of the layers of each backend, (layers, ...)
    views: list[dict[str, Tensor]]  # of each layer, made once, since a decode step asks for many
    held: list[int]  # tokens in the state of each layer, or UNDEFINED
    undo: list[Undo]  # of each layer
    nbytes: int
    least: list[int]  # tokens that each layer's state can be taken back to


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

    Args:
        backends: the backend of each layer; layers of one backend share their tensors.

    Raises:
        ValueError: no layer, or less than 0 bytes.
    """

    def __init__(self, backends: Sequence[AttentionBackend], max_bytes: int) -> None:
        if not backends or max_bytes < 0:
            raise ValueError(
                f"a pool needs at least 1 layer and no less than 0 bytes, received {len(backends)} and {max_bytes}"
            )
        self.backends = tuple(backends)
        self.max_bytes = max_bytes
        self.bytes_in_use = 0
        self._layers_of = {each: [at for at, own in enumerate(backends) if own is each] for each in dict.fromkeys(backends)}
        self._slots: dict[int, _Slot] = {}
        self._next = 0

    def slot_bytes(self, max_tokens: int) -> int:
        """Bytes that a slot for a sequence of up to `max_tokens` tokens takes."""
        return sum(len(layers) * backend.state_bytes(max_tokens) for backend, layers in self._layers_of.items())

    def allocate(self, max_tokens: int) -> int:
        """Take a slot for a sequence of up to `max_tokens` tokens; returns its number, never used before.

        Raises:
            PoolExhausted: the slot does not fit beside the slots in use.
            ValueError: not even one token, or more than a sequence can have.
        """
        if not 1 <= max_tokens <= MOST_TOKENS:
            raise ValueError(f"a slot is for 1 to {MOST_TOKENS} tokens, received {max_tokens}")
        self._need(self.slot_bytes(max_tokens))
        tensors = [
            {name: spec.new(backend.shape.device, (len(layers),)) for name, spec in backend.state(max_tokens).items()}
            for backend, layers in self._layers_of.items()
        ]
        return self._keep(max_tokens, tensors, [0] * len(self.backends))

    def copy(self, slot: int) -> int:
        """A new slot that continues from where `slot` stands, so that several answers share one prefill.

        Raises:
            PoolExhausted: the copy does not fit.
        """
        old = self._slots[slot]
        self._need(self.slot_bytes(old.max_tokens))
        tensors = [{name: tensor.clone() for name, tensor in each.items()} for each in old.tensors]
        return self._keep(old.max_tokens, tensors, list(old.held))

    def adopt(self, other: StatePool, slot: int, tokens: int, max_tokens: int) -> int:
        """A new slot for up to `max_tokens` tokens that continues from the first `tokens` in a slot of another pool.

        That slot stays as it is. It holds exactly so many tokens, or more where every layer's backend `keeps_all`.

        Raises:
            PoolExhausted: the new slot does not fit.
            ValueError: a pool of other backends, or a slot that does not hold the state of so many tokens.
        """
        held = other._slots[slot].held
        if other.backends != self.backends:
            raise ValueError("a slot can be taken over from a pool of the same backends only")
        if any(at < tokens or (at > tokens and not own.keeps_all) for at, own in zip(held, self.backends, strict=True)):
            raise ValueError(f"slot {slot} holds the state of {held[0]} tokens, of which that of {tokens} cannot be had")
        if not 1 <= tokens <= max_tokens:
            raise ValueError(f"a slot for {max_tokens} tokens cannot take {tokens} over")
        new = self.allocate(max_tokens)
        entry = self._slots[new]
        for layer, backend in enumerate(self.backends):
            backend.carry(other._slots[slot].views[layer], entry.views[layer], tokens)
        entry.held[:] = entry.least[:] = [tokens] * len(self.backends)
        return new

    def release(self, slot: int) -> None:
        """Give a slot's bytes back. Raises KeyError for a slot that is not in use."""
        self.bytes_in_use -= self._slots.pop(slot).nbytes

    def tensors(self, slot: int) -> dict[str, Tensor]:
        """The state tensors of a slot, each (layers, ...); those of a second backend are named with its first layer, `k.1`."""
        first, *others = self._slots[slot].tensors
        named = zip(others, list(self._layers_of.values())[1:], strict=True)
        return first | {f"{name}.{layers[0]}": tensor for each, layers in named for name, tensor in each.items()}

    def bytes_of(self, slots: Sequence[int]) -> int:
        """Bytes that slots take."""
        return sum(self._slots[slot].nbytes for slot in slots)

    def pretend(self, slot: int, tokens: int) -> None:
        """Take what stands in a slot for the state of so many tokens, at every layer: for measurements."""
        entry = self._slots[slot]
        if not 0 <= tokens <= entry.max_tokens:
            raise ValueError(f"slot {slot} holds 0 to {entry.max_tokens} tokens, received {tokens}")
        entry.held[:] = entry.least[:] = [tokens] * len(self.backends)

    def backend(self, layer: int) -> AttentionBackend:
        """The backend of a layer. Raises ValueError where there is no such layer."""
        if not 0 <= layer < len(self.backends):
            raise ValueError(f"the pool has layers 0 to {len(self.backends) - 1}, received {layer}")
        return self.backends[layer]

    def take(self, slots: Sequence[int], layer: int, segments: Segments) -> list[dict[str, Tensor]]:
        """The state of each slot at one layer, to be extended by `segments`; undefined until `settle`.

        Raises:
            ValueError: no such layer or slot, a slot named twice or not for each sequence, one without room for the new tokens,
                or one whose state is not that of `past` tokens. Nothing is taken then.
        """
        self.backend(layer)
        return [entry.views[layer] for entry in self._taken(slots, (layer,), segments)]

    def take_whole(self, slots: Sequence[int], segments: Segments) -> None:
        """`take` at every layer."""
        self._taken(slots, range(len(self.backends)), segments)

    def stacked(self, slots: Sequence[int]) -> list[tuple[AttentionBackend, list[int], list[dict[str, Tensor]]]]:
        """Each backend, its layers, and the state of each slot at all of these, every tensor (layers, ...).

        Raises ValueError for a slot that is not in use.
        """
        if strange := [slot for slot in slots if slot not in self._slots]:
            raise ValueError(f"slot {strange[0]} is not in use")
        entries = [self._slots[slot] for slot in slots]
        layers = enumerate(self._layers_of.items())
        return [(backend, own, [entry.tensors[at] for entry in entries]) for at, (backend, own) in layers]

    def settle(self, slots: Sequence[int], layer: int, segments: Segments, by_steps: bool = False) -> None:
        """Note that slots that were taken hold the new tokens, too, and whether those can be taken back."""
        for slot, length, past in zip(slots, segments.lengths, segments.past, strict=True):
            entry = self._slots[slot]
            entry.held[layer], entry.least[layer] = past + length, past + (1 if by_steps else length)

    def settle_whole(self, slots: Sequence[int], segments: Segments) -> None:
        """`settle` at every layer."""
        for slot, length, past in zip(slots, segments.lengths, segments.past, strict=True):
            entry = self._slots[slot]
            entry.held[:] = entry.least[:] = [past + length] * len(self.backends)

    def undo(self, slots: Sequence[int], layer: int) -> list[Undo]:
        """Where is kept what further tokens of each slot write over at one layer."""
        return [self._slots[slot].undo[layer] for slot in slots]

    def take_back(self, slot: int, tokens: int) -> None:
        """Leave a slot, which was extended by steps last, as if only its first `tokens` tokens had been appended.

        Raises:
            ValueError: it holds fewer at some layer, or those behind them, the first of the last call among them, did not come
                by steps. Nothing is taken back then.
        """
        entry = self._slots[slot]
        for layer, (least, held) in enumerate(zip(entry.least, entry.held, strict=True)):
            if not least <= tokens <= held:
                raise ValueError(f"slot {slot} holds {held} tokens at layer {layer}, which cannot be taken back to {tokens}")
        for layer, (backend, held, view) in enumerate(zip(self.backends, entry.held, entry.views, strict=True)):
            if held > tokens:
                entry.undo[layer].restore(tokens)
                backend.cut(view, tokens, held)
                entry.held[layer] = tokens
            entry.undo[layer].forget()
            entry.least[layer] = tokens

    def undo_bytes(self, max_tokens: int, count: int) -> int:
        """Most bytes that a slot for so many tokens takes beside its own while `count` of them can be taken back."""
        layers = self._layers_of.items()
        return sum(len(own) * backend.undo_bytes(max_tokens, count) for backend, own in layers)

    def _taken(self, slots: Sequence[int], layers: Sequence[int], segments: Segments) -> list[_Slot]:
        """Slots that are taken at some layers, see `take`."""
        if len(set(slots)) != len(segments.lengths) or len(slots) != len(segments.lengths):
            raise ValueError(f"slots must name {len(segments.lengths)} slots, one per sequence, received {tuple(slots)}")
        taken = []
        for slot, length, past in zip(slots, segments.lengths, segments.past, strict=True):
            entry = self._slots.get(slot)
            wrong = (
                layers if entry is None or past + length > entry.max_tokens else [n for n in layers if entry.held[n] != past]
            )
            if entry is None or wrong:
                raise ValueError(_why_not(slot, entry, wrong[0], length, past))
            taken.append(entry)
        for entry in taken:
            for layer in layers:
                entry.held[layer] = UNDEFINED
                entry.undo[layer].forget()
        return taken

    def __len__(self) -> int:
        return len(self._slots)

    def _need(self, needed: int) -> None:
        if self.bytes_in_use + needed > self.max_bytes:
            raise PoolExhausted(needed, self.max_bytes - self.bytes_in_use)

    def _keep(self, max_tokens: int, tensors: list[dict[str, Tensor]], held: list[int]) -> int:
        views: list[dict[str, Tensor]] = [{} for _ in self.backends]
        for each, layers in zip(tensors, self._layers_of.values(), strict=True):
            for at, layer in enumerate(layers):
                views[layer] = {name: tensor[at] for name, tensor in each.items()}
        slot, self._next, size = self._next, self._next + 1, self.slot_bytes(max_tokens)
        self._slots[slot] = _Slot(max_tokens, tensors, views, held, [Undo() for _ in views], size, list(held))
        self.bytes_in_use += size
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
