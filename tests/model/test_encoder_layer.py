"""An encoder's layer in C against its slow reading in torch, and a model with it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import attention
from attention.kernels import library
from service.engine.request import Request
from service.model import encoder_layer
from service.model.checkpoint import load
from service.model.native import Packed
from service.model.projection import can_pack
from service.model.transformer import Layer
from tests.engine import world
from tests.model.encoders import backends_of, draw, our_hidden, write

CPU = torch.device("cpu")
WIDTHS = {"hidden_size": 128, "intermediate_size": 192}
pytestmark = pytest.mark.skipif(
    not can_pack(torch.zeros(1, dtype=torch.bfloat16)) or encoder_layer.KERNEL.obstacle(torch.bfloat16, CPU) is not None,
    reason="no AVX512-bf16, or no oneDNN whose order is known",
)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def exact(x: torch.Tensor, answer: torch.Tensor, layer: Layer, activation: str) -> torch.Tensor:
    """What the layer hands on, in double precision."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        weights = (layer._parameters[each].double() for each in (name, f"{name}_bias"))
        return functional.layer_norm(x, (x.shape[1],), *weights, layer.config.norm_eps)

    def product(x: torch.Tensor, by: torch.nn.Linear) -> torch.Tensor:
        return functional.linear(x, by.weight.to_dense().double(), by.bias.double())

    acts = {
        "gelu": functional.gelu,
        "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
        "relu": functional.relu,
    }
    x = norm(x.double() + product(answer.flatten(1).double(), layer.out), "attention_norm")
    return norm(x + product(acts[activation](product(x, layer.gate_up)), layer.down), "mlp_norm")


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("rows", [1, 6, 7, 95, 96, 97, 300])
def test_a_layer_is_what_torch_computes_and_a_row_feels_no_other(tmp_path: Path, activation: str, rows: int) -> None:
    layer = load(write(tmp_path, "bert", hidden_act=activation, **WIDTHS), dtype="bfloat16").model.stack[0]
    packed = layer.sides(is_decode=False)
    assert isinstance(packed, encoder_layer.EncoderLayer), "the layer is left to torch"
    x, answer = torch.randn(rows, 128).bfloat16(), torch.randn(rows, 4, 32).bfloat16()
    wanted, found, slow = exact(x, answer, layer, activation), packed.output(x, answer), layer.output(x, answer)
    assert (found.double() - wanted).abs().mean() <= 1.1 * (slow.double() - wanted).abs().mean()
    assert (found.double() - wanted).abs().max() <= 2**-5 * wanted.abs().max()
    assert torch.equal(packed.output(x[-1:], answer[-1:]), found[-1:])
    for ours, theirs in zip(packed.question(x, None), layer.question(x, None), strict=True):
        assert (ours.double() - theirs.double()).abs().max() <= 2**-6 * theirs.abs().max()
    assert torch.equal(packed.question(x[-1:], None)[0], packed.question(x, None)[0][-1:])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize(("low", "high"), [(-3.5, -2.0), (-1.0, 1.0), (-30.0, 30.0), (-1e4, 3.0)])
def test_an_activation_is_right_where_it_is_small_and_where_it_is_large(
    tmp_path: Path, activation: str, low: float, high: float
) -> None:
    """Of biases alone: all matrices are zero but the last, and the LayerNorm behind it shows small numbers large."""
    config = load(write(tmp_path, "bert", hidden_size=64, intermediate_size=64), dtype="bfloat16").model.config
    config = replace(config, activation=activation)
    biases, zeros, ones = torch.linspace(low, high, 64).bfloat16(), torch.zeros(64).bfloat16(), torch.ones(64).bfloat16()
    nothing = Packed.of(torch.zeros(64, 64).bfloat16())
    matrices = [Packed.of(torch.zeros(192, 64).bfloat16()), nothing, nothing, Packed.of(torch.eye(64).bfloat16())]
    layer = encoder_layer.EncoderLayer(config, matrices, [zeros.repeat(3), zeros, biases, zeros], [zeros, zeros, ones, zeros])
    found = layer.output(torch.randn(1, 64).bfloat16(), torch.randn(1, 4, 16).bfloat16())[0].double()
    acted = functional.gelu(biases.double(), approximate="none" if activation == "gelu" else "tanh")
    wanted = functional.layer_norm(acted, (64,), eps=config.norm_eps)
    spread = (acted.var(correction=0) + config.norm_eps).sqrt()
    assert (found - wanted).abs().max() <= 2**-7 * acted.abs().max() / spread + 2**-8 * wanted.abs().max()


