"""The option `impl`: what cannot run is refused with the reason, and `auto` reports what is in force."""

from __future__ import annotations

import pytest
import torch

from attention import HeadShape, build


def test_xformers_on_cpu_is_refused_with_the_reason_and_auto_reports_torch() -> None:
    shape = HeadShape(2, 2, 16)
    with pytest.raises(ValueError, match="no operator for device cpu; allowed here: 'auto', 'torch'"):
        build("dense", {"impl": "xformers"}, shape)
    assert build("dense", {"impl": "auto"}, shape).describe()["impl"] == "torch"


def test_sinks_and_xformers_together_are_refused() -> None:
    with pytest.raises(ValueError, match="no sinks"):
        build("sliding_window", {"impl": "xformers", "sinks": 4}, HeadShape(2, 2, 16))


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (HeadShape(2, 2, 16), "a multiple of 32 up to 256, and at most 128 of them; these are 2 of 16"),
        (HeadShape(129, 129, 32), "these are 129 of 32"),
        (HeadShape(2, 2, 64, torch.float64), "takes float32 and bfloat16, the dtype is torch.float64"),
    ],
)
def test_heads_the_kernel_cannot_answer_are_refused_with_the_reason_and_auto_reports_torch(
    shape: HeadShape, reason: str
) -> None:
    with pytest.raises(ValueError, match=f"impl is 'native', but .*{reason}; allowed here: 'auto', 'torch'"):
        build("chunked", {"impl": "native"}, shape)
    assert build("chunked", {}, shape).describe()["impl"] == "torch"


@pytest.mark.parametrize(("features", "count"), [(20, 40), (4096, 8192)])
def test_features_the_kernel_cannot_take_are_refused_with_the_reason(features: int, count: int) -> None:
    with pytest.raises(
        ValueError, match=f"multiple of 32 features up to 4096; these are {count}; allowed here: 'auto', 'torch'"
    ):
        build("performer", {"impl": "native", "features": features, "hyperbolic": True}, HeadShape(2, 2, 64))
