"""Threads that torch computes in: each brings an OpenMP team of workers. How many those are, and where they run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def in_passing_thread(call: Callable[[], T]) -> T:
    """What `call()` returns or raises, from a thread that ends with it. For every torch call outside the model thread.

    OpenMP keeps a team of workers for each thread that ever ran a parallel region, as long as that thread lives. Once a
    process has more workers than CPUs, GNU's libgomp no longer spins at a barrier but sleeps, and a model of many small
    operations runs at half its speed, for good (a dense prefill of 16,000 tokens: 7.5 s against 3.2 s on 2 cores).
    """
    with ThreadPoolExecutor(1) as passing:
        return passing.submit(call).result()


def give_team_its_cpus(threads: int, cpus: Sequence[int], gather: Callable[[int], object] = lambda threads: None) -> None:
    """Make this thread's OpenMP team of `threads`, and give each member one of `cpus` if there is just one for each.

    gather: makes another team of so many that this thread computes in, which is given the same.

    A worker that wakes up on the CPU where the thread that waits for it spins does not run before the scheduler moves one of
    them: a token after 0.1 s of rest took 32 ms instead of 5. With fewer threads than CPUs the scheduler finds a free one.
    """
    torch.set_num_threads(threads)
    if threads != len(cpus) or not hasattr(os, "sched_setaffinity"):
        return
    members = list[tuple[int, int]]()
    for make in (lambda threads: torch.ones(threads << 20).add_(1), gather):  # a parallel region: the team comes to be
        before = set(os.listdir("/proc/self/task"))
        make(threads)
        workers = sorted(int(task) for task in set(os.listdir("/proc/self/task")) - before)
        if len(workers) == threads - 1:  # else some other thread began meanwhile, and none can be told from it
            members += zip(workers, cpus[1:], strict=True)
    for member, cpu in ((threading.get_native_id(), cpus[0]), *members) if members or threads == 1 else ():
        os.sched_setaffinity(member, {cpu})
