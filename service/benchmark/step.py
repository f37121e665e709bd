"""Where the time of a decode step goes, by backend and history: `python -m service.benchmark --profile-step`.

Of the embedded model, or of Qwen3-0.6B's shape with random weights: `--profile-step 0.6B`. A stream's time between two tokens
is cut by what can be measured apart:

    reading     summing up as many bytes as the step reads, weights and state, on all threads
    native      what the calls of our kernels take beyond that: arithmetic, and threads that wait for each other
    Python      the model without those calls: Python and torch's dispatch
    sampling    drawing the token
    engine      the rest of the step on the model thread: packing, states, accounts
    hand-over   between steps: the event loop, the scheduler, delivery

The first four together, the bare model's step and its token, are told as a share of it all, too.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import torch

from attention import AttentionBackend, Segments
from service.benchmark.alone import answered, make_engine, make_request
from service.benchmark.bare import BACKENDS, build, report
from service.benchmark.fewer import write
from service.benchmark.together import SHAPES
from service.engine.observer import NullObserver, Step
from service.engine.request import Sampling
from service.engine.sampling import draw
from service.model import native
from service.model.checkpoint import EMBEDDED, load
from service.model.continuation import extended
from service.model.transformer import Transformer
from service.threads import in_passing_thread

REPEATS = 60
PARTS = ("reading", "native", "Python", "sampling", "engine", "hand-over")


def measure_step(lengths: Sequence[int], shape: str) -> dict[str, dict[str, list[float]]]:
    """Microseconds of the parts, by backend and history. shape: one of SHAPES, the embedded model as it is shipped."""
    with tempfile.TemporaryDirectory() as folder:
        if SHAPES[shape]:
            write(Path(folder), SHAPES[shape])
        return asyncio.run(_measure(lengths, Path(folder) if SHAPES[shape] else EMBEDDED))


class _Steps(NullObserver):
    """The decode steps of one stream, those left out that memory was measured on."""

    def __init__(self) -> None:
        self.seen: list[Step] = []

    def stepped(self, step: Step) -> None:
        if step.kind == "decode" and step.measured_bytes is None and step.token_gaps:
            self.seen.append(step)

    def medians(self) -> tuple[float, float]:
        """Seconds between two tokens, and of a step on the model thread."""
        return median(step.token_gaps[0] for step in self.seen), median(step.seconds for step in self.seen)


async def _measure(lengths: Sequence[int], directory: Path) -> dict[str, dict[str, list[float]]]:
    checkpoint, steps = in_passing_thread(lambda: load(directory)), _Steps()
    engine, found = make_engine(checkpoint, steps, memory_sample_share=0), dict[str, dict[str, list[float]]]()
    await engine.start()
    print(f"{'microseconds of a decode step':76s}" + "".join(f"{part:>10s}" for part in ("in all", *PARTS, "bare")))
    for name in BACKENDS:
        for tokens in (min(n, checkpoint.model.config.max_length - REPEATS) for n in lengths):
            steps.seen.clear()
            await answered(engine, make_request(tokens, REPEATS, name))
            alone = partial(_alone, checkpoint.model, build(checkpoint.model, name), tokens)
            parts = [1e6 * part for part in _parts(*steps.medians(), *await engine._on_model_thread(alone))]
            found.setdefault(name, {})[str(tokens)] = [round(part, 1) for part in parts]
            report(
                f"behind {tokens} tokens",
                name,
                "".join(f"{part:10.0f}" for part in (sum(parts), *parts)) + f"{sum(parts[:4]) / sum(parts):10.0%}",
            )
    await engine.stop()
    return found


def _parts(between: float, busy: float, reading: float, bare: float, without: float, sampling: float) -> list[float]:
    """Seconds of each of PARTS, from what was measured; their sum is the time between two tokens."""
    return [reading, bare - without - reading, without, sampling, busy - bare - sampling, between - busy]


@torch.inference_mode()
def _alone(model: Transformer, backend: AttentionBackend, tokens: int) -> tuple[float, float, float, float]:
    """Seconds of reading a step's bytes, of the bare model's step, of that without its kernels' calls, and of drawing."""
    pool = backend.new_pool(model.config.num_hidden_layers, 2**62)
    tokens += 7  # no round number, at which a backend has more to do than at others
    slot = pool.allocate(tokens + 1)
    for tensor in pool.tensors(slot).values():
        tensor.zero_()
    ids, segments = torch.ones(1, dtype=torch.long), Segments((1,), (tokens,))

    def step() -> torch.Tensor:
        pool.pretend(slot, tokens)
        return model.logits(extended(model, backend, pool, (slot,), ids, segments))

    bare, logits = _seconds(step), step()
    with _without_kernels():
        without = _seconds(step)
    read = torch.ones((model.weight_bytes + pool.bytes_in_use) // 4)  # of the state all of it
    return _seconds(read.sum), bare, without, _seconds(lambda: draw(logits, [Sampling(temperature=0.0)], [0.0]))


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Calls of compiled kernels return at once; what they should have written is left as it was."""
    kernel = type(native.KERNEL)
    call = kernel.call
    kernel.call = lambda *_: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        kernel.call = call  # type: ignore[method-assign]


def _seconds(run: Callable[[], object]) -> float:
    """Median seconds of a call, behind some that warm up."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times[REPEATS // 6 :])
