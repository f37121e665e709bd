"""Pictures of backends: drawn from the definition, for every backend there is, and kept small."""

from __future__ import annotations

from pathlib import Path

import pytest

from attention import build, names, picture

PICTURES = Path(picture.__file__).with_name("pictures")


@pytest.mark.parametrize("name", names())
def test_every_backend_has_a_line_for_each_token(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    picture.main([name])
    assert len(capsys.readouterr().out.splitlines()) == 1 + picture.TOKENS


@pytest.mark.parametrize("name", [path.stem for path in PICTURES.glob("*.png")])
def test_a_picture_that_is_kept_is_the_one_that_is_drawn(name: str, tmp_path: Path) -> None:
    imread = pytest.importorskip("matplotlib.image").imread
    picture.main([name, "--png", str(tmp_path / "drawn.png")])
    drawn, kept = imread(tmp_path / "drawn.png"), imread(PICTURES / f"{name}.png")
    assert drawn.shape == kept.shape and abs(drawn - kept).mean() <= 0.02  # fonts differ by version


def test_the_text_of_a_window_is_its_band_and_its_sinks() -> None:
    backend = build("sliding_window", {"window": 1, "sinks": 1}, picture.SHAPE)
    causal = [line[:10].rstrip() for line in picture.text(backend, 5).splitlines()]
    assert causal == ["causal", "@@", "@@@@", "@@@@@@", "@@  @@@@", "@@    @@@@"]


def test_an_option_is_taken_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    picture.main(["chunked", "chunk=4", "--tokens", "4"])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["@@@@@@@@", "@@@@@@@@"]


def test_all_pictures_are_small() -> None:
    assert sum(path.stat().st_size for path in PICTURES.glob("*.png")) < 200_000
