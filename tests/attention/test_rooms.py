"""The rooms of `attention`: who may import whom, what others may reach, and that its page and the C tell what is there."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional

import attention
from attention.kernels import int8
from attention.kernels.features import torch as features
from attention.kernels.softmax import capped, choice, decode, streaming
from attention.kernels.softmax import torch as softmax
from service.model import quantized, transformer
from tests.test_imports import ROOT, imports, is_within, modules

LEVELS = (
    ("shapes", "parts", "projection", "relative"),
    ("pool", "cuda", "kernels", "kernels.library"),
    ("steps", "passage", "kernels.int8"),
    ("interface", "history"),
    ("kernels.softmax", "kernels.features"),
    ("kernels.softmax.streaming",),
    ("kernels.softmax.decode", "kernels.softmax.capped", "kernels.softmax.choice"),
    ("kernels.softmax.biased",),
    ("kernels.softmax.torch", "kernels.softmax.native", "kernels.features.torch", "kernels.features.native"),
    ("kernels.implementation",),
    ("backends",),
    ("layered",),
    ("whole",),
    ("",),  # the face
    ("reference", "memory"),
    ("truth", "picture", "peers"),
    ("benchmark",),
)
"""A module imports those of lower levels only."""

READINGS = ("streaming", "decode", "choice", "torch", "native")
OUTSIDE = {  # what others may import beside the face, and who
    "attention.truth": ("service",),
    "attention.projection": ("service.training",),
    "attention.kernels.library": ("service.model.native", "service.model.encoder_layer"),
}
ALL = dict(modules())
OURS = {name: path for name, path in ALL.items() if is_within(name, "attention")}


def level(module: str) -> int:
    room = module.removeprefix("attention").removeprefix(".")
    rooms = [name for at in LEVELS for name in at if room == name or (name == "backends" and is_within(room, name))]
    assert len(rooms) == 1, f"{module} has no level"
    return next(at for at, names in enumerate(LEVELS) if rooms[0] in names)


def imported(path: Path) -> Iterator[str]:
    """The modules of `attention` that a file imports, and names of its face."""
    for name in imports(path):
        if is_within(name, "attention"):
            while name not in ALL and name.rpartition(".")[0] in ALL and name.rpartition(".")[0] != "attention":
                name = name.rpartition(".")[0]
            yield name


def climbing(module: str, path: Path) -> list[str]:
    """What a module of ours imports from its own level or above."""
    found = [name if name in OURS else "attention" for name in imported(path)]
    return [name for name in found if level(name) >= level(module) and not name == module == "attention"]


def reaching(module: str, path: Path) -> list[str]:
    """What a module of others imports past the face."""
    allowed = {name for name, who in OUTSIDE.items() if any(is_within(module, each) for each in who)}
    face = {"attention", *(f"attention.{name}" for name in attention.__all__)}
    return [name for name in imported(path) if name not in face | allowed]


def asking(module: str, path: Path) -> list[str]:
    """Readings that a module imports which is no part of the kernels: it would know who computes."""
    found = [name for name in imported(path) if is_within(name, "attention.kernels")]
    return [name for name in found if name.rpartition(".")[2] in READINGS and not is_within(module, "attention.kernels")]


@pytest.mark.parametrize("module", OURS)
def test_a_module_imports_lower_rooms_only(module: str) -> None:
    assert climbing(module, OURS[module]) == [] == asking(module, OURS[module])


def test_nobody_outside_reaches_past_the_face() -> None:
    others = {module: path for module, path in ALL.items() if module not in OURS}
    assert {module: found for module, path in others.items() if (found := reaching(module, path))} == {}


@pytest.mark.parametrize(
    ("check", "module", "source"),
    [
        (climbing, "attention.pool", "from attention.interface import AttentionBackend"),
        (climbing, "attention.history", "from attention.kernels.softmax import Runs"),
        (climbing, "attention.interface", "from attention import HeadShape"),
        (climbing, "attention.backends.dense", "from attention.backends import linear"),
        (asking, "attention.backends.dense", "from attention.kernels.softmax import native"),
        (asking, "attention.truth", "from attention.kernels.softmax.torch import ROWS"),
        (reaching, "service.engine.engine", "from attention.backends.dense import Dense"),
        (reaching, "service.engine.engine", "from attention.kernels import library"),
        (reaching, "service.http.routes", "import attention.pool"),
    ],
)
def test_a_breach_is_found(check: object, module: str, source: str, tmp_path: Path) -> None:
    path = tmp_path / "breach.py"
    path.write_text(source)
    assert callable(check) and check(module, path)


def test_the_page_names_every_file() -> None:
    tree = (ROOT / "attention/README.md").read_text().partition("## What is where")[2].partition("\n## ")[0]
    files = [path for path in (ROOT / "attention").rglob("*") if path.suffix in (".py", ".c", ".h")]
    files = [path for path in files if path.parent.name != "backends"]  # a new one changes no page
    names = {path.parent.name + "/" if path.name == "__init__.py" else path.name for path in files}
    assert len(names) > 20 and [name for name in sorted(names) if name not in tree] == []


SLOW: dict[str, tuple[ModuleType, ...]] = {
    "attention/kernels/simd.h": (streaming, int8),
    "attention/kernels/softmax/softmax.c": (softmax, streaming, decode, choice, capped, int8),
    "attention/kernels/int8.c": (int8,),
    "attention/kernels/features/features.c": (features,),
    "service/model/csrc/encoder.c": (transformer,),
    "service/model/csrc/layer.c": (transformer,),
    "service/model/csrc/product.h": (quantized,),
}
ROOTS = {"torch": torch, "functional": functional}
NOT_READ = re.compile(  # no arithmetic
    r"^(wrong_\w+|is_\w+|most|least|word|within|room_words|behind_words|heads_of|leave|advance|prefetch|supported|\w+_bytes"
    r"|panels_of|tiles_of|tile_rows|whole_blocks)$"
)


def slow_readings(source: str) -> Iterator[tuple[str, list[str]]]:
    """Each function of a C file, and what its comment names."""
    for found in re.finditer(r"(/\*(?:(?!\*/).)*\*/)?\n(?:INLINE|static|const char \*)[^\n;={]*?\b(\w+)\(", source, re.S):
        comment = re.sub(r"\s+\*?\s*", " ", found[1] or "")
        yield found[2], re.findall(r"`([^`]+)`", comment.partition("Slow reading:")[2])


@pytest.mark.parametrize("file", SLOW)
def test_every_function_in_c_names_its_slow_reading(file: str) -> None:
    functions = dict(slow_readings((ROOT / file).read_text().partition("#else")[0]))
    assert len(functions) >= 2
    for function, names in functions.items():
        assert names or re.match(NOT_READ, function), f"{function} of {file} names no slow reading"
        for name in names:
            first, *rest = name.split(".")
            found = ROOTS.get(first) or next((getattr(m, first) for m in SLOW[file] if hasattr(m, first)), None)
            assert found is not None, f"{function} of {file}: there is no {name}"
            for part in rest:
                found = getattr(found, part)


@pytest.mark.parametrize("file", [*SLOW, "attention/kernels/given.h", "attention/kernels/cpu.h"])
def test_a_line_of_c_has_no_more_than_a_hundred_columns(file: str) -> None:
    assert [line for line in (ROOT / file).read_text().splitlines() if len(line) > 100] == []


def test_there_are_rooms_to_judge() -> None:
    assert {name for at in LEVELS for name in at} >= {name.removeprefix("attention.") for name in OURS if "." in name} - {
        f"backends.{name}" for name in attention.names()
    }
    assert importlib.import_module("attention.kernels.features").__file__ != features.__file__
