"""`longserve convert`: a short encoder reads long texts, short ones as before, and transformers reads the checkpoint alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from service import cli
from service.model.checkpoint import load
from tests.model.encoders import LENGTH, draw, our_hidden, theirs, write, write_modules


def converted(source: Path, target: Path, window: int, length: int = 400) -> Path:
    assert cli.main(["convert", str(source), str(target), "--length", str(length), "--window", str(window)]) == 0
    return target


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
def test_a_text_that_fits_the_window_is_read_as_before_and_a_long_one_as_transformers_reads_it(
    tmp_path: Path, family: str
) -> None:
    source = write(tmp_path / "short", family)
    long = load(converted(source, tmp_path / "long", 40), dtype="float32")
    assert long.max_length == 400
    assert long.model.config.native == {"windows": [20, 20, 20], "sinks": 1}
    (expected,), (ours,) = our_hidden(load(source, dtype="float32").model, [draw(21)]), our_hidden(long.model, [draw(21)])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    model, text = theirs(tmp_path / "long", "LongformerModel"), draw(350)
    seen = torch.zeros(1, 350, dtype=torch.long)
    seen[0, 0] = 1
    with torch.inference_mode():
        expected = model(text[None], global_attention_mask=seen).last_hidden_state[0]
    (ours,) = our_hidden(long.model, [text])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_positions_are_the_old_ones_again_and_again(tmp_path: Path, family: str) -> None:
    source = write(tmp_path / "short", family)
    old = load(source, dtype="float32").model.positions.weight
    new = load(converted(source, tmp_path / "long", 8), dtype="float32").model.positions.weight
    assert torch.equal(new, old.repeat(3, 1)[:400]) and len(old) == LENGTH


def test_a_classifier_keeps_its_head_and_a_folder_its_recipe(tmp_path: Path) -> None:
    kind = "AutoModelForSequenceClassification"
    source = write(tmp_path / "judge", "bert", kind, num_labels=1)
    judge = load(converted(source, tmp_path / "long judge", 40), dtype="float32").model
    old, text = load(source, dtype="float32").model, draw(21)
    for one, other in zip(judge.pooler.parameters(), old.pooler.parameters(), strict=True):
        assert torch.equal(one, other)
    (expected,), (ours,) = our_hidden(old, [text]), our_hidden(judge, [text])
    torch.testing.assert_close(ours[0], expected[0], rtol=0, atol=1e-5)
    folder = write(tmp_path / "folder", "roberta")
    write_modules(folder, "cls_token", normalize=False, prompts={"query": "q: "})
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 100}')
    long = load(converted(folder, tmp_path / "long folder", 40))
    plan = long.model.config.pooled
    assert (plan.pooling, plan.is_normalized, plan.prompts, long.max_length) == ("cls", False, (("query", "q: "),), 400)


def test_the_report_is_nearer_to_one_under_a_wider_window_and_one_where_all_is_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "short", "bert")
    found = []
    for window in (4, 40, 2 * LENGTH):
        target = converted(source, tmp_path / f"long {window}", window)
        found.append(json.loads((target / "conversion.json").read_text())["cosines"]["128"])
        assert f"{found[-1][1]:.4f} on average, {found[-1][0]:.4f} at least" in capsys.readouterr().out
    assert [mean for _, mean in found] == sorted(mean for _, mean in found) and found[0][1] < 1
    assert found[-1] == [pytest.approx(1, abs=1e-5)] * 2


@pytest.mark.parametrize(
    ("family", "options", "told"),
    [
        ("modernbert", [], "only bert, roberta, xlm-roberta can be converted, the checkpoint is modernbert"),
        ("bert", ["--length", str(LENGTH)], "length must be above the old context"),
        ("bert", ["--window", "7"], "window must be an even number"),
        ("bert", ["--window", "2"], "window must be an even number above 2"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, options: list[str], told: str
) -> None:
    source = write(tmp_path / "short", family)
    capsys.readouterr()
    assert cli.main(["convert", str(source), str(tmp_path / "long"), *options]) == 1
    assert told in capsys.readouterr().err and not (tmp_path / "long").exists()
    (tmp_path / "there").mkdir()
    assert cli.main(["convert", str(write(tmp_path / "good", "bert")), str(tmp_path / "there")]) == 1
