"""What a machine grants: CPUs dealt among its replicas, never the same to two, and what is left of its memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from service import machine
from service.machine import (
    BESIDE_BUDGET_BYTES,
    Place,
    Starvation,
    available_bytes,
    available_cpus,
    budget_bytes,
    dealt_cpus,
    dealt_threads,
)

CPU = torch.device("cpu")
GIB = 2**30


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


def files(root: Path, groups: str) -> Path:
    """A file tree like /proc, of a process in these cgroups on a machine with 8 GiB available."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: {16 * GIB // 1024} kB\nMemAvailable: {8 * GIB // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    return root


def group(root: Path, folder: str, **files: str) -> None:
    """A cgroup's files; memory_max is the file memory.max."""
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / folder / name.replace("memory_", "memory.", 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_without_limits_the_machine_decides(tmp_path: Path) -> None:
    root = files(tmp_path, "0::/user/shell\n")
    group(root, "user/shell", memory_max="max\n", memory_current="1\n")
    assert available_bytes(CPU, root) == 8 * GIB


def test_the_narrowest_enclosing_cgroup_decides_and_its_cache_counts_as_free(tmp_path: Path) -> None:
    root = files(tmp_path, "0::/pod/container\n")
    group(root, "pod/container", memory_max="max", memory_current=f"{GIB}", memory_stat="inactive_file 0\n")
    group(root, "pod", memory_max=f"{4 * GIB}", memory_current=f"{2 * GIB}", memory_stat=f"anon 5\ninactive_file {GIB}\n")
    assert available_bytes(CPU, root) == 3 * GIB


def test_a_version_1_cgroup_is_read_too(tmp_path: Path) -> None:
    root = files(tmp_path, "5:cpu:/a\n4:memory:/box\n0::/\n")
    group(
        root,
        "memory/box",
        memory_limit_in_bytes=f"{2 * GIB}",
        memory_usage_in_bytes=f"{GIB}",
        memory_stat=f"total_inactive_file {GIB // 2}\n",
    )
    assert available_bytes(CPU, root) == 3 * GIB // 2


def test_inside_a_container_the_mounted_root_is_the_cgroup(tmp_path: Path) -> None:
    root = files(tmp_path, "0::/outside/that/is/not/mounted\n")
    group(root, "", memory_max=f"{GIB}", memory_current="0")
    assert available_bytes(CPU, root) == GIB


def test_a_full_cgroup_leaves_nothing_and_is_refused(tmp_path: Path) -> None:
    root = files(tmp_path, "0::/\n")
    group(root, "", memory_max=f"{GIB}", memory_current=f"{GIB + 5}")
    assert available_bytes(CPU, root) == 0
    with pytest.raises(ValueError, match="no memory left"):
        budget_bytes(None, 0.5, 0)


def test_what_a_process_takes_beside_its_budget_is_held_back() -> None:
    available = BESIDE_BUDGET_BYTES + 1000
    assert budget_bytes(None, 0.5, available) == 500
    assert budget_bytes(1000, 0.5, available) == 1000
    with pytest.raises(ValueError, match="at most the 1000 bytes left here, received 1001"):
        budget_bytes(1001, 0.5, available)


def test_the_real_machine_is_read() -> None:
    assert 0 < available_bytes(CPU) < 2**50


def test_a_thread_that_runs_is_not_starved_and_one_that_does_not_is() -> None:
    starvation = Starvation()
    for _ in range(1000):
        starvation.note(0.01, 0.0101)  # clocks differ
    assert starvation.ratio == 0.0
    for _ in range(3000):
        starvation.note(0.01, 0.0075)
    assert 0.2 < starvation.ratio <= 0.25
    starvation.note(0.0, 0.0)
    starvation.note(1000.0, 0.0)  # forgets what was before
    assert starvation.ratio > 0.99
