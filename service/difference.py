"""What an edited file changes of the running service, key by key, and which of it Ray Serve restarts replicas for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

RESTARTING = ("args", "import_path", "route_prefix", "runtime_env")
"""Keys of an application whose change makes Serve start its replicas anew."""

RESTARTING_DEPLOYMENT = ("ray_actor_options", "max_replicas_per_node", "autoscaling_config.policy")
"""The same of its deployment: what Serve's DeploymentVersion compares in `requires_actor_restart`, and its code version."""


@dataclass(frozen=True)
class Change:
    """One key of an application's section: `before` or `after` is None where there is none."""

    key: str
    before: Any
    after: Any
    restarts: bool

    def __str__(self) -> str:
        told = f"{self.key}: {_told(self.before)} -> {_told(self.after)}"
        return f"{told} (restarts the replicas)" if self.restarts else told


def differences(running: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[Change]:
    """What separates two sections of an application, as Ray Serve's schema has them, sorted by key."""
    before, after = dict(_leaves(running)), dict(_leaves(wanted))
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return [Change(key, before.get(key), after.get(key), _restarts(key)) for key in keys]


def _leaves(section: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each value that is no mapping, by its path. An application has one deployment, whose keys follow the others."""
    for key, value in section.items():
        if key == "deployments":
            yield from ((f"deployments.0.{inner}", leaf) for inner, leaf in _leaves(value[0] if value else {}))
        elif isinstance(value, Mapping) and value:
            yield from ((f"{key}.{inner}", leaf) for inner, leaf in _leaves(value))
        elif value is not None:
            yield key, value


def _restarts(key: str) -> bool:
    inner = key.removeprefix("deployments.0.")
    named = RESTARTING if inner == key else RESTARTING_DEPLOYMENT
    return any(inner == each or inner.startswith(f"{each}.") for each in named)


def _told(value: Any) -> str:
    return "none" if value is None else str(value)
