"""How many bytes a step really took, measured while it serves, within a set share of the time.

On CPU a `StorageCounter` counts the tensor storages that dispatched operators make, as torch's own memory tracker does; it
costs some 13 microseconds an operator, which doubles a decode step. So a `Metering` measures the first step of each kind and
size and, for the rest, as many as a share of the time of their kind pays for. On CUDA the allocator knows the peak, at no
cost, and every step is measured. `attention.memory` has the profiler's peak, to which tests hold both.
"""

from __future__ import annotations

import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TRIALS = 9  # of the measurement of what counting costs


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of storages that operators make while it is entered, and their peak.

    Storages that existed before are not counted. Blind to scratch inside a kernel. May be entered again and again; what
    lives between counts on. What outlives it does not keep it alive.
    """

    method = "dispatch"

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current_bytes = 0
        self.peak_bytes = 0
        self.operators = 0
        self._live: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        old = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))} if _may_alias(func) else set()
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._live and storage._cdata not in old:
                self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size, counter = storage._cdata, storage.nbytes(), weakref.ref(self)

        def forget(_: object) -> None:
            if (alive := counter()) is not None:
                del alive._live[key]
                alive.current_bytes -= size

        self._live[key] = weakref.ref(storage, forget)
        self.current_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)


class AllocatorPeak:
    """The same measure on CUDA, where the caching allocator knows it exactly. Sees the whole device: one step at a time.

    May be entered again and again; what the step holds in a pause is no part of the level it starts from.
    """

    method = "allocator"
    operators = 0

    def __init__(self, device: torch.device) -> None:
        self.peak_bytes = 0
        self._device = device
        self._before = 0
        self._held = 0

    def __enter__(self) -> AllocatorPeak:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device) - self._held
        return self

    def __exit__(self, *error: object) -> None:
        self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(self._device) - self._before)
        self._held = torch.cuda.memory_allocated(self._device) - self._before


Meter = StorageCounter | AllocatorPeak


class Metering:
    """Which steps are measured, so that measuring takes no more than `share` of the time of each kind of step."""

    def __init__(self, device: torch.device, share: float, operator_seconds: float) -> None:
        """`share` of 1: every step. `operator_seconds`: what counting one operator costs, see `counting_seconds`."""
        self.seconds = 0.0  # spent on measuring so far
        self._device = device
        self._share = share
        self._operator_seconds = operator_seconds
        self._credit: dict[str, float] = defaultdict(float)  # seconds that may be spent; below 0: spent ahead
        self._seen: weakref.WeakKeyDictionary[object, set[Hashable]] = weakref.WeakKeyDictionary()  # by whose steps they are

    def meter(self, kind: str, owner: object, size: Hashable, is_worth: Callable[[], bool]) -> Meter | None:
        """A measure for a step, or None.

        Args:
            kind: of its step; the time of each kind pays for its own measurements.
            owner: whose step it is, a backend's lane: it goes with a switch, and what is known of it goes with it.
            size: the step's class; the first of each of an owner is measured whatever it costs.
            is_worth: whether another measurement would tell anything; asked only when there is time for one.
        """
        if self._device.type == "cuda":
            return AllocatorPeak(self._device)
        seen = self._seen.setdefault(owner, set())
        if self._share < 1 and size in seen and (self._credit[kind] <= 0 or not is_worth()):
            return None
        seen.add(size)
        return StorageCounter()

    def account(self, kind: str, seconds: float, meter: Meter | None) -> None:
        """Book a step that has ended: its time earns credit, its measurement spends it."""
        cost = 0.0 if meter is None else meter.operators * self._operator_seconds
        self.seconds += cost
        self._credit[kind] += self._share * seconds - cost


def counting_seconds(call: Callable[[], object]) -> float:
    """What counting costs per operator of a call, by the median of some trials. Imports what torch needs for it, too.

    By this thread's own time on a CPU: what else runs on the machine is no part of it.
    """

    def timed(meter: StorageCounter | None) -> float:
        start = time.thread_time()
        with meter or nullcontext():
            call()
        return time.thread_time() - start

    with torch.inference_mode():
        timed(meter := StorageCounter())
        pairs = [(timed(None), timed(StorageCounter())) for _ in range(TRIALS)]
    return max(0.0, median(counted - plain for plain, counted in pairs)) / max(1, meter.operators)


@cache
def _may_alias(func: Any) -> bool:
    """Whether an operator's result may be, or may lie in, one of its inputs."""
    return any(answer.alias_info is not None for answer in func._schema.returns)


def _tensors(value: Any) -> list[Tensor]:
    """All tensors with a storage: packed weights are opaque, and as old as the model."""
    if isinstance(value, Tensor):
        return [] if value.is_mkldnn else [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]
