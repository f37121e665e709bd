"""The model thread's team: one member to a CPU where each has its own, and free to move where not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from service.threads import give_team_its_cpus

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="CPUs are given on Linux only")


def affinities_after(threads: int, given: Collection[int]) -> tuple[set[int], list[set[int]]]:
    """Affinity of a thread that has made its team, and those of the tasks that came to be with it."""

    def make() -> tuple[set[int], list[set[int]]]:
        torch.set_num_threads(threads)  # the first time, torch makes a thread that is no member
        before = set(os.listdir("/proc/self/task"))
        give_team_its_cpus(threads, sorted(given))
        new = set(os.listdir("/proc/self/task")) - before
        return os.sched_getaffinity(0), [os.sched_getaffinity(int(task)) for task in new]

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()


def test_a_team_with_a_cpu_for_each_has_one_each() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    for given in (cpus, cpus[-1:]):
        own, workers = affinities_after(len(given), given)
        assert sorted([own, *workers], key=min) == [{cpu} for cpu in given]


def test_a_team_without_a_cpu_for_each_is_left_to_the_scheduler() -> None:
    cpus = os.sched_getaffinity(0)
    for given in (cpus, []):
        own, workers = affinities_after(len(cpus) + 1, given)
        assert own == cpus
        assert all(affinity == cpus for affinity in workers)


@pytest.mark.parametrize(
    ("set_before", "told"), [({}, "2000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)]
)
def test_threads_spin_briefly_where_they_wait_unless_the_operator_says_otherwise(
    set_before: dict[str, str], told: str | None
) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    env = clean | set_before | {"OMP_DISPLAY_ENV": "VERBOSE"}
    done = subprocess.run(
        [sys.executable, "-c", "import service, torch"], env=env, capture_output=True, text=True, check=True, timeout=60
    )
    lines = [line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not lines:
        pytest.skip("this torch has another OpenMP than GNU's")
    found = lines[0].split("'")[1]
    assert found == told if told else int(found) > 2000
