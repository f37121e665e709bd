"""The truth check of matrices in fewer bits: their products against the numbers they tell, a layer's step against the layer.

In less than the file has an answer is another, and is meant to be: what is served is the model of the weights that
`Quantized.rows` tells, activations rounded as `quantized.eight` tells. Held to it, on seeded activations: a product, in
float64, as far as float32 sums and its dtype rounds; what a packed layer (`native.PackedLayer`) computes in one pass, against
`Layer` in torch; and, where weights are drawn for it (`rehearsing`), the numbers against those they were made of. Cost: a
prompt of `ROWS` tokens through two layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from attention import truth
from service.model.config import ModelConfig
from service.model.projection import Projection, Table
from service.model.quantized import GROUP, Quantized, bits_of, eight
from service.model.transformer import Layer, Transformer, Turns

ROWS = 70  # of a product: more than the kernel takes at a time, and no multiple of that
SOME = (1, 5, ROWS)  # the kernel goes other ways by how many there are
SAMPLE = 96  # outputs compared, evenly spread over the matrix
VOCABULARY = 1000  # of a model that is drawn
SUMMED = {"highest": 1e-5, "high": 2**-10, "medium": 2**-8}
"""Of the sum of magnitudes, what adding up in float32 may be off by, by what torch's matmul precision lets factors lose."""
STEP = 6e-2  # of a layer's largest number, what bfloat16 may round in one: as of `attention.truth`, whose numbers are as large
FARTHEST = {8: 0.51, 4: 2.3}  # steps that a weight may be off: half, and the scale's rounding; 4 bits may cut a group's largest
SPREAD = 0.45  # the same as root mean square: evenly spread over a step it is 0.29


@torch.inference_mode()
def checking(model: Transformer) -> truth.Checking:
    """Check the matrices that all have, and those of the first layer and the last, in parts. Changes nothing.

    The verdict's error is in parts of what rounding allows; 0 for a model that has no matrix in fewer bits.
    """
    if not model.quantized:
        return _verdict([0.0])
    errors = [0.0]
    stack = [model.stack[at] for at in sorted({0, len(model.stack) - 1})]
    common = [each.quantized for each in model.children() if isinstance(each, Projection | Table)]
    for kept in (*common, *(each for layer in stack for each in layer.kept)):
        if kept is not None:
            errors.append(_product_error(kept, model.dtype))
            yield
    turns = model.turns_by_layer(torch.arange(ROWS, device=model.device) % model.config.max_length)
    for layer in stack:
        errors += _step_errors(layer, turns[model.stack.index(layer)])
        yield
    return _verdict(errors)


@torch.inference_mode()
def rehearsing(config: ModelConfig, dtype: torch.dtype, device: str, weights: str) -> truth.Checking:
    """`checking` for a model of drawn weights, one layer of the widths that a config says, and what is kept of its weights."""
    model, originals = _drawn(config, dtype, device), dict[str, Tensor]()
    for name, parameter in list(model.named_parameters()):
        if bits_of(weights, name) is not None:
            originals[name] = parameter.detach()
    errors = [0.0]
    for name, original in originals.items():
        module = model.get_submodule(name.rpartition(".")[0])
        assert isinstance(module, Projection | Table), f"{name} is no matrix that may be quantized"
        module.quantize(bits_of(weights, name) or 0)
        assert module.quantized is not None, "it was just made"
        errors += _kept_errors(module.quantized, original)
        yield
    model.pack()
    verdict = yield from checking(model)
    return _verdict([*errors, verdict.error])


def _verdict(errors: list[float]) -> truth.Truth:
    worst = max(errors, key=lambda error: (math.isnan(error), error))
    return truth.Truth(worst, 1.0, of="the numbers its weights tell")


def _product_error(kept: Quantized, dtype: torch.dtype) -> float:
    """Of products of few and of many rows, the largest error in parts of what is allowed."""
    outputs, inputs = kept.shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, inputs, generator=generator).to(kept.data.device, dtype)
    ids = torch.linspace(0, outputs - 1, min(SAMPLE, outputs)).long().to(x.device)
    is_native = kept.is_native and dtype == torch.bfloat16
    summed = SUMMED["highest" if is_native else torch.get_float32_matmul_precision()]
    told = kept.rows(ids).double()
    met = (eight(x) if dtype == torch.bfloat16 else x).double()
    wanted, reach = met @ told.T, met.abs() @ told.abs().T
    allowed = torch.finfo(dtype).eps / 2 * wanted.abs() + summed * reach + torch.finfo(torch.float32).tiny
    found = [kept.product(x[:rows])[:, ids] for rows in (SOME if is_native else (ROWS,))] + [kept.logits(x[:1])[:, ids]]
    return max(float(((each.double() - wanted[: len(each)]).abs() / allowed[: len(each)]).amax()) for each in found)


def _step_errors(layer: Layer, turns: Turns | None) -> Iterator[float]:
    """Of what a packed layer asks and hands on, each error in parts of what is allowed."""
    if layer.packed is None:
        return
    config, reading = layer.config, copy(layer)
    reading.is_native = False
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, config.hidden_size, generator=generator).bfloat16()
    answer = torch.randn(ROWS, config.num_attention_heads, config.head_dim, generator=generator).bfloat16()
    pairs = [*zip(layer.packed.question(x, turns), reading.question(x, turns), strict=True)]
    for found, wanted in (*pairs, (layer.packed.output(x, answer), reading.output(x, answer))):
        largest = float(wanted.abs().amax())
        yield float((found.float() - wanted.float()).abs().amax()) / (STEP * largest)


def _kept_errors(kept: Quantized, original: Tensor) -> Iterator[float]:
    """How far numbers are off the matrix (N, K) they were made of, at most and on the whole, in parts of what is allowed."""
    inputs = original.shape[1]
    groups = torch.nn.functional.pad(original.float(), (0, -inputs % GROUP)).unflatten(1, (-1, GROUP))
    steps = (groups.abs().amax(2, keepdim=True) / (127 if kept.bits == 8 else 8)).expand_as(groups).flatten(1)[:, :inputs]
    apart = (kept.dense() - original.float()) / steps
    yield float(apart.abs().amax()) / FARTHEST[kept.bits]
    yield float(apart.square().mean().sqrt()) / SPREAD


def _drawn(config: ModelConfig, dtype: torch.dtype, device: str) -> Transformer:
    """One layer of a config's widths, its products as large as what goes in."""
    one = replace(
        config,
        num_hidden_layers=1,
        ropes=config.ropes[:1],
        windows=config.windows[:1],
        vocab_size=min(config.vocab_size, VOCABULARY),
        served_length=min(config.max_length, ROWS),
    )
    with torch.device("meta"):
        model = Transformer(one)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        deviation = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.1
        parameter.normal_(0.0 if parameter.dim() == 2 else 1.0, deviation, generator=generator)
    return model
