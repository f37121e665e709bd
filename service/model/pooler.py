"""Hidden states to one vector, as `pooling.Pooled` says. In float32, whatever the model's dtype: it is a few small products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.model.pooling import Dense, Pooled, Pooling

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "softmax": partial(torch.softmax, dim=-1),
}


def gathered(before: Tensor | None, hidden: Tensor, pooling: Pooling) -> Tensor:
    """What is kept of a text behind its next piece of hidden states (T, C): float32 (C,).

    before: what was kept of the pieces before it; None: it is the first.
    """
    if pooling == "last":
        return hidden[-1].float()
    if pooling == "cls":
        return hidden[0].float() if before is None else before
    if pooling == "max":
        part = hidden.amax(0).float()
        return part if before is None else torch.maximum(before, part)
    part = hidden.sum(0, dtype=torch.float32)
    return part if before is None else before + part


def pooled(kept: Tensor, pooling: Pooling, tokens: int) -> Tensor:
    """The pooled hidden states (C,) of what was gathered of so many tokens."""
    return kept / tokens if pooling == "mean" else kept


class DenseLayer(nn.Module):
    """A product, an activation, at times a norm."""

    def __init__(self, plan: Dense) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(plan.rows, plan.columns))
        self.bias = nn.Parameter(torch.empty(plan.rows)) if plan.has_bias else None
        self.norm = nn.Parameter(torch.empty(plan.rows)) if plan.norm_eps is not None else None
        self.plan = plan

    def forward(self, x: Tensor) -> Tensor:
        x = ACTIVATIONS[self.plan.activation](F.linear(x, self.weight, self.bias))
        if self.plan.norm_eps is None:
            return x
        return F.layer_norm(x, (self.plan.rows,), self.norm, None, self.plan.norm_eps)


class Pooler(nn.Module):
    """The layers behind the pooled states, and what ends them."""

    def __init__(self, plan: Pooled) -> None:
        super().__init__()
        self.plan = plan
        self.layers = nn.ModuleList(map(DenseLayer, plan.layers))

    def forward(self, x: Tensor) -> Tensor:
        """Vectors of pooled states (N, C), float32 (N, width), as the last layer leaves them."""
        for layer in self.layers:
            x = layer(x)
        return x

    def ended(self, x: Tensor, is_ended: bool | None) -> Tensor:
        """A vector (width,) at length one, or a classifier's scores activated. None: as the checkpoint has it."""
        if self.plan.labels:
            return x if is_ended is False else ACTIVATIONS[self.plan.activation](x)
        return F.normalize(x, dim=-1) if (self.plan.is_normalized if is_ended is None else is_ended) else x
