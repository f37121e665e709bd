"""A CPU without AVX-512: the C as built for one loads and says so. The laws of all backends in torch run on such a machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from attention import HeadShape, build, names
from attention.kernels.features import native as features
from attention.kernels.library import Kernel
from attention.kernels.softmax import native as softmax
from service.model import native as layer

KERNELS = (softmax.KERNEL, features.KERNEL, layer.KERNEL)
pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is missing")


@pytest.fixture(autouse=True)
def machine(without_avx512: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "home", without_avx512)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.layout)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_library_loads_and_says_that_it_computes_nothing(kernel: Kernel, dtype: torch.dtype) -> None:
    found = kernel.library()
    assert found is not None and found.supported() == 0
    assert f"lacks the instructions of the native kernel for {dtype}" in str(kernel.obstacle(dtype, torch.device("cpu")))
    for function, types in kernel.functions.items():
        with pytest.raises(RuntimeError, match="this machine has no AVX-512"):
            kernel.call(function, *(kind() for kind in types))


@pytest.mark.parametrize("name", names())
def test_native_is_refused_with_the_reason_and_auto_reports_torch(name: str) -> None:
    with pytest.raises(ValueError, match=r"lacks the instructions .* allowed here: 'auto', 'torch'"):
        build(name, {"impl": "native"}, HeadShape(4, 2, 64))
    assert build(name, {}, HeadShape(4, 2, 64)).describe()["impl"] == "torch"


def test_a_model_is_served_by_torch() -> None:
    assert not layer.suits(torch.float32, torch.device("cpu"), 256, 704, 64)
