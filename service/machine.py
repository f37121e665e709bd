"""What the operating system lets this process use: CPUs, and memory. Threads are `service/threads.py`.

Memory: what the container (cgroup v2 or v1) or the machine has left, or the accelerator's free memory.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CGROUP_V2 = Path("/sys/fs/cgroup/cpu.max")
CGROUP_V1 = Path("/sys/fs/cgroup/cpu")

# What a warm process may take beside weights, runtime and budget: slack of the allocator, kernels that the matrix library
# compiles and the scratch inside them. `python -m service.benchmark` measures it under four times the budget.
BESIDE_BUDGET_BYTES = 64 << 20
STARVATION_SECONDS = 10.0  # of computing, after which two thirds of what was before are forgotten


def cache_folder() -> Path | None:
    """Where this user's programs keep what they can make again; None for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longserve"
    except RuntimeError:
        return None


def processor() -> str:
    """The CPU's name, as the kernel has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


@dataclass(frozen=True)
class Place:
    """One replica among those that a machine has to carry together at most."""

    rank: int = 0  # 0 to replicas - 1, no two alike at one time
    replicas: int = 1
    replicas_per_gpu: int = 1


def available_cpus() -> int:
    """CPUs this process may use: its affinity mask, and the container's quota rounded up; at least 1."""
    quota = _quota()
    return len(_allowed()) if quota is None else max(1, min(len(_allowed()), math.ceil(quota)))


def dealt_threads(place: Place) -> int:
    """CPUs for each of the replicas that share this machine; at least 1."""
    return max(1, available_cpus() // place.replicas)


def dealt_cpus(place: Place) -> list[int]:
    """The CPUs that are a replica's own: no other replica of this machine gets one of them.

    Empty where none can be: with fewer CPUs than replicas, or under a quota, which leaves it open which CPUs others take.
    """
    allowed, each = _allowed(), available_cpus() // place.replicas
    return allowed[place.rank * each :][:each] if available_cpus() == len(allowed) else []


def _allowed() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _quota() -> float | None:
    """CPUs that the container's quota allows; None without one."""
    try:
        if CGROUP_V2.is_file():
            limit, period = CGROUP_V2.read_text().split()
        else:
            limit, period = ((CGROUP_V1 / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except (OSError, ValueError):  # no container, or no quota file in it
        return None
    return None if limit in ("max", "-1") else int(limit) / int(period)


def available_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that may still be taken: the least of what the machine and each enclosing cgroup leave; on CUDA the free ones."""
    if device.type == "cuda":
        import torch  # here, for the command line asks for CPUs only

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


def resident_bytes() -> int:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def trim() -> None:
    """Give the C library's free heap back to the system. Does nothing where there is no glibc."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)


class Starvation:
    """The share of the time a thread computed in that it had no CPU, over the last seconds of it: others take its CPUs.

    A thread that waits for another, which has none, counts as well where it sleeps meanwhile.
    """

    def __init__(self) -> None:
        self.ratio = 0.0

    def note(self, seconds: float, cpu_seconds: float) -> None:
        """Book some seconds by the clock, and those of them that the thread was running."""
        if seconds > 0:
            share = min(1.0, max(0.0, 1 - cpu_seconds / seconds))
            self.ratio += (share - self.ratio) * -math.expm1(-seconds / STARVATION_SECONDS)
