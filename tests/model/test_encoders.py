"""Every encoder family answers as transformers does: hidden states, embeddings and scores, bare and through the engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from attention.backends.bigbird import BigBird
from attention.layered import PerLayer
from attention.memory import peak_bytes
from service.engine.request import Request, TaskNotOffered
from service.model.checkpoint import load
from service.model.projection import ACTIVATIONS, can_pack
from tests.engine import world
from tests.model.checkpoints import change
from tests.model.encoders import LENGTH, SHAPES, backends_of, draw, our_hidden, their_hidden, their_vector, theirs, write

KINDS = ("AutoModel", "AutoModelForMaskedLM")
LENGTHS = (1, 7, LENGTH, 61)  # the longest is as long as the context


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("encoder"), request.param)


def texts() -> list[torch.Tensor]:
    return [draw(length, seed) for seed, length in enumerate(LENGTHS)]


def test_packed_texts_have_the_hidden_states_that_transformers_gives_them_padded(checkpoint: Path) -> None:
    model = load(checkpoint, dtype="float32").model
    for ours, expected in zip(our_hidden(model, texts()), their_hidden(theirs(checkpoint), texts()), strict=True):
        assert expected.std() > 0.1, "states that are all alike would show nothing"
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


async def test_the_engine_embeds_as_transformers_whoever_is_in_company(checkpoint: Path) -> None:
    loaded = load(checkpoint, dtype="float32")
    expected = [their_vector(each) for each in their_hidden(theirs(checkpoint), texts())]
    backends = backends_of(loaded.model)
    async with world.running(loaded.model, backends, tokenizer=loaded.tokenizer, chunk_tokens=100) as engine:
        requests = [world.embedding(text.tolist()) for text in texts()]
        together = await asyncio.gather(*(world.embed(engine, request) for request in requests))
        assert [len(request.timings.chunks) for request in requests] == [1] * len(requests)
        alone = [await world.embed(engine, world.embedding(text.tolist())) for text in texts()]
        assert world.is_empty(engine)
    for found in (together, alone):
        torch.testing.assert_close(torch.tensor(found), torch.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", SHAPES)
def test_a_checkpoint_with_the_head_it_was_trained_with_embeds_the_same(tmp_path: Path, family: str) -> None:
    masked = write(tmp_path, family, "AutoModelForMaskedLM")
    (ours,) = our_hidden(load(masked, dtype="float32").model, [draw(30)])
    (expected,) = their_hidden(theirs(masked), [draw(30)])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("labels", [1, 3])
async def test_a_classifier_gives_pairs_the_scores_that_transformers_gives(tmp_path: Path, family: str, labels: int) -> None:
    kind = "AutoModelForSequenceClassification"
    directory = write(tmp_path, family, kind, num_labels=labels)
    loaded, ids = load(directory, dtype="float32"), draw(40)
    types = torch.tensor([0] * 15 + [1] * 25)
    kinds = {"token_type_ids": types[None]} if loaded.model.config.num_token_types > 1 else {}
    with torch.inference_mode():
        logits = theirs(directory, kind)(ids[None], **kinds).logits[0]
    activated = logits.sigmoid() if labels == 1 else logits.softmax(0)
    async with world.running(loaded.model, backends_of(loaded.model), tokenizer=loaded.tokenizer) as engine:
        for raw, expected in ((False, logits), (None, activated)):
            request = Request("r", "classification", ids.tolist(), second=15, is_ended=raw)
            scores = await world.embed(engine, request)
            torch.testing.assert_close(torch.tensor(scores), expected, rtol=0, atol=1e-4)
        with pytest.raises(TaskNotOffered, match=r"offers classification \(/v1/classify.*not embedding"):
            engine.submit(world.embedding(ids.tolist()))


async def test_what_a_packed_step_is_padded_with_is_no_part_of_its_last_text(tmp_path: Path) -> None:
    """Longformer's first token sees all of its text: not the rows that only fill the product, and each text's own."""
    loaded = load(write(tmp_path, "longformer", "AutoModelForSequenceClassification"), dtype="bfloat16")
    ids, second = draw(67), draw(50)
    (alone,) = our_hidden(loaded.model, [ids])
    expected = loaded.model.pooler(alone[0].float())
    async with world.running(loaded.model, backends_of(loaded.model), tokenizer=loaded.tokenizer) as engine:
        requests = [Request(f"r{i}", "classification", each.tolist(), is_ended=False) for i, each in enumerate((second, ids))]
        _, scores = await asyncio.gather(*(world.embed(engine, request) for request in requests))
    torch.testing.assert_close(torch.tensor(scores), expected, rtol=0, atol=0.03)


def test_mpnets_positions_begin_at_the_same_row_whatever_pads(tmp_path: Path) -> None:
    directory = write(tmp_path, "mpnet", pad_token_id=4)
    (ours,) = our_hidden(load(directory, dtype="float32").model, [draw(LENGTH)])
    (expected,) = their_hidden(theirs(directory), [draw(LENGTH)])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


async def test_an_encoder_draws_no_tokens(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, "bert"), dtype="float32")
    async with world.running(loaded.model, backends_of(loaded.model), tokenizer=loaded.tokenizer) as engine:
        with pytest.raises(TaskNotOffered, match=r"offers embedding \(/v1/embeddings\), not completion"):
            engine.submit(world.completion([5, 6]))


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("sliding_window", {"window": 9, "sinks": 2}),
        ("longformer", {"window": 9, "global_tokens": 1}),
        ("bigbird", {"block": 8}),
        ("performer", {"features": 64}),
    ],
)
async def test_an_encoder_is_served_both_ways_under_every_backend_that_has_them(
    tmp_path: Path, backend: str, options: dict[str, int]
) -> None:
    """As the bare model with the backend's own `attend`; a wide window is the dense answer."""
    loaded, text = load(write(tmp_path, "bert"), dtype="float32"), draw(120)
    built = backends_of(loaded.model, **{backend: options})
    async with world.running(loaded.model, built, tokenizer=loaded.tokenizer) as engine:
        ours = await world.embed(engine, world.embedding(text.tolist(), backend))
        dense = await world.embed(engine, world.embedding(text.tolist(), "dense"))
    from attention import Segments

    segments = Segments((len(text),))
    with torch.inference_mode():
        hidden = loaded.model.hidden(
            text,
            segments.positions(),
            lambda layer, q, k, v: built.by_name[backend].attend(q, k, v, segments, causal=False),
        )
    torch.testing.assert_close(torch.tensor(ours), their_vector(hidden), rtol=0, atol=1e-5)
    assert (torch.tensor(ours) - torch.tensor(dense)).abs().max() > 1e-3, "the pattern changes something here"


