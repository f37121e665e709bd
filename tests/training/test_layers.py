"""The search for layers that must see far: what it finds is enough, and no layer of it is needless."""

from __future__ import annotations

import pytest

from attention import LAYERED, HeadShape, build, layers_of
from service.training.layers import Far, Quality, cheapest, plan


@pytest.mark.parametrize("needed", [set(), {0}, {3, 5}, {0, 1, 2, 3, 4, 5}])
def test_the_plan_has_the_layers_that_are_needed_and_no_other(needed: set[int]) -> None:
    def measure(far: Far) -> Quality:
        return Quality(len(far & needed) / max(1, len(needed)) if needed else 1.0, -1.0 - 0.001 * (6 - len(far)))

    wanted = measure(frozenset(range(6)))
    assert cheapest(6, measure, lambda quality: quality.suffices(wanted, 0.95, 0.01)) == needed


def test_a_layer_that_later_ones_make_needless_is_taken_out_again() -> None:
    def measure(far: Far) -> Quality:
        return Quality(1.0 if {1, 2} <= far else 0.5 if 0 in far else 0.4 if far else 0.0, -1.0)

    assert cheapest(4, measure, lambda quality: quality.recall >= 1.0) == {1, 2}


@pytest.mark.parametrize(
    ("quality", "is_enough"), [(Quality(0.95, -1.005), True), (Quality(0.94, -1.0), False), (Quality(1.0, -1.006), False)]
)
def test_enough_is_a_share_of_recall_and_a_part_more_bits(quality: Quality, is_enough: bool) -> None:
    assert quality.suffices(Quality(1.0, -1.0), 0.95, 0.005) == is_enough


def test_a_plan_is_served_as_it_says() -> None:
    options = plan(3, frozenset({1}), {"near": {"sliding_window": {"window": 5}}, "far": {"dense": {}}})
    backend = build(LAYERED, options, HeadShape(2, 1, 32))
    assert [layer.name for layer in layers_of(backend, 3)] == ["sliding_window", "dense", "sliding_window"]
