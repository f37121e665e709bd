"""The truth check of matrices in fewer bits: a kernel, a step or a scale that is wrong is found, one that is right never is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attention import result, truth
from service.model import fidelity, native
from service.model.checkpoint import load, read_config
from service.model.quantized import BITS, COLUMNS, Quantized
from tests.model import encoders
from tests.model.checkpoints import DECODERS, write
from tests.model.test_quantized import natively

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
WIDE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}  # which the kernels know


def made(directory: Path, family: str) -> Path:
    if family in DECODERS:
        return write(directory, family, **({} if family == "gpt2" else WIDE))
    return encoders.write(directory, family)


def off_by(directory: Path, weights: str, dtype: str = "bfloat16") -> tuple[float, float]:
    """The errors of a loaded model and of one that is drawn by its config."""
    loaded = result(fidelity.checking(load(directory, dtype=dtype, weights=weights).model))
    return loaded.error, result(fidelity.rehearsing(read_config(directory), DTYPES[dtype], "cpu", weights)).error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", BITS)
@pytest.mark.parametrize("family", [*DECODERS, *encoders.SHAPES])
def test_what_is_right_passes_in_every_family(family: str, weights: str, dtype: str, tmp_path: Path) -> None:
    errors = off_by(made(tmp_path, family), weights, dtype)
    assert all(0 < error <= 1 for error in errors), errors


def test_a_matmul_precision_that_the_operator_lowers_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine takes it at its word, as AMX does: here factors are rounded by hand."""
    model = load(write(tmp_path, "qwen3"), dtype="float32", weights="int8").model
    honest, before = Quantized.product, torch.get_float32_matmul_precision()
    monkeypatch.setattr(Quantized, "product", lambda self, x, bias=None: honest(self, x.bfloat16().float(), bias))
    assert not result(fidelity.checking(model)).passed
    torch.set_float32_matmul_precision("medium")
    try:
        assert result(fidelity.checking(model)).passed
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_model_in_its_own_dtype_has_nothing_to_check() -> None:
    assert result(fidelity.checking(load().model)) == truth.Truth(0.0, 1.0, of="the numbers its weights tell")


@natively
@pytest.mark.parametrize("weights", BITS)
@pytest.mark.parametrize("wrong", [1 + 2**-5, float("nan")])
def test_a_kernel_that_is_wrong_in_one_block_of_outputs_is_found(
    weights: str, wrong: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = native.product

    def broken(*given: Any, **named: Any) -> Tensor:
        answer = product(*given, **named)
        answer[:, :COLUMNS] *= wrong
        return answer

    monkeypatch.setattr(native, "product", broken)
    for error in off_by(write(tmp_path, "qwen3", **WIDE), weights):
        assert not truth.Truth(error, 1.0).passed


@natively
@pytest.mark.parametrize("weights", BITS)
@pytest.mark.parametrize("side", ["question", "output"])
def test_a_step_that_is_wrong_beside_right_products_is_found(
    weights: str, side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = getattr(native.PackedLayer, side)

    def broken(self: native.PackedLayer, x: Tensor, other: Any) -> Any:
        answer = honest(self, x, other)
        (answer if side == "output" else answer[2])[-1] *= 1.5  # its last row
        return answer

    monkeypatch.setattr(native.PackedLayer, side, broken)
    assert min(off_by(write(tmp_path, "llama", **WIDE), weights)) > 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", BITS)
@pytest.mark.parametrize("factor", [2.0, 1.25, 0.0])
def test_a_group_kept_with_a_wrong_scale_is_found_before_anything_is_served(
    factor: float, weights: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loaded model cannot tell: its numbers are all that it has of them."""
    honest = Quantized.of

    def broken(weight: Tensor, bits: int) -> Quantized:
        kept = honest(weight, bits)
        kept.data[:, -1, : 2 * COLUMNS].view(torch.bfloat16).mul_(factor)  # of the last group
        return kept

    monkeypatch.setattr(Quantized, "of", staticmethod(broken))
    _, drawn = off_by(write(tmp_path, "qwen3", **WIDE), weights, dtype)
    assert drawn > 1