async def test_a_text_is_one_piece_and_its_bytes_are_those_of_the_law(tmp_path: Path) -> None:
    """A text of several chunks is computed at once: what is reserved covers it, and a budget below that refuses it."""
    loaded = load(write(tmp_path, "bert", hidden_size=96, intermediate_size=384, max_position_embeddings=2048), dtype="float32")
    model, built, text = loaded.model, backends_of(loaded.model), draw(2000)
    async with world.running(model, built, tokenizer=loaded.tokenizer, chunk_tokens=64) as engine:
        request = world.embedding(text.tolist())
        plan = engine.plan(request)
        await world.embed(engine, request)
        assert (len(request.timings.chunks), plan.terms["state"]) == (1, 0)
        measured = peak_bytes(lambda: our_hidden(model, [text]))
    assert plan.terms["step"] >= measured - (1 << 20)
    assert plan.terms["step"] <= 1.5 * measured + (1 << 20)


def test_bigbird_gives_long_texts_the_states_of_transformers_over_an_equal_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modeling = pytest.importorskip("transformers.models.big_bird.modeling_big_bird")
    directory = write(tmp_path, "big_bird", num_random_blocks=2, max_position_embeddings=400)
    model, text, count = load(directory, dtype="float32").model, draw(203), 26
    native = backends_of(model).by_name["native"]
    assert isinstance(native, PerLayer)
    kind = native.layers[0]
    assert isinstance(kind, BigBird)
    always = [{0, count - 1, b - 1, b, b + 1} for b in range(count)]
    drawn = [sorted(set(kind.seen(b, count)) - always[b]) for b in range(1, count - 1)]
    table = [np.array(drawn, dtype=np.int32)] * 4  # a head each; transformers draws in training only
    monkeypatch.setattr(modeling.BigBirdBlockSparseAttention, "_bigbird_block_rand_mask_with_head", lambda *_, **__: table)
    (expected,) = their_hidden(theirs(directory), [text])
    (ours,) = our_hidden(model, [text])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architectures": ["BertForTokenClassification"]}, "architectures must name BertModel or BertForMaskedLM"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute'"),
        ({"hidden_act": "silu"}, "hidden_act must be 'gelu'"),
        ({"is_decoder": True}, "is_decoder must be False"),
        ({"odd_scale": 3.0}, "odd_scale: 3.0"),
    ],
)
def test_what_an_encoder_says_and_is_not_computed_is_refused_by_name(
    tmp_path: Path, changes: dict[str, object], told: str
) -> None:
    directory = write(tmp_path, "bert")
    change(directory, **changes)
    with pytest.raises(ValueError, match=told):
        load(directory)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@pytest.mark.skipif(not can_pack(torch.zeros(1, dtype=torch.bfloat16)), reason="oneDNN does not multiply here")
def test_a_packed_model_with_its_activation_in_the_product_answers_as_one_without(tmp_path: Path, activation: str) -> None:
    """As the float32 model within what bfloat16 rounds, and no further from it than the product and activation apart."""
    directory = write(tmp_path, "bert", hidden_act=activation)
    (exact,) = our_hidden(load(directory, dtype="float32").model, [draw(100)])
    packed = load(directory, dtype="bfloat16").model
    (ours,) = our_hidden(packed, [draw(100)])
    apart = (ours.float() - exact).abs().mean()
    for layer in packed.stack:
        layer.gate_up.activated = lambda x, name, layer=layer: ACTIVATIONS[name](layer.gate_up(x))  # type: ignore[method-assign]
    (unfused,) = our_hidden(packed, [draw(100)])
    assert not torch.equal(ours, unfused), "the activation was in the product"
    assert apart <= 1.1 * (unfused.float() - exact).abs().mean()
