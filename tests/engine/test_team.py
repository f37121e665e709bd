"""The model thread's team: one member to a CPU where it has them all, and free to move where it has not."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.engine.team import give_team_its_cpus

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="CPUs are given on Linux only")


def affinities_after(threads: int) -> tuple[set[int], list[set[int]]]:
    """Affinity of a thread that has made its team, and those of the tasks that came to be with it."""

    def make() -> tuple[set[int], list[set[int]]]:
        before = set(os.listdir("/proc/self/task"))
        give_team_its_cpus(threads)
        new = set(os.listdir("/proc/self/task")) - before
        return os.sched_getaffinity(0), [os.sched_getaffinity(int(task)) for task in new]

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()


def test_a_team_of_all_cpus_has_one_each() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    own, workers = affinities_after(len(cpus))
    assert sorted([own, *workers], key=min) == [{cpu} for cpu in cpus]


def test_a_smaller_team_is_left_to_the_scheduler() -> None:
    cpus = os.sched_getaffinity(0)
    own, workers = affinities_after(len(cpus) + 1)
    assert own == cpus
    assert all(affinity == cpus for affinity in workers)
