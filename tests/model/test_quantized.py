"""Matrices in fewer bits: the kernel against the slow reading, the slow reading against float64, models that are kept so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from service.model import families, native
from service.model.checkpoint import EMBEDDED, load
from service.model.quantized import BITS, GROUP, Quantized, bits_of, bytes_of, eight
from service.model.transformer import Transformer
from tests.engine.world import complete, completion, make_model, prompt, running, tokens_of
from tests.model import encoders
from tests.model.checkpoints import draw, our_logits, write

REASON = native.KERNEL.obstacle(torch.bfloat16, torch.device("cpu"))
natively = pytest.mark.skipif(REASON is not None, reason=str(REASON))
SIZES = (1, 2, 3, 6, 7, 63, 64, 65, 95, 96, 97, 200)
EXTREMES = (0.0, 1e-38, 1e-20, 1.0, 3e4, 1e30)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def matrix(rows: int, columns: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Rows of sizes far apart, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator) * scale
    drawn[torch.rand(rows, generator=generator) < 0.1] = 0.0
    return drawn


def steps(weight: Tensor, bits: int) -> Tensor:
    """The distance of neighbouring numbers around each weight: of its group's largest by what the largest is made."""
    columns = weight.shape[1]
    wide = torch.nn.functional.pad(weight, (0, -columns % GROUP)).unflatten(1, (-1, GROUP)).abs().amax(2, keepdim=True)
    return (wide / (127 if bits == 8 else 8)).expand(-1, -1, GROUP).flatten(1)[:, :columns]


@pytest.mark.parametrize("bits", BITS.values())
@settings(max_examples=40, deadline=None)
@given(rows=st.sampled_from(SIZES), columns=st.sampled_from((1, 48, *SIZES)), scale=st.sampled_from(EXTREMES))
def test_a_weight_is_at_most_as_far_off_as_its_groups_largest_allows(bits: int, rows: int, columns: int, scale: float) -> None:
    weight = matrix(rows, columns, scale)
    kept = Quantized.of(weight, bits)
    found, step = kept.dense(), steps(weight, bits)
    assert found.shape == weight.shape and found.isfinite().all()
    assert kept.nbytes == bytes_of(weight.shape, bits)
    cut = 0.51 if bits == 8 else 2.3  # half a step and the scale's rounding; in 4 bits the largest may be cut, or be 7 of 8
    assert ((found - weight).abs() <= cut * step + 1e-38).all()
    assert (found[(weight == 0).all(1)] == 0).all()
    ids = torch.randint(rows, (9,))
    assert torch.equal(kept.rows(ids), found[ids])


def test_eight_bits_reach_both_ends_and_keep_what_they_can_tell_as_it_is() -> None:
    whole = torch.randint(-127, 128, (70, 2 * GROUP)).float()
    whole[:, 0], whole[:, 1], whole[:, GROUP] = 127, -127, -127
    for scale in (2.0**-20, 1.0, 2.0**9):
        assert torch.equal(Quantized.of(whole * scale, 8).dense(), whole * scale)
    fours = torch.randint(-8, 8, (70, 2 * GROUP)).float()
    fours[:, 0], fours[:, GROUP] = -8, -8
    assert torch.equal(Quantized.of(fours * 0.25, 4).dense(), fours * 0.25)


