"""What the operating system lets this process use. Memory is the engine's affair (`service/engine/memory.py`)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

CGROUP_V2 = Path("/sys/fs/cgroup/cpu.max")
CGROUP_V1 = Path("/sys/fs/cgroup/cpu")


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


def in_passing_thread(call: Callable[[], T]) -> T:
    """What `call()` returns or raises, from a thread that ends with it. For every torch call outside the model thread.

    OpenMP keeps a team of workers for each thread that ever ran a parallel region, as long as that thread lives. Once a
    process has more workers than CPUs, GNU's libgomp no longer spins at a barrier but sleeps, and a model of many small
    operations runs at half its speed, for good (a dense prefill of 16,000 tokens: 7.5 s against 3.2 s on 2 cores).
    """
    with ThreadPoolExecutor(1) as passing:
        return passing.submit(call).result()
