"""What becomes of a text's hidden states where no token is drawn: which of them count, what stands behind them, and labels.

An embedding is pooled, goes through the layers that the checkpoint has behind that, and is brought to length one; the last
layer of a classifier has a score for each label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Pooling = Literal["mean", "last", "cls", "max"]
"""Of the last hidden states: their mean, the last token's, the first token's, or the largest number in each place."""

Task = Literal["completion", "embedding", "classification"]
"""What is asked of a model: tokens, a vector, or a score for each label."""

Activation = Literal["identity", "tanh", "relu", "gelu", "gelu_tanh", "sigmoid", "softmax"]


@dataclass(frozen=True)
class Dense:
    """One layer behind the pooled states."""

    rows: int
    columns: int
    activation: Activation = "identity"
    has_bias: bool = True
    norm_eps: float | None = None  # of a LayerNorm without a bias behind the activation; None: there is none


@dataclass(frozen=True)
class Pooled:
    """How a checkpoint makes one vector of a text."""

    pooling: Pooling = "mean"
    layers: tuple[Dense, ...] = ()
    is_normalized: bool = True  # at length one
    labels: tuple[str, ...] = ()  # of a classifier
    activation: Activation = "identity"  # of a classifier's scores
    length: int | None = None  # tokens of the longest text that it was made for, where that is less than the context
    prompts: tuple[tuple[str, str], ...] = ()  # by name: what stands before a text
    default_prompt: str | None = None  # the name of the one that stands there unasked

    def width(self, hidden_size: int) -> int:
        """Numbers of the vector."""
        return self.layers[-1].rows if self.layers else hidden_size


MEAN = Pooled()
"""Of a checkpoint that says nothing: the mean at length one."""
