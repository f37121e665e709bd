"""What an edited file changes of the running service: every key of it and no other, and which of them restart replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from service.config import ServeFile
from service.difference import differences

pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # in Ray's own source
LOCAL = Path(__file__).parent.parent / "deploy" / "local.yaml"


def told(change: Any) -> list[tuple[str, Any, Any, bool]]:
    """What differs between local.yaml as Serve keeps it and after `change(its application)`."""
    from ray.serve.schema import ServeDeploySchema

    data = yaml.safe_load(LOCAL.read_text())
    kept = ServeDeploySchema.model_validate(ServeFile.model_validate(data).to_serve()).applications[0]
    running = kept.model_dump(exclude_unset=True)
    change(data["applications"][0])
    (wanted,) = ServeFile.model_validate(data).to_serve()["applications"]
    return [(each.key, each.before, each.after, each.restarts) for each in differences(running, wanted)]


def switch(application: Any) -> Any:
    return application["deployments"][0]["user_config"]["attention"]


def test_a_file_as_it_was_changes_nothing() -> None:
    assert told(lambda application: None) == []


def test_a_switch_is_told_key_by_key_and_restarts_nothing() -> None:
    def change(application: Any) -> None:
        switch(application).update(default="performer", backends={"performer": {"features": 64}, "dense": {}})

    under = "deployments.0.user_config.attention"
    assert told(change) == [
        (f"{under}.backends.performer.features", 256, 64, False),
        (f"{under}.backends.performer.local_chunk", 512, None, False),
        (f"{under}.backends.sliding_window.sinks", 4, None, False),
        (f"{under}.backends.sliding_window.window", 1024, None, False),
        (f"{under}.default", None, "performer", False),
    ]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda application: application["args"].update(threads=3), "args.threads"),
        (lambda application: application["args"]["engine"].update(chunk_tokens=64), "args.engine.chunk_tokens"),
        (
            lambda application: application["deployments"][0]["ray_actor_options"].update(num_cpus=2),
            "deployments.0.ray_actor_options.num_cpus",
        ),
        (
            lambda application: application["deployments"][0].update(max_replicas_per_node=1),
            "deployments.0.max_replicas_per_node",
        ),
    ],
)
def test_what_replicas_are_made_of_restarts_them(change: Any, key: str) -> None:
    assert [(found, restarts) for found, _, _, restarts in told(change)] == [(key, True)]


def test_their_number_changes_in_place() -> None:
    found = told(lambda application: application["deployments"][0].update(num_replicas=2))
    assert found == [("deployments.0.num_replicas", 1, 2, False)]