@natively
@pytest.mark.parametrize("bits", BITS.values())
@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from(SIZES),
    outputs=st.sampled_from((1, 16, 64, 65, 100, 192)),
    inputs=st.sampled_from((64, 128, 320)),
    scale=st.sampled_from((1e-20, 1.0, 1e15)),
    gap=st.sampled_from((0, 1, 5, 64)),
    is_biased=st.booleans(),
)
def test_the_kernel_answers_as_float64_does_with_the_weights_that_are_told(
    bits: int, rows: int, outputs: int, inputs: int, scale: float, gap: int, is_biased: bool
) -> None:
    kept = Quantized.of(matrix(outputs, inputs, scale), bits)
    x = torch.randn(rows, inputs + gap).bfloat16()[:, gap:]
    bias = (torch.randn(outputs) * scale).bfloat16() if is_biased else None
    for factor, found in ((eight(x), kept.product(x, bias)), (x, kept.product(x.float(), bias).bfloat16())):
        wanted = factor.double() @ kept.dense().double().T + (0 if bias is None else bias.double())
        reach = factor.double().abs() @ kept.dense().double().abs().T  # what float32 rounds is as large as this
        assert found.dtype == torch.bfloat16
        assert ((found.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-5 * reach).all()
    assert torch.equal(kept.logits(x), kept.product(x).float())
    assert torch.equal(kept.product(x[-1:], bias), kept.product(x, bias)[-1:]), "a row feels the others"


@natively
@pytest.mark.parametrize("bits", BITS.values())
@pytest.mark.parametrize("strange", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_makes_its_row_so_and_no_other(bits: int, strange: float) -> None:
    kept, x = Quantized.of(matrix(100, 128), bits), torch.randn(9, 128).bfloat16()
    x[4, 77], x[5], x[6] = strange, 0.0, 1e-32
    for found in (native.product(x, kept, 100), eight(x) @ kept.dense().T):
        assert not found[4].isfinite().any()
        assert (found[5:7] == 0).all()
        assert found[torch.arange(9) != 4].isfinite().all()


@natively
@pytest.mark.parametrize("bits", BITS.values())
def test_a_matrix_shorter_than_it_says_is_refused(bits: int) -> None:
    kept = Quantized.of(matrix(128, 128), bits)
    cut = Quantized(kept.data.flatten()[:-1], kept.shape, bits)
    for x, short in ((torch.ones(3, 128), cut), (torch.ones(3, 192), kept)):
        with pytest.raises(RuntimeError, match="matrix must hold its numbers"):
            short.product(x.bfloat16())


# ---- models -----------------------------------------------------------------------------------------------------------------


def kept_in(weights: str, model: Transformer) -> Transformer:
    """The model, its matrices in fewer bits, packed."""
    for name, parameter in list(model.named_parameters()):
        if (bits := bits_of(weights, name)) is not None:
            model.get_submodule(name.rpartition(".")[0]).quantize(bits)  # type: ignore[operator]
            del parameter
    model.pack()
    return model


def as_told(model: Transformer) -> Transformer:
    """A float32 model of the weights that a quantized one tells."""
    plain = Transformer(model.config).requires_grad_(False)
    owners = dict(model.named_modules())
    for name, parameter in plain.named_parameters():
        owner, _, leaf = name.rpartition(".")
        kept = getattr(owners[owner], "quantized", None) if leaf == "weight" else None
        parameter.copy_(kept.dense() if kept is not None else getattr(owners[owner], leaf))
    return plain


@pytest.mark.parametrize("weights", BITS)
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "gpt2", "gemma3_text", "phi3"])
def test_a_model_of_each_kind_answers_as_one_of_the_weights_that_are_told(family: str, weights: str, tmp_path: Path) -> None:
    ids = draw(70)
    model = load(write(tmp_path, family), dtype="float32", weights=weights).model
    assert len(model.quantized) >= 9
    assert float((our_logits(model, ids) - our_logits(as_told(model), ids)).abs().max()) <= 2e-3


@pytest.mark.parametrize("weights", BITS)
@pytest.mark.parametrize("family", encoders.SHAPES)
def test_an_encoder_has_the_hidden_states_of_the_weights_that_are_told(family: str, weights: str, tmp_path: Path) -> None:
    texts = [encoders.draw(length, length) for length in (1, 7, 40)]
    directory = encoders.write(tmp_path, family)
    model = load(directory, dtype="float32", weights=weights).model
    assert len(model.quantized) == 1 + 4 * len(model.stack)
    found, plain = encoders.our_hidden(model, texts), encoders.our_hidden(load(directory, dtype="float32").model, texts)
    for ours, told, other in zip(found, encoders.our_hidden(as_told(model), texts), plain, strict=True):
        assert float((ours - told).abs().max()) <= 2e-3
        assert float((ours - other).abs().max()) > 4e-3, "nothing was rounded"


