"""The pace that is kept between starts: found again by the same machine and model only, and never in the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from service.engine import allowlist, engine
from service.engine.forecast import ROWS, Ramp, measure_model
from service.engine.profile import Profile
from tests.engine import world

FACTS = {"machine": "a", "threads": 2}
LINES = [Ramp(1e-4, 2e-9), Ramp(0.0, 3.0)]


def test_what_one_start_has_kept_the_next_one_recalls(tmp_path: Path) -> None:
    Profile(tmp_path / "new", FACTS).keep("dense", LINES)
    assert Profile(tmp_path / "new", FACTS).recall("dense", 2) == LINES
    assert Profile(tmp_path / "new", FACTS).recall("dense", 1) is None
    assert Profile(tmp_path / "new", FACTS).recall("performer", 2) is None


@pytest.mark.parametrize("other", [{"machine": "b", "threads": 2}, {"machine": "a", "threads": 1}, {}])
def test_another_machine_or_model_recalls_nothing(tmp_path: Path, other: dict[str, str | int]) -> None:
    Profile(tmp_path, FACTS).keep("dense", LINES)
    assert Profile(tmp_path, other).recall("dense", 2) is None


def test_two_replicas_keep_side_by_side(tmp_path: Path) -> None:
    first, second = Profile(tmp_path, FACTS), Profile(tmp_path, FACTS)
    first.keep("dense", LINES)
    second.keep("performer", LINES[:1])
    found = Profile(tmp_path, FACTS)
    assert (found.recall("dense", 2), found.recall("performer", 1)) == (LINES, LINES[:1])


@pytest.mark.parametrize("lines", ["", "{", '{"dense": [[1, -1]]}', '{"dense": [[NaN, 1]]}'])
def test_a_file_that_is_none_of_ours_counts_as_none_and_is_written_over(tmp_path: Path, lines: str) -> None:
    Profile(tmp_path).keep("dense", LINES)
    (file,) = tmp_path.iterdir()
    file.write_text(f'{{"facts": {{}}, "lines": {lines}}}')
    profile = Profile(tmp_path)
    assert profile.recall("dense", 1) is None
    profile.keep("dense", LINES)
    assert Profile(tmp_path).recall("dense", 2) == LINES


def test_a_folder_that_cannot_be_written_hinders_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    profile = Profile(tmp_path / "file" / "folder", FACTS)
    profile.keep("dense", LINES)
    assert profile.recall("dense", 2) == LINES


async def test_the_second_engine_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = world.make_model()
    courses = []
    for _ in range(2):
        served = engine.Engine(
            model, world.make_tokenizer(), world.make_backends(model), engine.EngineConfig(), profile=Profile(tmp_path, FACTS)
        )
        await served.start()
        courses.append({name: lane.course.seconds(1000) for name, lane in served._admission.lanes.items()})
        await served.stop()
        for module, name in ((engine, "measure_model"), (allowlist, "measure_attention")):
            monkeypatch.setattr(module, name, lambda *_: pytest.fail("measured again"))
    assert courses[0] == courses[1]


@pytest.mark.parametrize("has_guesses", [False, True])
def test_rows_of_guesses_are_timed_only_where_tokens_may_be_guessed(has_guesses: bool) -> None:
    model, heights = world.make_model(), set[int]()
    hidden = model.hidden

    def seen(ids: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        heights.add(len(ids))
        return hidden(ids, *rest, **named)

    model.hidden = seen  # type: ignore[method-assign]
    measure_model(model, has_guesses)
    assert (ROWS in heights) == has_guesses
