"""Bytes: what is left on a machine or in a container, who holds how many, and what a step really took."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.engine.memory import BESIDE_BUDGET_BYTES, Ledger, available_bytes, budget_bytes, is_out_of_memory

CPU = torch.device("cpu")
GIB = 2**30


def machine(root: Path, groups: str) -> Path:
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
    root = machine(tmp_path, "0::/user/shell\n")
    group(root, "user/shell", memory_max="max\n", memory_current="1\n")
    assert available_bytes(CPU, root) == 8 * GIB


def test_the_narrowest_enclosing_cgroup_decides_and_its_cache_counts_as_free(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/pod/container\n")
    group(root, "pod/container", memory_max="max", memory_current=f"{GIB}", memory_stat="inactive_file 0\n")
    group(root, "pod", memory_max=f"{4 * GIB}", memory_current=f"{2 * GIB}", memory_stat=f"anon 5\ninactive_file {GIB}\n")
    assert available_bytes(CPU, root) == 3 * GIB


def test_a_version_1_cgroup_is_read_too(tmp_path: Path) -> None:
    root = machine(tmp_path, "5:cpu:/a\n4:memory:/box\n0::/\n")
    group(
        root,
        "memory/box",
        memory_limit_in_bytes=f"{2 * GIB}",
        memory_usage_in_bytes=f"{GIB}",
        memory_stat=f"total_inactive_file {GIB // 2}\n",
    )
    assert available_bytes(CPU, root) == 3 * GIB // 2


def test_inside_a_container_the_mounted_root_is_the_cgroup(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/outside/that/is/not/mounted\n")
    group(root, "", memory_max=f"{GIB}", memory_current="0")
    assert available_bytes(CPU, root) == GIB


def test_a_full_cgroup_leaves_nothing_and_is_refused(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/\n")
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


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 100)), max_size=40))
def test_the_ledger_holds_exactly_what_is_held(moves: list[tuple[int, int]]) -> None:
    ledger, held = Ledger(300), dict[int, int]()
    for owner, amount in moves:
        if amount == 0:
            ledger.release(owner)
            held.pop(owner, None)
        elif owner not in held and ledger.fits(amount):
            ledger.hold(owner, amount)
            held[owner] = amount
        assert ledger.in_use == sum(held.values()) <= ledger.budget
        assert ledger.free == ledger.budget - ledger.in_use


def test_the_ledger_never_passes_its_budget() -> None:
    ledger = Ledger(10)
    with pytest.raises(AssertionError, match="passes"):
        ledger.hold("owner", 11)


def test_refused_memory_is_told_from_other_faults() -> None:
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as refusal:
        torch.empty(2**60)
    assert is_out_of_memory(refusal.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
