"""A layer's C against its slow reading in torch, and a model without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from attention import Passage, Segments, build
from service.model import native
from service.model.checkpoint import EMBEDDED, load, save
from service.model.projection import can_pack, packed
from service.model.transformer import Attend, rotate
from tests.model.checkpoints import write

CPU = torch.device("cpu")
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-6}  # values up to 4, rounded once against several times
DTYPES = list(BOUNDS)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def need_native(dtype: torch.dtype) -> None:
    if reason := native.KERNEL.obstacle(dtype, CPU):
        pytest.skip(reason)


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 33, 200])
def test_norm_and_gate_are_what_torch_computes(dtype: torch.dtype, rows: int) -> None:
    need_native(dtype)
    x, weight = torch.randn(rows, 272).to(dtype), torch.rand(272).to(dtype)
    wanted = functional.rms_norm(x.double(), (272,), weight.double(), 1e-6)
    assert largest(native.norm(x, weight, 1e-6), wanted) <= BOUNDS[dtype]
    x = torch.randn(rows, 2 * 144).to(dtype)
    x[0, :4] = torch.tensor([-200.0, 200.0, -1e4, 0.0])  # where the exponential leaves its range
    gate, up = x.double().chunk(2, dim=1)
    wanted = functional.silu(gate) * up
    assert float(((native.gate(x).double() - wanted).abs() / wanted.abs().clamp_min(1.0)).max()) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "depth"), [(6, 64), (3, 32), (2, 128), (5, 96)])
@pytest.mark.parametrize("is_normed", [True, False])
def test_heads_are_normed_and_turned_as_by_torch(dtype: torch.dtype, heads: int, depth: int, is_normed: bool) -> None:
    need_native(dtype)
    for rows in (1, 40):
        x = torch.randn(rows, (heads + 2) * depth).to(dtype)
        angles = torch.randn(rows, 1, 2 * depth).to(dtype)
        cos, sin = angles.chunk(2, dim=-1)
        weights = torch.rand(heads, depth).to(dtype) if is_normed else None
        qk = x[:, : heads * depth].unflatten(1, (heads, depth)).double()
        if weights is not None:
            qk = functional.rms_norm(qk, (depth,), None, 1e-6) * weights.double()
        wanted = rotate(qk, cos.double(), sin.double())
        found = native.turn(x, weights, heads, depth, 1e-6, cos, sin)
        assert float(((found.double() - wanted).abs() / wanted.abs().clamp_min(1.0)).max()) <= BOUNDS[dtype]


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 0.5)])  # logits up to 20
def test_the_embedded_model_answers_the_same_with_and_without_it(dtype: str, bound: float) -> None:
    need_native(getattr(torch, dtype))
    model = load(dtype=dtype).model
    ids = torch.randint(model.config.vocab_size, (150,))

    def logits() -> torch.Tensor:
        return model.logits(model.hidden(ids, torch.arange(150), lambda layer, q, k, v: q))

    ours = logits()
    for layer in model.stack:
        assert layer.is_native
        layer.is_native = False
    assert largest(ours, logits()) <= bound


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 13, 40, 100])  # a tile is 6 of them, a panel 96
def test_a_decode_step_is_what_torch_computes_and_a_row_feels_no_other(rows: int) -> None:
    need_native(torch.bfloat16)
    model = load(dtype="bfloat16").model
    ids, positions = torch.randint(model.config.vocab_size, (rows,)), torch.randint(1000, (rows,))

    def hidden(which: slice, is_decode: bool) -> torch.Tensor:
        return model.hidden(ids[which], positions[which], lambda layer, q, k, v: q, is_decode=is_decode)

    together = hidden(slice(None), True)
    assert all(torch.equal(together[i : i + 1], hidden(slice(i, i + 1), True)) for i in {*range(0, rows, 3), rows - 1})
    if all(native.Packed.lying(layer.down.weight) for layer in model.stack):
        assert all(layer.packed for layer in model.stack)
    wanted = hidden(slice(None), False)
    assert largest(together, wanted) <= 2**-5 * float(wanted.abs().max())  # a sum that falls on the other side of a tie


@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
@pytest.mark.parametrize("part_bytes", [1, native.PART_BYTES])  # pauses before every layer, or the first
def test_a_step_through_all_layers_in_c_is_what_they_compute_one_by_one(
    monkeypatch: pytest.MonkeyPatch, weights: str, part_bytes: int
) -> None:
    need_native(torch.bfloat16)
    monkeypatch.setattr(native, "PART_BYTES", part_bytes)
    model = load(dtype="bfloat16", weights=weights).model
    if model._packed is None:
        pytest.skip("oneDNN packs matrices otherwise here")
    layers, past = model.config.num_hidden_layers, (300, 5)
    kinds = {f"0-{layers - 2}": {"sliding_window": {"window": 100}}, str(layers - 1): {"dense": {}}}
    backend = build("layered", {"layers": kinds}, model.head_shape())
    pool = backend.new_pool(layers, 1 << 40)
    both = [[pool.allocate(count + 4) for count in past] for _ in range(2)]
    text, pauses = torch.randint(model.config.vocab_size, (max(past),)), 0

    def attending(slots: list[int], segments: Segments) -> Attend:
        return lambda layer, q, k, v: pool.backends[layer].extend(q, k, v, segments, pool, layer, slots)

    for slot, count in ((slot, count) for slots in both for slot, count in zip(slots, past, strict=True)):
        segments = Segments((count,))
        model.hidden(text[:count], segments.positions(), attending([slot], segments))
    for step in range(3):
        segments = Segments((1, 1), tuple(count + step for count in past))
        ids, positions = torch.randint(model.config.vocab_size, (2,)), torch.tensor(segments.past)
        stages = model.stages(ids, positions, is_decode=True, passage=Passage.of(pool, both[0], segments))
        try:
            while True:
                assert next(stages) is None
                pauses += 1
        except StopIteration as end:
            found = end.value
        assert torch.equal(found, model.hidden(ids, positions, attending(both[1], segments), is_decode=True))
    assert pauses == 3 * (layers if part_bytes == 1 else 1)


@pytest.mark.parametrize("inner", [96, 128])
def test_a_feed_forward_that_is_no_whole_number_of_blocks_is_left_to_torch(inner: int, tmp_path: Path) -> None:
    """Gate and up, twice as wide, lie packed for both widths."""
    need_native(torch.bfloat16)
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": inner}
    model = load(write(tmp_path, "llama", **shape), dtype="bfloat16").model
    if all(native.Packed.lying(layer.qkv.weight) for layer in model.stack):
        assert model.takes_passage == (inner == 128)
    ids = torch.arange(5)
    hidden, prompt = (model.hidden(ids, ids, lambda layer, q, k, v: q, is_decode=each) for each in (True, False))
    assert largest(hidden, prompt) <= 2**-5 * float(prompt.abs().max())


def test_matrices_that_lie_otherwise_are_not_read() -> None:
    need_native(torch.bfloat16)
    weight = torch.randn(128, 64).bfloat16()
    assert native.Packed.lying(weight) is None
    if can_pack(weight) and (found := native.Packed.lying(packed(weight))):
        assert torch.equal(found.dense(), weight)
        assert native.Packed.lying(packed(torch.randn(100, 64).bfloat16())) is None  # oneDNN pads it


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 2000, 2048])
@pytest.mark.parametrize("columns", [2, 66, 256])
def test_a_packed_table_is_looked_up_and_multiplied_as_it_was(rows: int, columns: int) -> None:
    need_native(torch.bfloat16)
    weight, x = torch.randn(rows, columns).bfloat16(), torch.randn(7, columns).bfloat16()
    kept, at = native.Packed.of(weight.clone()), weight.clone()
    for ids in (torch.empty(0, dtype=torch.long), torch.tensor([rows - 1, 0]), torch.randint(rows, (80,))[::2]):
        assert torch.equal(kept.rows(ids), functional.embedding(ids, weight))
    assert torch.equal(kept.dense(), weight)
    wanted, found = x.double() @ weight.double().T, kept.logits(x)
    assert float(((found - wanted).abs() / wanted.abs().clamp_min(1.0)).max()) <= BOUNDS[torch.bfloat16]
    assert torch.equal(kept.logits(x[-1:]), found[-1:])
    if rows % native.COLUMNS == 0:
        assert native.Packed.of(at).words.data_ptr() == at.data_ptr(), "a second copy was made"
    for wrong in (-1, rows, 2**40, -(2**63)):
        with pytest.raises(RuntimeError, match="number of a row"):
            kept.rows(torch.tensor([0, wrong]))
    short = native.Packed(kept.words.flatten()[:-1], kept.shape)
    for call in (lambda: short.rows(torch.tensor([0])), lambda: short.logits(x)):
        with pytest.raises(RuntimeError, match="matrix must hold its numbers"):
            call()


def test_tied_embeddings_lie_once_and_a_loaded_model_is_written_as_it_was(tmp_path: Path) -> None:
    need_native(torch.bfloat16)
    model = load(dtype="bfloat16").model
    assert model.embed.packed is not None and model.embed.weight is None
    plain = load_file(EMBEDDED / "model.safetensors")
    ids = torch.arange(model.config.vocab_size)
    assert torch.equal(model.embed(ids), plain["model.embed_tokens.weight"])
    assert model.num_weights == sum(each.numel() for each in plain.values())
    assert model.weight_bytes == 2 * model.num_weights
    save(model, tmp_path)
    assert all(torch.equal(each, plain[name]) for name, each in load_file(tmp_path / "model.safetensors").items())


def test_other_dtypes_devices_and_widths_are_left_to_torch() -> None:
    assert not native.suits(torch.float64, CPU, 256, 704, 64)
    assert not native.suits(torch.bfloat16, torch.device("cuda"), 256, 704, 64)
    for widths in ((250, 704, 64), (256, 700, 64), (256, 704, 48), (256, 704, 512)):
        assert not native.suits(torch.float32, CPU, *widths)


def test_a_model_is_served_without_it_where_it_was_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native.KERNEL, "home", tmp_path)
    model = load(dtype="float32").model
    assert not any(layer.is_native for layer in model.stack)
    ids = torch.arange(5)
    assert model.logits(model.hidden(ids, ids, lambda layer, q, k, v: q)).isfinite().all()
