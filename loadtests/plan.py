"""From a scenario to blocks: which cells, in which order, what each sends. All of it is settled by the seed before a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loadtests import arrivals, lengths, trace
from loadtests.client import Ask
from loadtests.generator import Traffic
from loadtests.result import Cell
from loadtests.scenario import (
    Arrivals,
    Capacity,
    FixedLength,
    InFlight,
    Lengths,
    ListedLengths,
    Mixed,
    Poisson,
    Replay,
    Soak,
    Stream,
    Sweep,
    TracedLengths,
)
from loadtests.target import UNKNOWN_LIMIT, Target
from loadtests.workload import Cutter, body

OVERHEAD_SECONDS = 0.5  # of a block, beside its requests: prompts, two scrapes
GUESSED_SECONDS = 1.0  # of a request, where the server tells no forecast


@dataclass(frozen=True)
class Planned:
    """One block to run."""

    cell: Cell
    repeat: int
    streams: tuple[Stream, ...]
    seconds: float
    min_requests: int = 0
    requests: int | None = None  # of an open loop; None: what fits into `seconds`

    @property
    def rate(self) -> float | None:
        """Requests a second of all open loops together; None where a trace decides."""
        if any(isinstance(stream.arrivals, Replay) for stream in self.streams):
            return None
        return sum(getattr(stream.arrivals, "rate", 0.0) for stream in self.streams)

    @property
    def rng(self) -> np.random.Generator:
        """The block's own source of chance but for the seed: equal blocks draw equally, whatever runs before them."""
        digest = hashlib.sha256(f"{self.cell.key}#{self.repeat}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def blocks(scenario: Sweep | Mixed | Soak) -> list[Planned]:
    """Every repeat of every cell; each repeat goes through all cells, in an order of its own."""
    rng = np.random.default_rng(scenario.seed)
    found: list[Planned] = []
    for repeat in range(scenario.repeats):
        cells = _cells(scenario, repeat)
        found += [cells[place] for place in rng.permutation(len(cells))]
    return found


def _cells(scenario: Sweep | Mixed | Soak, repeat: int) -> list[Planned]:
    backends = scenario.backends or ("",)
    if isinstance(scenario, Sweep):
        return [
            Planned(
                cell_of(backend, each, load),
                repeat,
                (Stream(api=scenario.api, lengths=each, output_tokens=scenario.output_tokens, arrivals=load),),
                scenario.seconds,
                scenario.min_requests,
            )
            for backend in backends
            for each in columns(scenario.lengths)
            for load in scenario.loads
        ]
    if isinstance(scenario, Soak):
        stream = scenario.stream
        cells = (cell_of(backend, stream.lengths, stream.arrivals) for backend in backends)
        return [Planned(cell, repeat, (stream,), scenario.seconds) for cell in cells]
    phases = {"alone": [each for each in scenario.streams if each.name == scenario.probe], "together": scenario.streams}
    told = " + ".join(f"{each.name} ({length_name(each.lengths)}, {load_name(each.arrivals)})" for each in scenario.streams)
    return [
        Planned(
            Cell(backend=backend, length="mixed", tokens=None, load=told, phase=phase), repeat, tuple(streams), scenario.seconds
        )
        for backend in backends
        for phase, streams in phases.items()
    ]


def columns(given: Lengths) -> list[Lengths]:
    """A list's lengths one by one; any other law as it is."""
    if isinstance(given, ListedLengths):
        return [FixedLength(tokens=tokens) for tokens in sorted(set(given.tokens))]
    return [given]


def cell_of(backend: str, given: Lengths, load: Arrivals) -> Cell:
    tokens = given.tokens if isinstance(given, FixedLength) else None
    return Cell(backend=backend, length=length_name(given), tokens=tokens, load=load_name(load))


def length_name(given: Lengths) -> str:
    return "trace" if isinstance(given, TracedLengths) else lengths.name(given)


def load_name(load: Arrivals) -> str:
    """How a table calls a load."""
    if isinstance(load, InFlight):
        return f"{load.requests} in flight"
    if isinstance(load, Replay):
        return f"replay of {Path(load.path).name}" + (f" x{load.time_scale:g}" if load.time_scale != 1 else "")
    name = load.kind.replace("_", "-")
    return f"{name} {load.rate:g}/s"


def too_long(planned: Planned, target: Target) -> bool:
    """Whether a cell's inputs with their outputs pass what the server says it takes."""
    limit = target.max_tokens
    return limit is not None and any(
        isinstance(s.lengths, FixedLength) and s.lengths.tokens + _output(s) > limit for s in planned.streams
    )


def _output(stream: Stream) -> int:
    return 0 if stream.api == "embeddings" else stream.output_tokens


Drawn = tuple[tuple[Traffic, ...], dict[str, float]]
"""What a block sends, and the clipped share of each stream's lengths."""


async def drawn(planned: Planned, seed: int, target: Target, model: str, cutter: Cutter, ignore_eos: bool = True) -> Drawn:
    """Draw a block's schedule and cut its prompts. Raises TargetError and ScenarioError."""
    rng = np.random.default_rng((seed, int(planned.rng.integers(2**32))))
    found, clipped = [], {}
    for stream in planned.streams:
        times, tokens, outputs, clipped[stream.name] = _schedule(planned, stream, target, cutter, rng)
        asks = []
        for index, (length, output) in enumerate(zip(tokens, outputs, strict=True)):
            prompt = await cutter.prompt(length, index)
            raw = body(stream.api, model, prompt.text, output, ignore_eos)
            asks.append(
                Ask(
                    stream.name,
                    index,
                    stream.api,
                    raw,
                    length if prompt.is_exact else None,
                    None if times is None else times[index],
                )
            )
        if isinstance(stream.arrivals, InFlight):
            found.append(Traffic(stream.name, tuple(asks), stream.arrivals.requests, planned.seconds, planned.min_requests))
        else:
            found.append(Traffic(stream.name, tuple(asks)))
    return tuple(found), clipped


def _schedule(
    planned: Planned, stream: Stream, target: Target, cutter: Cutter, rng: np.random.Generator
) -> tuple[Sequence[float] | None, Sequence[int], Sequence[int], float]:
    """Send times (None in a closed loop), input and output tokens, and the share of inputs that was clipped."""
    limit = (target.max_tokens or UNKNOWN_LIMIT) - _output(stream)
    if isinstance(stream.arrivals, Replay):
        return _replayed(planned, stream, stream.arrivals, limit, rng)
    if isinstance(stream.arrivals, InFlight):
        times, count = None, cutter.distinct
    else:
        times = _times(planned, stream.arrivals, rng)
        count = len(times)
    assert not isinstance(stream.lengths, TracedLengths), "the scenario lets a trace's lengths come with its arrivals only"
    drawn = lengths.draw(stream.lengths, count, limit, rng)
    return times, drawn.tokens, (stream.output_tokens,) * count, drawn.clipped_share


def _times(planned: Planned, law: arrivals.Open, rng: np.random.Generator) -> Sequence[float]:
    if planned.requests is not None:
        assert isinstance(law, Poisson), "a number of requests is asked for by the capacity search, which is Poisson"
        return arrivals.draw_count(law.rate, planned.requests, rng)
    return arrivals.draw(law, planned.seconds, rng)


def _replayed(
    planned: Planned, stream: Stream, replay: Replay, limit: int, rng: np.random.Generator
) -> tuple[Sequence[float], Sequence[int], Sequence[int], float]:
    rows = [row for row in trace.read(Path(replay.path), replay.time_scale) if row.at < planned.seconds]
    times = [row.at for row in rows]
    if not isinstance(stream.lengths, TracedLengths):
        drawn = lengths.draw(stream.lengths, len(rows), limit, rng)
        return times, drawn.tokens, (stream.output_tokens,) * len(rows), drawn.clipped_share
    kept = [max(1, min(row.input_tokens, limit + stream.output_tokens - row.output_tokens)) for row in rows]
    clipped = sum(mine != row.input_tokens for mine, row in zip(kept, rows, strict=True))
    return times, kept, [row.output_tokens for row in rows], clipped / len(rows)


def estimate(planned: Planned, warm_up: int, seconds_of: Callable[[Stream], float]) -> float:
    """Seconds that a block will take; `seconds_of` tells what one request of a stream takes alone."""
    total = OVERHEAD_SECONDS
    lasting = [0.0]
    for stream in planned.streams:
        one = seconds_of(stream)
        total += warm_up * one
        if isinstance(stream.arrivals, InFlight):
            lasting.append(max(planned.seconds, planned.min_requests * one) + one)
        else:
            rate = getattr(stream.arrivals, "rate", None)
            lasting.append((planned.requests / rate if planned.requests and rate else planned.seconds) + one)
    return total + max(lasting)


def searched(scenario: Capacity) -> list[tuple[str, Lengths]]:
    """The cells of a capacity search, in random order."""
    found = [(backend, each) for backend in scenario.backends or ("",) for each in columns(scenario.lengths)]
    order = np.random.default_rng(scenario.seed).permutation(len(found))
    return [found[place] for place in order]
