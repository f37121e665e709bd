"""Bytes: how many there are and who holds them. How many a step really took is `measure.py`.

Budget: what the container (cgroup v2 or v1) or the machine has left, or the accelerator's free memory. Ledger: reservations
against the budget, exact to the byte.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch

# What a warm process may take beside weights, runtime and budget: slack of the allocator, kernels that the matrix library
# compiles and the scratch inside them. `python -m service.engine.benchmark` measures it under four times the budget.
BESIDE_BUDGET_BYTES = 64 << 20


def available_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that may still be taken: the least of what the machine and each enclosing cgroup leave; on CUDA the free ones."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([_machine_bytes(root), *_cgroup_bytes(root)])


def budget_bytes(configured: int | None, share: float, available: int) -> int:
    """The bytes that requests may hold together.

    Raises:
        ValueError: a configured budget beyond what is available, or nothing available.
    """
    free = available - BESIDE_BUDGET_BYTES
    if configured is not None and configured > free:
        raise ValueError(f"engine.memory_budget_bytes must be at most the {free} bytes left here, received {configured}")
    budget = configured if configured is not None else int(share * free)
    if budget <= 0:
        raise ValueError(f"no memory left for requests: {available} bytes available after the weights")
    return budget


def _machine_bytes(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/meminfo names no MemAvailable")


def _cgroup_bytes(root: Path) -> Iterator[int]:
    """What each limited cgroup around this process leaves: its limit minus its use, reclaimable cache not counted as use."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, usage, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        for folder in _upwards(base, path):
            bound = _lines(folder / limit)
            if bound and bound[0] != "max":
                stat = dict(entry.split() for entry in _lines(folder / "memory.stat"))
                yield max(0, int(bound[0]) - int(_lines(folder / usage)[0]) + int(stat.get(cache, 0)))


def _upwards(base: Path, path: str) -> Iterator[Path]:
    """The cgroup's folder and its parents. Inside a container the path may lie outside what is mounted: the mount is it."""
    folder = base / path.lstrip("/")
    while folder != base:
        yield folder
        folder = folder.parent
    yield base


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


class Ledger:
    """Who has reserved how many bytes of the budget."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.in_use = 0
        self._held: dict[object, int] = {}

    @property
    def free(self) -> int:
        return self.budget - self.in_use

    def fits(self, needed: int) -> bool:
        return needed <= self.free

    def hold(self, owner: object, needed: int) -> None:
        """Set what an owner holds. Growing past the budget is our fault: callers ask `fits` first."""
        change = needed - self._held.get(owner, 0)
        assert change <= self.free, f"reservation of {change} bytes passes the {self.free} that are free"
        self._held[owner] = needed
        self.in_use += change

    def release(self, owner: object) -> None:
        """Give back all that an owner holds; nothing when it holds nothing."""
        self.in_use -= self._held.pop(owner, 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory was refused. torch's CPU allocator has no exception type of its own."""
    refused = "can't allocate memory" in str(error) or "not enough memory" in str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (isinstance(error, RuntimeError) and refused)


def trim() -> None:
    """Give the C library's free heap back to the system. Does nothing where there is no glibc."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)
