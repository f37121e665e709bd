"""A layer of BERT's kind in C for CPUs with AVX-512: LayerNorm behind each sum, biases, no gate.

Its products read the matrices as they lie in oneDNN's order, or in fewer bits. Bias, activation, sum and norm are computed
where a product's numbers stand; threads take pieces of it as they come free; and nothing is compiled for a number of rows, so
that texts of all lengths need no padding. `csrc/encoder.c` computes; `Layer` in `transformer.py` is the slow reading.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from attention.kernels.library import (
    HERE,
    INT,
    MOST_HEADS,
    NUMBER,
    POINTER,
    VIEW,
    WIDEST,
    Kernel,
    compute_by_team,
    floats,
    numbers,
    pack_view,
    packing,
    room,
    rooms,
    threads,
    view,
)
from service.model.config import ModelConfig
from service.model.native import COLUMNS, Matrix, product

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")  # in the order of encoder.c
WEIGHTS = ("out", "up", "down")
ROWS = ("out_bias", "up_bias", "down_bias", "attention_norm", "attention_norm_bias", "mlp_norm", "mlp_norm_bias")


class _EncoderLayer(ctypes.Structure):
    """`EncoderLayer` of encoder.c."""

    _fields_ = [
        *rooms(*WEIGHTS, *ROWS),
        *numbers("width", "inner", "heads", "depth", "activation", "bits"),
        *floats("epsilon"),
    ]


KERNEL = Kernel(
    HERE,
    "encoder_layout",
    {"encoder_output": (POINTER, POINTER, POINTER, POINTER, NUMBER, POINTER, NUMBER, INT)},
    (len(VIEW),),
    (_EncoderLayer,),
)


def suits(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a model's layers can be computed here, by its config."""
    is_of_kind = config.is_post_normed and not (config.is_gated or config.is_sandwiched or config.qk_norm)
    is_normed = config.norm == "layer" and config.has_norm_bias and config.has_first_norm
    has_biases = config.attention_bias and config.output_bias and config.mlp_bias
    is_known = config.activation in ACTIVATIONS and config.query_scale == 1
    widths = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    is_whole = all(width % COLUMNS == 0 for width in widths) and config.head_dim <= WIDEST
    is_whole = is_whole and config.head_dim % 2 == 0 and config.num_attention_heads <= MOST_HEADS
    is_there = dtype == torch.bfloat16 and KERNEL.obstacle(dtype, device) is None
    return is_of_kind and is_normed and has_biases and is_known and is_whole and is_there


class EncoderLayer:
    """A layer on either side of its attention, as `Layer` computes it. A row's numbers are the same whatever the others.

    Args:
        matrices: of queries, keys and values, of the answer, and of the feed-forward's two products, all of as many bits.
        biases: theirs.
        norms: weight and bias of attention's, weight and bias of the feed-forward's, (C) each.
    """

    takes_prompts = True

    def __init__(
        self, config: ModelConfig, matrices: Sequence[Matrix], biases: Sequence[Tensor], norms: Sequence[Tensor]
    ) -> None:
        self.heads, self.groups, self.depth = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.width, self.inner = config.hidden_size, config.intermediate_size
        self._weights = matrices, biases, norms  # which the C reads where they lie
        for each in (*biases, *norms):
            if each.dtype != torch.bfloat16:
                raise RuntimeError(f"biases and norms must be bfloat16, received {each.dtype}")
        (bits,) = {matrix.bits for matrix in matrices}
        places = [part for each in matrices[1:] for part in each.room]
        places += [part for each in (*biases[1:], *norms) for part in room(each)]
        numbers = self.width, self.inner, self.heads, self.depth, ACTIVATIONS.index(config.activation), bits
        compute_by_team()
        self._layer = packing(_EncoderLayer)(*places, *numbers, config.norm_eps)

    def question(self, x: Tensor, turns: object) -> tuple[Tensor, Tensor, Tensor]:
        """`Layer.question`: q (T, H, D), k and v (T, G, D) of x (T, C)."""
        assert turns is None, "a layer that turns its heads is not of this kind"
        count, (matrices, biases, _) = self.heads + 2 * self.groups, self._weights
        heads = product(x, matrices[0], count * self.depth, biases[0]).unflatten(1, (count, self.depth))
        q, k, v = heads.split((self.heads, self.groups, self.groups), dim=1)
        return q, k, v

    def output(self, x: Tensor, answer: Tensor) -> Tensor:
        """`Layer.output`: what the layer hands on, (T, C), from its input x and attention's answer (T, H, D)."""
        out = x.new_empty(len(x), self.width)
        scratch = x.new_empty(len(x) * (self.width + max(self.width, self.heads * self.depth) + self.inner))
        places = pack_view(*view(x.unsqueeze(1))), pack_view(*view(answer)), *room(out), *room(scratch)
        KERNEL.call("encoder_output", self._layer, *places, threads())
        return out
