"""What a decoder layer does between its products, in C for CPUs with AVX-512; `Layer` in `transformer.py` is the slow reading.

For a decode step, all that it does on either side of its attention (`PackedLayer`), in one pass over its weights as they lie in
oneDNN's order. `csrc/layer.c` computes, built at install into the library of `attention.kernels`. A packed model uses it
where it can (`Transformer.pack`); no gradient passes here.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterator, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from attention import Passage
from attention.kernels.library import (
    FLOAT,
    HERE,
    INT,
    NUMBER,
    POINTER,
    ROOM,
    VIEW,
    WIDEST,
    Kernel,
    floats,
    numbers,
    pack_view,
    packing,
    room,
    rooms,
    threads,
    view,
)

COLUMNS = 64  # rows of a matrix that are packed together, as in product.h
TURNED = 16  # such blocks are packed at a time
PART_BYTES = 64 << 20  # of weights and states that a decode step reads between two pauses: about a millisecond


class _Layer(ctypes.Structure):
    """`Layer` of layer.c."""

    _fields_ = [
        *rooms("attention_norm", "mlp_norm", "scales", "qkv", "out", "gate_up", "down"),
        *numbers("width", "inner", "heads", "groups", "depth", "bits"),
        *floats("epsilon"),
    ]


STATION_WORDS = 2 * len(VIEW) + 3  # of a row of a table, as in layer.c
_LAST = (*ROOM, INT, INT)
KERNEL = Kernel(
    HERE,
    "layer_layout",
    {
        "norm": (POINTER, *ROOM, FLOAT, *_LAST),
        "turn": (POINTER, *ROOM, NUMBER, NUMBER, FLOAT, POINTER, POINTER, *_LAST),
        "gate": (POINTER, *_LAST),
        "question": (POINTER, POINTER, POINTER, POINTER, *ROOM, *ROOM, INT),
        "multiply": (POINTER, *ROOM, NUMBER, NUMBER, *ROOM, *ROOM, *ROOM, INT, INT),
        "output": (POINTER, POINTER, POINTER, *ROOM, *ROOM, INT),
        "decode": (*ROOM, *ROOM, NUMBER, NUMBER, *ROOM, NUMBER, *ROOM, INT),
        "look_up": (*ROOM, NUMBER, *ROOM, NUMBER, NUMBER, *ROOM, INT),
    },
    (len(VIEW), STATION_WORDS),
    (_Layer,),
)


def suits(dtype: torch.dtype, device: torch.device, hidden_size: int, intermediate_size: int, head_dim: int) -> bool:
    """Whether layers of these widths can be computed here."""
    whole = hidden_size % 16 == 0 and intermediate_size % 16 == 0 and head_dim % 32 == 0 and head_dim <= WIDEST
    return whole and KERNEL.obstacle(dtype, device) is None


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of x (T, C)."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    KERNEL.call("norm", _view(x), *_room(weight, x), epsilon, *_last(out))
    return out


def turn(x: Tensor, weights: Tensor | None, heads: int, depth: int, epsilon: float, cos: Tensor, sin: Tensor) -> Tensor:
    """The first heads of projected x (T, any), normed where there are weights (heads, D) and rotated: (T, heads, D).

    cos, sin: (T, 1, D), as of `Transformer.rotation`.
    """
    out = x.new_empty(len(x), heads, depth)
    KERNEL.call("turn", _view(x), *_room(weights, x), heads, depth, epsilon, _view(cos), _view(sin), *_last(out))
    return out


def gate(x: Tensor) -> Tensor:
    """silu(gate) up of x (T, 2 F), gate and up side by side: (T, F)."""
    out = x.new_empty(x.shape[0], x.shape[1] // 2)
    KERNEL.call("gate", _view(x), *_last(out))
    return out


class Matrix(Protocol):
    """A matrix packed as product.h reads it: where its bytes are, and of how many bits its numbers are."""

    @property
    def room(self) -> tuple[int, int]: ...

    @property
    def bits(self) -> int: ...


class Packed:
    """A bfloat16 matrix (N, K) packed so: words int32 (N / 64, K / 2, 64), rounded up with zeros."""

    bits: ClassVar[int] = 16
    is_native: ClassVar[bool] = True  # as of `Quantized`

    def __init__(self, words: Tensor, shape: Sequence[int]) -> None:
        self.words, self.shape = words, torch.Size(shape)

    @classmethod
    def suits(cls, weight: Tensor) -> bool:
        """Whether `of` takes a matrix."""
        is_known = weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0
        return is_known and KERNEL.obstacle(weight.dtype, weight.device) is None

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor) -> Packed:
        """A matrix, packed where it lies, which spares a second one of its size: `weight` is none any more."""
        rows, columns = weight.shape
        whole = weight.detach() if rows % COLUMNS == 0 else functional.pad(weight, (0, 0, 0, -rows % COLUMNS))
        words = whole.contiguous().view(torch.int32).view(-1, COLUMNS, columns // 2)
        for blocks in words.split(TURNED):
            blocks.view(-1, columns // 2, COLUMNS).copy_(blocks.mT.clone(memory_format=torch.contiguous_format))
        return cls(words.view(-1, columns // 2, COLUMNS), weight.shape)

    @classmethod
    def lying(cls, weight: Tensor) -> Packed | None:
        """One that oneDNN has packed, as it lies; None where that is otherwise. Looks at all of it, and takes it twice."""
        is_told = all(hasattr(torch.ops.mkldnn, name) for name in ("data_ptr", "_nbytes"))
        if not weight.is_mkldnn or not is_told or KERNEL.obstacle(weight.dtype, weight.device) is not None:
            return None
        rows, columns = weight.shape
        at, size = torch.ops.mkldnn.data_ptr(weight), torch.ops.mkldnn._nbytes(weight)
        if rows % COLUMNS or columns % 2 or size != 2 * rows * columns:
            return None
        memory = (ctypes.c_char * size).from_address(at)
        memory.owner = weight  # lives as long as who reads it
        words = torch.frombuffer(memory, dtype=torch.int32).view(-1, columns // 2, COLUMNS)
        wanted = weight.to_dense().view(torch.int32).view(-1, COLUMNS, columns // 2).mT
        return cls(words, weight.shape) if torch.equal(words, wanted) else None

    @property
    def nbytes(self) -> int:
        return self.words.nbytes

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def room(self) -> tuple[int, int]:
        return room(self.words)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of these numbers, int64 (T,): (T, K). Raises RuntimeError for a number that is none of a row."""
        (outputs, width), ids = self.shape, ids.contiguous()
        out = torch.empty(len(ids), width, dtype=torch.bfloat16)
        KERNEL.call("look_up", *room(ids), len(ids), *self.room, outputs, width, *room(out), threads())
        return out

    def dense(self) -> Tensor:
        """The matrix as it was."""
        return self.rows(torch.arange(self.shape[0]))

    def logits(self, x: Tensor) -> Tensor:
        """The product with x (T, K), rounded to its dtype: float32 (T, N). A row's are the same whatever the others."""
        assert x.shape[1] == self.shape[1], f"hidden states must be {self.shape[1]} wide, received {x.shape}"
        return product(x, self, self.shape[0], wide=True)


