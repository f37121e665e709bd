"""How many replicas a node may have to carry, read from the config that Serve was given, and how many calls a replica."""

from __future__ import annotations

from typing import Any

import pytest

from service.app import build, most_replicas_on
from service.config import EngineConfig

NODE = {"CPU": 4.0, "GPU": 2.0, "scratch": 1.0}


@pytest.mark.parametrize(
    ("section", "most"),
    [
        ({}, 1),
        ({"num_replicas": 3}, 3),
        ({"num_replicas": 9}, 4),  # each takes a CPU where the file says nothing
        ({"num_replicas": 9, "ray_actor_options": {"num_cpus": 0.1}}, 9),
        ({"num_replicas": 50, "ray_actor_options": {"num_cpus": 0.1}}, 40),
        ({"num_replicas": 9, "ray_actor_options": {"num_cpus": 0}}, 9),
        ({"num_replicas": 9, "max_replicas_per_node": 1}, 1),
        ({"num_replicas": "auto"}, 4),
        ({"num_replicas": "auto", "autoscaling_config": {"max_replicas": 2}}, 2),
        ({"autoscaling_config": {"min_replicas": 1, "max_replicas": 3}}, 3),
        ({"num_replicas": 9, "ray_actor_options": {"num_cpus": 0.1, "num_gpus": 0.5}}, 4),
        ({"num_replicas": 9, "ray_actor_options": {"num_cpus": 0.1, "resources": {"scratch": 1}}}, 1),
        ({"num_replicas": 2, "ray_actor_options": {"resources": {"elsewhere": 1}}}, 0),
    ],
)
def test_a_node_carries_no_more_than_is_asked_for_and_fits(section: dict[str, Any], most: int) -> None:
    assert most_replicas_on(NODE, section) == most


def test_serve_lets_more_calls_in_than_the_engine_decodes_together_where_a_config_says_nothing() -> None:
    assert build({})._bound_deployment.max_ongoing_requests > EngineConfig().max_sequences