@pytest.mark.parametrize(("weights", "bound"), [("auto", 0.999), ("int8", 0.999), ("int4", 0.9)])
async def test_texts_of_an_encoder_in_company_are_those_of_float32(tmp_path: Path, weights: str, bound: float) -> None:
    """A cosine as near to one as the bits allow; each text the same to the last bit alone, and nothing is padded."""
    directory = write(tmp_path, "longformer", **WIDTHS)
    loaded, texts = load(directory, dtype="bfloat16", weights=weights), [draw(length, length) for length in (1, 50, 97, 160)]
    assert all(isinstance(layer.packed, encoder_layer.EncoderLayer) for layer in loaded.model.stack)
    assert loaded.model.impl == "native" and [loaded.model.height(n) for n in (1, 13, 555)] == [1, 13, 555]
    company = our_hidden(loaded.model, texts)
    wanted = our_hidden(load(directory, dtype="float32").model, texts)
    for ours, theirs, text in zip(company, wanted, texts, strict=True):
        assert torch.equal(ours, our_hidden(loaded.model, [text])[0])
        assert functional.cosine_similarity(ours.float().mean(0), theirs.mean(0), dim=0) >= bound
    async with world.running(loaded.model, backends_of(loaded.model), tokenizer=loaded.tokenizer) as engine:
        requests = [Request(f"r{i}", "embedding", each.tolist(), is_ended=False) for i, each in enumerate(texts)]
        vectors = await asyncio.gather(*(world.embed(engine, request) for request in requests))
    for vector, hidden in zip(vectors, company, strict=True):
        torch.testing.assert_close(torch.tensor(vector), hidden.float().mean(0), rtol=1e-5, atol=1e-6)


def test_attention_is_the_same_by_either_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 700, 4, 32).bfloat16()
    backend, segments = attention.build("dense", {}, attention.HeadShape(4, 4, 32, torch.bfloat16)), attention.Segments((700,))
    answers = []
    for by_team in (False, True):
        monkeypatch.setattr(library, "_by_team", by_team)
        answers.append([backend.attend(q, k, v, segments, causal=causal) for causal in (False, True)])
    assert all(torch.equal(one, other) for one, other in zip(*answers, strict=True))


def test_what_it_is_given_is_checked_before_it_is_touched(tmp_path: Path) -> None:
    layer = load(write(tmp_path, "bert", **WIDTHS), dtype="bfloat16").model.stack[0]
    packed = layer.sides(is_decode=False)
    assert isinstance(packed, encoder_layer.EncoderLayer)
    matrices, biases, norms = packed._weights
    x, answer = torch.randn(9, 128).bfloat16(), torch.randn(9, 4, 32).bfloat16()
    short = Packed(matrices[2].words.flatten()[:-1], matrices[2].shape)
    wrong = {
        "a matrix must hold": ([*matrices[:2], short, matrices[3]], biases, norms),
        "a bias must hold": (matrices, [*biases[:2], biases[2][:-1], biases[3]], norms),
        "a bias and a norm must hold": (matrices, biases, [norms[0][:-1], *norms[1:]]),
    }
    for told, given in wrong.items():
        with pytest.raises(RuntimeError, match=told):
            encoder_layer.EncoderLayer(layer.config, *given).output(x, answer)
    for told, given in {"x must be rows": (x[:, :64], answer), "answer must be": (x, answer[:8])}.items():
        with pytest.raises(RuntimeError, match=told):
            packed.output(*given)
    with pytest.raises(RuntimeError, match="must be bfloat16"):
        encoder_layer.EncoderLayer(layer.config, matrices, [each.float() for each in biases], norms)


def test_other_kinds_dtypes_and_widths_are_left_to_torch(tmp_path: Path) -> None:
    model = load(write(tmp_path, "bert", **WIDTHS), dtype="bfloat16").model
    config = model.config
    assert encoder_layer.suits(config, torch.bfloat16, CPU)
    assert not encoder_layer.suits(config, torch.float32, CPU)
    assert not encoder_layer.suits(config, torch.bfloat16, torch.device("cuda"))
    for other in ({"hidden_size": 96}, {"intermediate_size": 80}, {"activation": "silu"}, {"is_post_normed": False}):
        assert not encoder_layer.suits(replace(config, **other), torch.bfloat16, CPU)  # type: ignore[arg-type]