class PackedLayer:
    """A layer on either side of its attention, as `Layer` computes it: for a decode step; in 8 or 4 bits for any rows.

    A row's numbers are the same whatever the others. In bfloat16 they differ from those of oneDNN's products in the last bits,
    for that sums wide rows in several parts.

    Args:
        norms: those of attention and feed-forward, (C).
        scales: of the QK-norm (H + G, D); None where the family norms no heads.
        matrices: of queries, keys and values, of the answer, of gate and up, of down, all of as many bits.
        shape: C, F, H, G, D.
    """

    def __init__(
        self,
        norms: Sequence[Tensor],
        scales: Tensor | None,
        matrices: Sequence[Matrix],
        shape: Sequence[int],
        epsilon: float,
    ) -> None:
        self.width, self.inner, self.heads, self.groups, self.depth = shape
        self._weights = norms, scales, matrices  # which the C reads where they lie
        tight = [part for x in (*norms, scales) for part in _room(x, norms[0])]
        packed = [part for matrix in matrices for part in matrix.room]
        (bits,) = {matrix.bits for matrix in matrices}
        self.takes_prompts = bits < 16
        self.nbytes = sum(packed[1::2])
        asked = self.heads * self.depth
        self._behind_words = self.width + max(self.width, asked) + self.inner  # of a row in `output`, as in layer.c
        before = asked + 2 * self.groups * self.depth + self.width
        self.room_words = asked + max(before, self._behind_words)  # the same in `decode`
        self.packed = packing(_Layer)(*tight, *packed, *shape, bits, epsilon)

    def question(self, x: Tensor, turns: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """`Layer.question`: q (T, H, D), k and v (T, G, D) of x (T, C)."""
        assert turns is not None, "a layer that turns nothing is not packed"
        rows = len(x)
        out = x.new_empty(rows, self.heads + 2 * self.groups, self.depth)
        scratch = x.new_empty(rows * self.width)
        KERNEL.call("question", self.packed, _view(x), *map(_view, turns), *room(out), *room(scratch), threads())
        q, k, v = out.split((self.heads, self.groups, self.groups), dim=1)
        return q, k, v

    def output(self, x: Tensor, answer: Tensor) -> Tensor:
        """`Layer.output`: what the layer hands on, (T, C), from its input x and attention's answer (T, H, D)."""
        rows = len(x)
        out = x.new_empty(rows, self.width)
        scratch = x.new_empty(rows * self._behind_words)
        KERNEL.call("output", self.packed, _view(x), pack_view(*view(answer)), *room(out), *room(scratch), threads())
        return out


class PackedStack:
    """All layers of a model, for decode steps that go through them in C, attention and all; one by one is the slow reading."""

    def __init__(self, layers: Sequence[PackedLayer]) -> None:
        self._layers = tuple(layers)  # whose weights the C reads where they lie
        self._table = b"".join(layer.packed for layer in layers)
        self._room_words = max(layer.room_words for layer in layers)
        self._bytes = sum(layer.nbytes for layer in layers)

    def passing(self, x: Tensor, turns: Sequence[tuple[Tensor, Tensor] | None], passage: Passage) -> Iterator[None]:
        """Make of the stream x (T, C), where it lies, what the last layer hands on. Pauses before, and about every millisecond.

        turns: of each layer, as of `Transformer.turns_by_layer`. passage: of T sequences; begun and ended here.
        """
        kinds = {id(each): each for each in turns if each is not None}
        told = {kind: (*_words(cos), *_words(sin)) for kind, (cos, sin) in kinds.items()}
        stations = array("q")
        for each, at in zip(turns, passage.at, strict=True):
            stations.extend((*told[id(each)], *at))
        count = len(self._layers)
        some = max(1, count * PART_BYTES // (self._bytes + passage.nbytes))
        scratch = x.new_empty(len(x) * self._room_words)
        table, stream = (self._table, len(self._table), stations.buffer_info()[0], 8 * len(stations)), (*room(x), len(x))
        passage.begin()
        for first in range(0, count, some):
            yield
            KERNEL.call("decode", *table, first, min(some, count - first), *stream, *room(scratch), threads())
        passage.end()


def product(x: Tensor, matrix: Matrix, size: int, bias: Tensor | None = None, wide: bool = False) -> Tensor:
    """x (T, C) times a matrix (size, C), plus a bias (size): bfloat16 (T, size), or as float32 where it is to be wide."""
    out = x.new_empty(len(x), size, dtype=torch.float32 if wide else None)
    scratch = None if matrix.bits == 16 else x.new_empty(x.numel())
    places = _view(x), *matrix.room, matrix.bits, size, *_room(bias, x), out.data_ptr(), out.nbytes, *room(scratch)
    KERNEL.call("multiply", *places, wide, threads())
    return out


def _view(x: Tensor) -> bytes:
    """A tensor (T, width) or (T, 1, width) as given.h describes it."""
    return pack_view(*_words(x))


def _words(x: Tensor) -> tuple[int, ...]:
    """The same in words."""
    (rows, *_, width), (row, *_, element) = x.shape, x.stride()
    return x.data_ptr(), x.itemsize, rows, x.numel() // (rows * width or 1), width, row, 0, element


def _room(x: Tensor | None, like: Tensor) -> tuple[int, int]:
    """Tight memory of the same dtype, and its bytes."""
    if x is not None and x.dtype != like.dtype:
        raise RuntimeError(f"weights must be {like.dtype}, received {x.dtype}")
    return room(x)


def _last(out: Tensor) -> tuple[int, int, bool, int]:
    """What all three are told last: where the answer goes, whether it is float32, and the threads."""
    return out.data_ptr(), out.nbytes, out.dtype == torch.float32, threads()
