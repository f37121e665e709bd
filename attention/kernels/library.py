"""The compiled functions of a kernel: found where install put them, compared with what Python tells them, called.

A C file and the Python file beside it agree on structs and tables. The C says their sizes and offsets, which are compared
when it is loaded, and asks for the size of every buffer before it touches one. Without a C compiler install goes on, and
there is no library; built for, or run by, a CPU without AVX-512 it says so (`supported`, cpu.h).
"""

from __future__ import annotations

import ctypes
import importlib.machinery
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

from attention.shapes import HeadShape

HERE = Path(__file__).parent  # where install puts the library of the kernels of this folder
WIDEST, MOST_HEADS = 256, 128  # what the kernels' own memory is made for
FAR = 1 << 40  # a distance that binds nothing, as in given.h
DTYPES = {torch.float32: 1, torch.bfloat16: 2}  # by the bits with which cpu.h names them
VIEW = ("at", "size", "rows", "heads", "width", "row", "head", "element")  # a tensor, as in given.h
POINTER, NUMBER, FLOAT, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
ROOM = (POINTER, NUMBER)  # tight memory: where it is, and its bytes
ANSWER = (POINTER, NUMBER, POINTER, POINTER, POINTER, *ROOM, INT)  # of an `Answer`, see given.h
Field = tuple[str, type]

pack_view = Struct(f"{len(VIEW)}q").pack


def views(*names: str) -> list[Field]:
    """The fields of tensors in a struct."""
    return [(f"{name}_{part}", NUMBER if index else POINTER) for name in names for index, part in enumerate(VIEW)]


def rooms(*names: str) -> list[Field]:
    """The fields of tight memory: where it is, and its bytes."""
    return [field for name in names for field in ((name, POINTER), (f"{name}_bytes", NUMBER))]


def numbers(*names: str) -> list[Field]:
    """Those of whole numbers."""
    return [(name, NUMBER) for name in names]


def floats(*names: str) -> list[Field]:
    """Those of float32."""
    return [(name, FLOAT) for name in names]


def packing(struct: type[ctypes.Structure]) -> Callable[..., bytes]:
    """Its fields, in their order, as the struct in memory: twice as fast as to fill one in, and a step does feel it."""
    kinds = ("f" if kind is FLOAT else "q" for _, kind, *_ in struct._fields_)
    return Struct("".join(kinds) + "0q").pack  # the last: to the struct's whole size


def view(x: Tensor | None) -> tuple[int, ...]:
    """A tensor (rows, heads, width) as a kernel is told of it."""
    return _NOTHING if x is None else (x.data_ptr(), x.itemsize, *x.shape, *x.stride())


_NOTHING = (0,) * len(VIEW)


def room(x: Tensor | None) -> tuple[int, int]:
    """Tight memory as a kernel is told of it."""
    if x is None:
        return 0, 0
    if not x.is_contiguous():
        raise RuntimeError(f"what the kernel takes as it lies in memory must be tight, received strides {x.stride()}")
    return x.data_ptr(), x.nbytes


def no_heads(shape: HeadShape) -> str:
    """Why the kernels of attention take no heads of a shape; empty where they do."""
    if shape.head_width % 32 == 0 and shape.head_width <= WIDEST and shape.query_heads <= MOST_HEADS:
        return ""
    limits = f"heads whose width is a multiple of 32 up to {WIDEST}, and at most {MOST_HEADS} of them"
    return f"{limits}; these are {shape.query_heads} of {shape.head_width}"


@dataclass(frozen=True)
class Told:
    """Who answers a step at each of some layers, an `Answer` of given.h, what it is told, and what that points to."""

    answer: int
    call: bytes
    kept: Sequence[object]

    @property
    def addresses(self) -> tuple[int, int]:
        """Of the function, and of what it is told: for as long as this lives."""
        return self.answer, ctypes.cast(ctypes.c_char_p(self.call), POINTER).value or 0


def threads() -> int:
    """Threads of a call: torch's."""
    return torch.get_num_threads()


_by_team = False


def compute_by_team() -> None:
    """From now on whole sequences are answered by the team of team.c, not by OpenMP's threads.

    For a process whose model's products are the team's: OpenMP's worker spins on behind each of its regions and keeps a member
    of the team off its CPU, so those who compute in turns should be the same. The answers are the same to the last bit.
    """
    global _by_team
    _by_team = True


