"""The compiled functions: they refuse what does not fit, their layouts are compared, and a package without them says so."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attention import HeadShape, Segments, build
from attention.kernels.features import native as features
from attention.kernels.library import Kernel
from attention.kernels.softmax import native as softmax
from tests.attention.laws import extend_in, need_native, tokens


class Meddler:
    """The compiled kernel, with one field of what it is told changed on the way."""

    def __init__(self, kernel: Kernel, field: str, change: Callable[[int], int]) -> None:
        self.field, self.change, self.met = field, change, 0
        self.kernel = kernel.library()

    def __getattr__(self, function: str) -> Callable[..., bytes | None]:
        def call(packed: bytes, *rest: Any) -> bytes | None:
            told = STRUCTS[function].from_buffer_copy(packed)
            value = getattr(told, self.field, None)
            is_given = value or not self.field.endswith(PARTS)  # what is null has no size
            if value is not None and is_given and self.change(value) != value:
                self.met += 1
                setattr(told, self.field, self.change(value))
            return getattr(self.kernel, function)(bytes(told), *rest)

        return getattr(self.kernel, function) if function == "supported" else call


def changes(field: str) -> list[Callable[[int], int]]:
    """What makes a field wrong."""
    if field.endswith(("_bytes", "_rows")):
        return [lambda x: x - 1, lambda x: -x]
    if field.endswith(PARTS) or field in (
        "sequences",
        "tokens",
        "queries",
        "heads",
        "groups",
        "width",
        "count",
        "wide",
    ):
        return [lambda x: x + 1, lambda x: -x, lambda x: x + (1 << 62)]
    return [lambda x: -1, lambda x: x + (1 << 62)] if field in ("call", "calls", "before", "ahead") else []


PARTS = ("_bytes", "_rows", "_heads", "_width", "_size", "_element")
STRUCTS = {
    "attend": softmax.Call,
    "step": softmax.Step,
    "features": features.Call,
    "features_step": features.Step,
}
KERNELS = {"softmax": softmax.KERNEL, "features": features.KERNEL}
TOLD = [
    (field, change)
    for field in sorted({name for s in STRUCTS.values() for name, *_ in s._fields_})
    for change in changes(field)
]


@pytest.mark.parametrize(("field", "change"), TOLD, ids=[f"{field}-{n}" for n, (field, _) in enumerate(TOLD)])
def test_the_kernel_refuses_what_does_not_fit_before_it_touches_it(
    monkeypatch: pytest.MonkeyPatch, field: str, change: Callable[[int], int]
) -> None:
    need_native(HeadShape(4, 2, 32))
    meddlers = [Meddler(kernel, field, change) for kernel in KERNELS.values()]
    for kernel, meddler in zip(KERNELS.values(), meddlers, strict=True):
        monkeypatch.setattr(kernel, "library", lambda meddler=meddler: meddler)

    def met() -> int:
        return sum(meddler.met for meddler in meddlers)

    for name, options in (("bigbird", {"block": 16}), ("linear", {}), ("performer", {"features": 64, "local_chunk": 64})):
        backend = build(name, {"impl": "native", **options}, HeadShape(4, 2, 32))
        q, k, v = tokens(backend.shape, 200)
        for chunks in ([200], [199, 1]):
            before = met()
            try:
                extend_in(backend, q, k, v, chunks)
            except RuntimeError as error:
                assert "what it cannot take" in str(error)
                assert met() > before
            else:
                assert met() == before, (name, chunks)
    assert met()


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for kernel in KERNELS.values():
        monkeypatch.setattr(kernel, "home", tmp_path)


@pytest.mark.usefixtures("without_library")
def test_a_package_that_was_installed_without_a_compiler_says_so_and_answers_by_torch() -> None:
    shape = HeadShape(2, 2, 64)
    with pytest.raises(ValueError, match="was not built, for which installing needs a C compiler"):
        build("dense", {"impl": "native"}, shape)
    backend = build("dense", {}, shape)
    assert backend.impl == "torch"
    q, k, v = tokens(shape, 10)
    assert backend.attend(q, k, v, Segments((10,)), causal=True).isfinite().all()


@pytest.mark.parametrize("name", list(KERNELS))
def test_a_kernel_whose_structs_are_not_those_of_its_caller_is_refused(name: str) -> None:
    need_native(HeadShape(4, 2, 64))
    kernel = KERNELS[name]
    tables, structs = kernel.tables, kernel.structs
    assert len(structs) >= 2

    class Longer(structs[0]):
        _fields_ = (("one_more", ctypes.c_int64),)

    for wrong in (((*tables[:-1], tables[-1] + 1), structs), (tables, structs[:1]), (tables, (Longer, *structs[1:]))):
        with pytest.raises(RuntimeError, match="was built from other sources than these: install the package again"):
            Kernel(kernel.home, kernel.layout, kernel.functions, *wrong).library()
    assert Kernel(kernel.home, kernel.layout, kernel.functions, tables, structs).library() is not None
