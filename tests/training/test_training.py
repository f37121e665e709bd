"""What the model is trained on and under: the split leaks nothing, the differentiable forms are the served backends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import attention
from attention import HeadShape, Segments
from service.model.checkpoint import EMBEDDED
from service.model.tokenizer import Tokenizer
from service.model.transformer import Attend
from service.training import corpus, needle
from service.training.gradients import performer_attention, softmax_attention, streamed_attention
from service.training.train import CURRICULUM, FEATURE_SEED, FEATURES, MAX_QK_SCALE, Sampler, Trainer, at, attend_for

TOKENIZER = Tokenizer.load(EMBEDDED)


@pytest.fixture(scope="module")
def found() -> list[corpus.Module]:
    return list(corpus.modules())


def test_no_held_out_text_is_trained_on(found: list[corpus.Module]) -> None:
    train, held_out = corpus.split(found)
    assert not {module.digest for module in train} & {module.digest for module in held_out}
    assert not {module.path for module in train} & {module.path for module in held_out}
    assert 0.02 < sum(len(m.text) for m in held_out) / sum(len(m.text) for m in found) < 0.1


def test_the_split_hangs_on_the_path_alone() -> None:
    texts = [corpus.Module("asyncio/locks.py", text) for text in ("a", "b", "c")]
    assert len({module.held_out for module in texts}) == 1


def test_a_copy_of_a_held_out_text_under_a_training_path_is_dropped() -> None:
    paths = [f"{i}.py" for i in range(200)]
    hidden = next(path for path in paths if corpus.Module(path, "").held_out)
    open_path = next(path for path in paths if not corpus.Module(path, "").held_out)
    train, held_out = corpus.split([corpus.Module(hidden, "same"), corpus.Module(open_path, "same")])
    assert [module.path for module in held_out] == [hidden]
    assert train == []


def test_modules_of_other_encodings_and_third_parties_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "theirs.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes("# é\n".encode("latin-1"))
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "ours.py").write_text("x = 1\n")
    assert [module.path for module in corpus.modules(tmp_path)] == ["ours.py"]


@pytest.mark.parametrize(
    ("form", "backend", "options"),
    [
        (softmax_attention(384), "dense", {}),
        (streamed_attention(384), "dense", {}),
        (softmax_attention(384, window=100, sinks=4), "sliding_window", {"window": 100, "sinks": 4}),
        (softmax_attention(384, window=100), "sliding_window", {"window": 100, "sinks": 0}),
        (performer_attention(384, FEATURES, FEATURE_SEED, 96), "performer", {"features": FEATURES, "local_chunk": 96}),
    ],
    ids=["dense", "dense streamed", "window with sinks", "window", "performer"],
)
def test_a_differentiable_form_computes_what_its_backend_serves(form: Attend, backend: str, options: dict[str, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(768, heads, 32, generator=generator) * 0.7 for heads in (4, 2, 2))
    served = attention.build(backend, options, HeadShape(4, 2, 32)).attend(q, k, v, Segments((384, 384)), causal=True)
    torch.testing.assert_close(form(0, q, k, v), served, rtol=1e-4, atol=1e-4)  # float32 sums in another order


def test_streamed_attention_has_the_gradients_of_plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.training.gradients.KEYS", 100)  # tiles that end within a block of rows, and before it
    generator = torch.Generator().manual_seed(4)
    q, k, v, slope = (torch.randn(768, heads, 32, generator=generator) for heads in (4, 2, 2, 4))
    found = []
    for form in (softmax_attention(384), streamed_attention(384)):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        found.append(torch.autograd.grad((form(0, *inputs) * slope).sum(), inputs))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_needles_are_woven_in_whole_and_their_answers_marked() -> None:
    rng = np.random.default_rng(0)
    filler = np.asarray(TOKENIZER.encode("x = 1\n") * 2000, dtype=np.uint16)
    tokens, answers = needle.weave(filler, 2049, rng, TOKENIZER.encode)
    assert tokens.shape == answers.shape == (2049,)
    text = TOKENIZER.decode(tokens.tolist())
    told, asked = (
        dict(line.removeprefix(head).split() for line in text.splitlines() if line.startswith(head))
        for head in ("# remember: ", "# recall: ")
    )
    assert asked == told and told
    assert all(text.index(f"# remember: {key}") < text.index(f"# recall: {key}") for key in told)
    marked = "".join(TOKENIZER.decode([t]) for t, a in zip(tokens.tolist(), answers, strict=True) if a)
    assert sorted(marked.split()) == sorted(told.values())


def test_the_schedule_goes_from_phase_to_phase_and_ends() -> None:
    first, second = CURRICULUM[:2]
    assert at(0) == (first, first.rate[0]) and at(first.tokens) == (second, second.rate[0])
    whole = sum(phase.tokens for phase in CURRICULUM)
    last = at(whole - 1)
    assert last is not None and last[0] is CURRICULUM[-1] and last[1] == pytest.approx(CURRICULUM[-1].rate[1], rel=1e-3)
    assert at(whole) is None


def test_layered_is_trained_as_it_is_served() -> None:
    """Windows in all layers but the last, which sees everything."""
    layers, length = len(MAX_QK_SCALE), 1280
    q, k, v = (torch.randn(length, heads, 64, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    near, whole = attend_for("sliding_window", length)(0, q, k, v), attend_for("dense", length)(0, q, k, v)
    assert not torch.equal(near, whole)
    for layer in range(layers):
        torch.testing.assert_close(attend_for("layered", length)(layer, q, k, v), whole if layer == layers - 1 else near)


def test_the_same_step_draws_the_same_batch_and_another_seed_another_one() -> None:
    stream = np.random.default_rng(0).integers(0, 4096, 50_000).astype(np.uint16)
    one, same, other = (Sampler(stream, TOKENIZER, seed).draw(7, CURRICULUM[0]) for seed in (0, 0, 1))
    assert torch.equal(one[2], same[2]) and one[0] == same[0]
    assert not torch.equal(one[2], other[2])


def test_a_saved_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    stream = np.random.default_rng(0).integers(0, 4096, 50_000).astype(np.uint16)
    sampler = Sampler(stream, TOKENIZER, 0)

    def step(trainer: Trainer) -> None:
        backend, length, tokens, weights = sampler.draw(trainer.step, CURRICULUM[0])
        trainer.loss(backend, length, tokens[:1], weights[:1]).backward()
        trainer.update(0.1)
        trainer.step += 1

    whole = Trainer(0, compiled=False)
    step(whole)
    torch.save(whole.state(), tmp_path / "state.pt")
    step(whole)
    resumed = Trainer(0, compiled=False)
    resumed.resume(torch.load(tmp_path / "state.pt", weights_only=True))
    step(resumed)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_an_update_keeps_the_qk_scales_within_their_bound() -> None:
    trainer = Trainer(0, compiled=False)
    for layer in trainer.model.stack:
        layer.q_norm.data.fill_(7.0)
    tokens = torch.randint(0, 4096, (1, 1025), generator=torch.Generator().manual_seed(0))
    trainer.loss("dense", 1024, tokens, torch.ones(1, 1024)).backward()
    trainer.update(0.1)
    for layer, most in zip(trainer.model.stack, MAX_QK_SCALE, strict=True):
        assert layer.q_norm.abs().max() <= most
