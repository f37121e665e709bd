"""CPUs dealt among the replicas of one machine: each its own, and never the same to two."""

from __future__ import annotations

import os

import pytest

from service import machine
from service.machine import Place, available_cpus, dealt_cpus, dealt_threads


@pytest.fixture(params=[1, 2, 3, 8])
def cpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine of so many CPUs, of which the first is not ours."""
    allowed = list(range(1, 1 + request.param))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(allowed))
    monkeypatch.setattr(machine, "_quota", lambda: None)
    return allowed


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 9])
def test_no_cpu_is_dealt_twice(cpus: list[int], replicas: int) -> None:
    hands = [dealt_cpus(Place(rank, replicas)) for rank in range(replicas)]
    dealt = [cpu for hand in hands for cpu in hand]
    assert len(dealt) == len(set(dealt))
    assert set(dealt) <= set(cpus)
    assert {len(hand) for hand in hands} == {len(cpus) // replicas}


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 9])
def test_threads_together_pass_the_cpus_only_where_replicas_do(cpus: list[int], replicas: int) -> None:
    threads = dealt_threads(Place(0, replicas))
    assert threads >= 1
    assert threads * replicas <= max(len(cpus), replicas)


def test_a_replica_beyond_its_number_gets_no_cpu_of_another(cpus: list[int]) -> None:
    others = [cpu for rank in (0, 1) for cpu in dealt_cpus(Place(rank, 2))]
    assert not set(dealt_cpus(Place(2, 2))) & set(others)


def test_under_a_quota_no_cpu_is_anybodys_own(cpus: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_quota", lambda: 0.5)
    assert available_cpus() == 1
    assert dealt_threads(Place()) == 1
    assert dealt_cpus(Place()) == ([] if len(cpus) > 1 else cpus)
