"""What a call really takes: the peak of live temporaries on CPU, from every allocation the profiler sees.

The ground truth behind the cost laws (kernel scratch that passes torch's allocator included). It slows the call, so it is for
audits and benchmarks, never for a timed or served call. It reads the profiler's raw event list, which torch keeps internal.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    """Highest sum of bytes that `call` allocated and had not yet freed, its answer included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        answer = call()
    del answer
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None, "the profiler did not run"
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
