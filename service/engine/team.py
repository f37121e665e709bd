"""The model thread and its OpenMP workers: how many they are, and where they run."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import torch


def give_team_its_cpus(threads: int, cpus: Sequence[int]) -> None:
    """Make this thread's OpenMP team of `threads`, and give each member one of `cpus` if there is just one for each.

    A worker that wakes up on the CPU where the thread that waits for it spins does not run before the scheduler moves one of
    them: a token after 0.1 s of rest took 32 ms instead of 5. With fewer threads than CPUs the scheduler finds a free one.
    """
    torch.set_num_threads(threads)
    if threads != len(cpus) or not hasattr(os, "sched_setaffinity"):
        return
    before = set(os.listdir("/proc/self/task"))
    torch.ones(threads << 20).add_(1)  # a parallel region: the team comes to be
    workers = sorted(int(task) for task in set(os.listdir("/proc/self/task")) - before)
    if len(workers) == threads - 1:  # else some other thread began meanwhile, and none can be told from it
        for member, cpu in zip([threading.get_native_id(), *workers], cpus, strict=True):
            os.sched_setaffinity(member, {cpu})