@natively
@pytest.mark.parametrize("weights", BITS)
def test_the_embedded_model_answers_as_one_of_the_weights_that_are_told(weights: str) -> None:
    model, ids = load(dtype="bfloat16", weights=weights).model, draw(150)
    assert all(layer.packed is not None and layer.packed.takes_prompts for layer in model.stack)
    wanted = our_logits(as_told(model), ids)
    bare = our_logits(load(dtype="bfloat16").model, ids) - our_logits(load(dtype="float32").model, ids)
    assert float((our_logits(model, ids) - wanted).abs().mean()) <= 3 * float(bare.abs().mean())  # bfloat16's, and eight bits'


@natively
@pytest.mark.parametrize("weights", BITS)
def test_a_row_is_the_same_in_a_prompt_in_chunks_and_in_a_step(weights: str) -> None:
    model, ids = load(dtype="bfloat16", weights=weights).model, draw(200)
    assert model.height(13) == 13

    def hidden(which: slice, is_decode: bool = False) -> Tensor:
        return model.hidden(ids[which], torch.arange(200)[which], lambda layer, q, k, v: q, is_decode=is_decode)

    whole = hidden(slice(None))
    for some in (slice(0, 1), slice(3, 9), slice(90, 101), slice(199, 200)):
        assert torch.equal(hidden(some), whole[some]) and torch.equal(hidden(some, True), whole[some])
        assert torch.equal(model.logits(whole[some]), model.logits(whole)[some])


@pytest.mark.parametrize("weights", BITS)
@pytest.mark.parametrize("scale", [1, 2])  # widths the kernel does not know, and those it does
async def test_an_answer_is_the_same_alone_and_in_company(weights: str, scale: int) -> None:
    model = kept_in(weights, make_model(torch.bfloat16, scale=4 * scale - 3))
    requests = [completion(prompt(3 + 29 * i), max_tokens=9) for i in range(7)]
    async with running(model, chunk_tokens=64) as engine:
        alone = [await tokens_of(engine, completion(request.tokens, max_tokens=9)) for request in requests]
        assert await asyncio.gather(*(tokens_of(engine, request) for request in requests)) == alone
        await complete(engine, completion(prompt(5), max_tokens=2, logprobs=1, echo=True))


def test_the_matrices_as_they_were_are_let_go(tmp_path: Path) -> None:
    config = json.loads((EMBEDDED / "config.json").read_text())
    with torch.device("meta"):
        outline = Transformer(families.read(config)).to(torch.bfloat16)
    model = load(dtype="bfloat16", weights="int8").model
    left = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    assert left == [] and model.num_weights == outline.num_weights
    told = sum(bytes_of(p.shape, b) if (b := bits_of("int8", n)) else p.nbytes for n, p in outline.named_parameters())
    assert model.weight_bytes == told < 0.53 * outline.weight_bytes


@pytest.mark.parametrize("weights", BITS)
def test_files_in_shards_load_alike(weights: str, tmp_path: Path) -> None:
    whole = load(write(tmp_path, "qwen3"), weights=weights).model
    tensors = load_file(tmp_path / "model.safetensors")
    parts = {"a.safetensors": dict(list(tensors.items())[::2]), "b.safetensors": dict(list(tensors.items())[1::2])}
    for name, part in parts.items():
        save_file(part, tmp_path / name)
    index = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "model.safetensors").unlink()
    again = load(tmp_path, weights=weights).model
    assert all(torch.equal(a.data, b.data) for a, b in zip(whole.quantized, again.quantized, strict=True))


def test_weights_that_there_are_none_of_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="weights must be one of auto, bf16, int8, int4, received 'int2'"):
        load(weights="int2")
    with pytest.raises(ValueError, match="weights: bf16 needs dtype: bfloat16"):
        load(dtype="float32", weights="bf16")