def is_by_team() -> bool:
    """Whether `compute_by_team` was called."""
    return _by_team


def gather_team(threads: int) -> None:
    """Let the team of team.c come to be for calls of so many threads: its members then can be told from other threads."""
    if TEAM.library() is not None:
        TEAM.call("gather_team", threads)


class Kernel:
    """The functions of one C file.

    Args:
        home: the folder with the library that they were compiled into.
        layout: the name of the table in which the C says its sizes and offsets.
        functions: the types of each function's arguments. Each returns null, or what was wrong with what it was given.
        tables: words of a row of each table.
        structs: what the functions are told; the fields of a view count as one.
    """

    def __init__(
        self,
        home: Path,
        layout: str,
        functions: Mapping[str, Sequence[type]],
        tables: Sequence[int] = (),
        structs: Sequence[type[ctypes.Structure]] = (),
    ) -> None:
        self.home = home
        self.layout = layout
        self.functions = functions
        self.tables = tables
        self.structs = structs
        self._opened: tuple[Path, ctypes.CDLL | None] | None = None

    def library(self) -> ctypes.CDLL | None:
        """The compiled functions, None where the package was installed without a C compiler.

        Raises:
            RuntimeError: they were built from other sources than these.
        """
        if self._opened is None or self._opened[0] is not self.home:
            self._opened = self.home, self._open()
        return self._opened[1]

    def obstacle(self, dtype: torch.dtype, device: torch.device, limits: str = "") -> str | None:
        """Why they cannot be called with tensors like these here; None when they can. limits: what else speaks against it."""
        if device.type != "cpu":
            return f"the native kernel is for CPUs, the device is {device}"
        if dtype not in DTYPES:
            return f"the native kernel takes float32 and bfloat16, the dtype is {dtype}"
        if limits:
            return f"the native kernel takes {limits}"
        found = self.library()
        if found is None:
            return "the native kernel was not built, for which installing needs a C compiler with OpenMP"
        if not found.supported() & DTYPES[dtype]:
            return f"this CPU lacks the instructions of the native kernel for {dtype} (AVX-512; for bfloat16 -bf16 and -VNNI)"
        return None

    def call(self, function: str, *arguments: object) -> None:
        """Call a function. Raises RuntimeError where it refused what it was given, before it touched any of it."""
        found = self.library()
        assert found is not None, "`obstacle` tells whether it can be called"
        reason = getattr(found, function)(*arguments)
        if reason is not None:
            raise RuntimeError(f"the native kernel was given what it cannot take: {reason.decode()}")

    def address(self, function: str) -> int:
        """Where a function is, for another that calls it."""
        return ctypes.cast(getattr(self.library(), function), POINTER).value or 0

    def _open(self) -> ctypes.CDLL | None:
        beside = (self.home / ("_native" + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES)
        path = next((path for path in beside if path.exists()), None)
        if path is None:
            return None
        found = ctypes.CDLL(str(path))  # torch's OpenMP is loaded already, and both share its threads
        ours = [*(8 * words for words in self.tables), *(n for struct in self.structs for n in _offsets(struct))]
        if _layout(found, self.layout) != ours:
            raise RuntimeError(f"{path} was built from other sources than these: install the package again")
        for name, types in self.functions.items():
            function = getattr(found, name)
            function.argtypes, function.restype = types, ctypes.c_char_p
        return found


def _layout(found: ctypes.CDLL, name: str) -> list[int]:
    """A table of sizes and offsets; empty where there is none."""
    if not hasattr(found, name):
        return []
    table = ctypes.cast(getattr(found, name), ctypes.POINTER(NUMBER))
    return list(takewhile(lambda x: x >= 0, (table[i] for i in count())))


def _offsets(struct: type[ctypes.Structure]) -> list[int]:
    """Its size and where its fields stand, a view counted as one."""
    inner = tuple(f"_{part}" for part in VIEW[1:])
    names = [name for name, *_ in struct._fields_ if not name.endswith(inner)]
    return [ctypes.sizeof(struct), *(getattr(struct, name).offset for name in names)]


TEAM = Kernel(HERE, "team_layout", {"gather_team": (INT,)})
