"""Matrices of a model and who multiplies with them: as they are, in the order in which oneDNN multiplies, or in fewer bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.model import native
from service.model.quantized import Quantized

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}

FUSED = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}
"""What oneDNN applies to a product before it is rounded and written: at 512 x 1536 half the time of product and activation."""


class Projection(nn.Linear):
    """A linear layer whose matrix may lie in the order in which oneDNN multiplies it, or in fewer bits."""

    quantized: Quantized | None = None  # then there is no `weight`

    def quantize(self, bits: int) -> None:
        """Keep the matrix in 8 or 4 bits; the one it was is let go."""
        self.quantized = Quantized.of(self.weight, bits)
        self.register_parameter("weight", None)

    def matrix(self) -> native.Packed | Quantized | None:
        """The matrix as the kernel of a decode step reads it; None where it lies otherwise."""
        if self.quantized is not None:
            return self.quantized if self.quantized.is_native else None
        return native.Packed.lying(self.weight)

    def pack(self) -> None:
        """Lay the matrix out for serving on CPU: no call has to look for an order or make one, the products stay the same.

        For one token a call takes 14 microseconds instead of 21, for 512 it is a few percent faster. The operators are
        those that torch.compile's frozen graphs use; they are not in the public reference, so where they are missing the
        matrix stays as it is. Other dtypes are multiplied by MKL.
        """
        if self.quantized is None and can_pack(self.weight):
            self.weight = nn.Parameter(packed(self.weight), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias) if self.quantized is None else self.quantized.product(x, self.bias)

    def activated(self, x: Tensor, activation: str) -> Tensor:
        """The product through an activation, by its name in `ACTIVATIONS`."""
        if self.quantized is None and self.weight.is_mkldnn and activation in FUSED:
            name, algorithm = FUSED[activation]
            return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], algorithm))
        return ACTIVATIONS[activation](self(x))

    __call__ = forward  # without nn.Module's look for hooks, which takes a tenth of a small product


class Table(nn.Embedding):
    """Embeddings that may lie packed or in fewer bits; a head that is tied to them multiplies with the same."""

    packed: native.Packed | None = None  # then there is no `weight`
    quantized: Quantized | None = None  # nor then

    def quantize(self, bits: int) -> None:
        """As of a `Projection`."""
        self.quantized, self._dtype = Quantized.of(self.weight, bits), self.weight.dtype
        self.register_parameter("weight", None)

    def pack(self) -> None:
        """Lay the matrix out for a head that is tied to it, where the kernel multiplies with it. There is no second one."""
        if self.quantized is None and native.Packed.suits(self.weight):
            self.packed = native.Packed.of(self.weight)
            self.register_parameter("weight", None)

    def forward(self, ids: Tensor) -> Tensor:
        if self.packed is not None:
            return self.packed.rows(ids)
        return super().forward(ids) if self.quantized is None else self.quantized.rows(ids).to(self._dtype)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN multiplies this matrix, bfloat16 on CPU, and this build of torch has the two operators."""
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))


def packed(weight: Tensor) -> Tensor:
    """A bfloat16 matrix in oneDNN's own order: an opaque tensor, of which `to_dense` is the inverse."""
    return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None))


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight' + bias for a weight that is packed or not."""
    if weight.is_mkldnn:
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))
    return F.linear(x, weight, bias)
