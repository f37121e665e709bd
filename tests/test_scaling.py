"""How many replicas there should be, by their work."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from service.scaling import HOLDS, WORK, ByWork


@dataclass
class Told:
    """A context as Serve's controller makes one."""

    current_num_replicas: int = 1
    aggregated_metrics: dict[str, dict[str, float]] | None = field(default_factory=dict)


def wanted(seconds: list[float], pins: tuple[int, ...] = (), target: float = 2.0) -> float:
    metrics = {WORK: {str(n): each for n, each in enumerate(seconds)}, HOLDS: {str(n): float(n in pins) for n in range(9)}}
    number, state = ByWork(target)(Told(len(seconds), metrics))
    assert state == {}
    return number


def test_there_are_as_many_as_have_the_work_done_in_time() -> None:
    assert wanted([0.0]) == 1
    assert wanted([2.0]) == 1
    assert wanted([2.1]) == 2
    assert wanted([30.0, 0.0]) == 15
    assert wanted([0.5, 0.5, 0.5]) == 1
    assert wanted([6.0], target=0.5) == 12


def test_who_holds_pinned_prefixes_is_needed() -> None:
    assert wanted([0.0, 0.0, 0.0], pins=(0, 2)) == 2
    assert wanted([9.0, 0.0, 0.0], pins=(0, 2)) == 5


@pytest.mark.parametrize("metrics", [None, {}, {HOLDS: {"0": 1.0}}])
def test_before_anything_is_told_there_are_as_many_as_there_are(metrics: dict[str, dict[str, float]] | None) -> None:
    assert ByWork()(Told(3, metrics)) == (3, {})


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_a_target_without_sense_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        ByWork(seconds)
