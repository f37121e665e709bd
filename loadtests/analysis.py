"""What a report's blocks say together: a row for each cell, growth by length, crossovers, head-of-line blocking, leaks.

Everything is computed from the report file, with chance seeded by its scenario, so the same file gives the same page.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loadtests import measures, result, statistics
from loadtests.result import Block, Cell, Report
from loadtests.statistics import Crossover, Interval

SETTLING = 5  # of a soak's time, one part in so many is left out of the fit of its growth: a server warms up
LONG_LENGTHS = 3  # the longest so many lengths tell how a cost grows: short inputs are all overhead


@dataclass(frozen=True)
class Row:
    """One stream of one cell over all its repeats."""

    cell: Cell
    stream: str
    repeats: int
    outcomes: dict[str, int]
    latency: np.ndarray  # seconds, of all whole answers
    median: Interval | None  # None: not one answer
    variation: float | None  # of the repeats' medians
    first_token: np.ndarray
    per_output_token: np.ndarray
    seconds: float  # of sending and answering, all repeats
    prompt_tokens: int
    output_tokens: int
    tokens_off: int
    good: Interval | None  # share within the service level
    good_count: int
    reserved_bytes: int | None  # most of one request, by its receipt
    measured_bytes: int | None  # likewise; None: no request of the cell was measured
    measured_peak_bytes: float | None
    measured_steps: int
    server_seconds: float | None  # median of what the receipts' phases add up to
    clipped_share: float

    @property
    def count(self) -> int:
        return sum(self.outcomes.values())

    @property
    def ok(self) -> int:
        return self.outcomes.get("ok", 0)

    @property
    def requests_per_second(self) -> float:
        return self.ok / self.seconds if self.seconds else 0.0

    @property
    def input_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.seconds if self.seconds else 0.0

    @property
    def output_tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Growth:
    """How one backend's latency and bytes grow with length under one load."""

    backend: str
    load: str
    latency: Interval | None  # exponent over the longest lengths
    bytes_exponent: float | None
    bytes_per_token: Interval | None
    from_tokens: int  # the shortest length of the fits


@dataclass(frozen=True)
class Crossing:
    """Where `second` becomes faster than `first` for good."""

    first: str
    second: str
    load: str
    at: Crossover
    ratio: Interval  # latency of `first` over that of `second` at the longest length
    longest: int


@dataclass(frozen=True)
class Blocking:
    """The probe's latency alone and beside the others, under one backend."""

    backend: str
    alone: Row
    together: Row
    ratio: Interval  # of medians


@dataclass(frozen=True)
class Leak:
    """Growth of the server's resident memory in a soak."""

    backend: str
    bytes_per_hour: Interval
    seconds: float
    levels: tuple[tuple[float, float], ...]  # seconds, bytes


@dataclass(frozen=True)
class Analysis:
    """All of it."""

    rows: list[Row]
    growths: list[Growth]
    crossings: list[Crossing]
    blockings: list[Blocking]
    leaks: list[Leak]

    def rows_of(self, backend: str, load: str) -> list[Row]:
        """A backend's answered rows under a load, by length."""
        found = [r for r in self.rows if (r.cell.backend, r.cell.load) == (backend, load) and r.cell.tokens and r.median]
        return sorted(found, key=lambda row: row.cell.tokens or 0)

    @property
    def backends(self) -> list[str]:
        return list(dict.fromkeys(row.cell.backend for row in self.rows))

    @property
    def loads(self) -> list[str]:
        return list(dict.fromkeys(row.cell.load for row in self.rows if row.cell.tokens))


class Samples:
    """Resampled medians of each cell's latency, drawn once."""

    def __init__(self, report: Report) -> None:
        self._cells = result.by_cell(report.blocks)
        self._seed = int(report.scenario.get("seed", 1))
        self._known: dict[tuple[str, str], np.ndarray] = {}

    def draws(self, cell: Cell, stream: str) -> np.ndarray:
        """(draws,) medians."""
        place = (cell.key, stream)
        if place not in self._known:
            repeats = result.samples(self._cells[cell.key], stream)
            rng = np.random.default_rng((self._seed, *cell.key.encode(), *stream.encode()))
            self._known[place] = statistics.medians(repeats, rng)
        return self._known[place]


def analyse(report: Report) -> Analysis:
    """Read a report."""
    samples = Samples(report)
    order = list(report.scenario.get("backends") or ("",))
    loads = list(dict.fromkeys(block.cell.load for block in sorted(report.blocks, key=_load_order)))
    rows = [row for blocks in result.by_cell(report.blocks).values() for row in _rows(blocks, samples)]
    rows.sort(key=lambda r: (order.index(r.cell.backend), loads.index(r.cell.load), r.cell.tokens or 0, r.cell.phase))
    found = Analysis(rows, [], [], [], [])
    if report.kind == "sweep":
        found.growths.extend(_growths(found, samples))
        found.crossings.extend(_crossings(found, samples))
    if report.kind == "mixed":
        found.blockings.extend(_blockings(found, samples, str(report.scenario["probe"])))
    if report.kind == "soak":
        found.leaks.extend(_leaks(report.blocks))
    return found


def _load_order(block: Block) -> tuple[bool, float, str]:
    """Closed loops first, then rates, each as people count: 4 in flight before 16."""
    number = re.search(r"\d+(\.\d+)?", block.cell.load)
    return "in flight" not in block.cell.load, float(number[0]) if number else 0.0, block.cell.load


def _rows(blocks: Sequence[Block], samples: Samples) -> list[Row]:
    return [_row(blocks, name, samples) for name in blocks[0].streams]


def _row(blocks: Sequence[Block], name: str, samples: Samples) -> Row:
    cell, parts = blocks[0].cell, [block.streams[name] for block in blocks]
    repeats = result.samples(blocks, name)
    latency = measures.pooled(part.latency for part in parts)
    median = statistics.interval(float(np.median(latency)), samples.draws(cell, name)) if repeats else None
    good = [part.good for part in parts if part.good is not None]
    count = sum(part.count for part in parts)
    views = [block.server for block in blocks if block.server and block.server.measured_peak_bytes is not None]
    return Row(
        cell=cell,
        stream=name,
        repeats=len(blocks),
        outcomes=_added([part.outcomes for part in parts]),
        latency=latency,
        median=median,
        variation=statistics.variation(repeats),
        first_token=measures.pooled(part.first_token for part in parts),
        per_output_token=measures.pooled(part.per_output_token for part in parts),
        seconds=sum(part.seconds for part in parts),
        prompt_tokens=sum(part.prompt_tokens for part in parts),
        output_tokens=sum(part.output_tokens for part in parts),
        tokens_off=sum(part.tokens_off for part in parts),
        good=statistics.wilson(sum(good), count) if good and count else None,
        good_count=sum(good),
        reserved_bytes=max((part.reserved_bytes[1] for part in parts if part.reserved_bytes), default=None),
        measured_bytes=max((part.measured_bytes[1] for part in parts if part.measured_bytes), default=None),
        measured_peak_bytes=_mean([(v.measured_peak_bytes or 0.0, v.measured_steps) for v in views]),
        measured_steps=sum(view.measured_steps for view in views),
        server_seconds=_server_seconds(parts),
        clipped_share=float(np.mean([part.clipped_share for part in parts])),
    )


def _added(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    return {name: sum(each.get(name, 0) for each in counts) for name in sorted({name for each in counts for name in each})}


def _mean(pairs: Sequence[tuple[float, int]]) -> float | None:
    weight = sum(count for _, count in pairs)
    return sum(value * count for value, count in pairs) / weight if weight else None


def _server_seconds(parts: Sequence[measures.StreamMeasures]) -> float | None:
    """The sum of the phases' medians: queue, prefill, decode."""
    phases = {name for part in parts for name in part.server}
    medians = [np.median(measures.pooled(part.server[name] for part in parts if name in part.server)) for name in phases]
    return float(sum(medians)) if medians else None


def _growths(found: Analysis, samples: Samples) -> list[Growth]:
    growths = []
    for backend, load in itertools.product(found.backends, found.loads):
        rows = found.rows_of(backend, load)[-LONG_LENGTHS:]
        if len(rows) < LONG_LENGTHS:
            continue
        tokens = [float(row.cell.tokens or 0) for row in rows]
        drawn = np.stack([samples.draws(row.cell, row.stream) for row in rows], axis=1)
        latency = statistics.exponent(tokens, [row.median.value for row in rows if row.median], drawn)
        sizes = [row.reserved_bytes for row in rows if row.reserved_bytes]
        whole = len(sizes) == len(rows)
        growths.append(
            Growth(
                backend,
                load,
                latency,
                float(np.polyfit(np.log(tokens), np.log(sizes), 1)[0]) if whole else None,
                statistics.slope(tokens, sizes) if whole else None,
                int(tokens[0]),
            )
        )
    return growths


def _crossings(found: Analysis, samples: Samples) -> list[Crossing]:
    """Each other backend against the first that the scenario names."""
    crossings = []
    for second, load in itertools.product(found.backends[1:], found.loads):
        first = found.backends[0]
        mine = {row.cell.tokens: row for row in found.rows_of(first, load)}
        theirs = {row.cell.tokens: row for row in found.rows_of(second, load)}
        shared = sorted(tokens for tokens in mine.keys() & theirs.keys() if tokens)
        if len(shared) < 2:
            continue

        def medians(rows: dict[int | None, Row], shared: Sequence[int] = shared) -> tuple[np.ndarray, np.ndarray]:
            chosen = [rows[tokens] for tokens in shared]
            values = np.array([row.median.value for row in chosen if row.median])
            return values, np.stack([samples.draws(row.cell, row.stream) for row in chosen], axis=1)

        (a, a_draws), (b, b_draws) = medians(mine), medians(theirs)
        at = statistics.crossover(shared, a, b, a_draws, b_draws)
        ratio = statistics.interval(float(a[-1] / b[-1]), a_draws[:, -1] / b_draws[:, -1])
        crossings.append(Crossing(first, second, load, at, ratio, shared[-1]))
    return crossings


def _blockings(found: Analysis, samples: Samples, probe: str) -> list[Blocking]:
    rows = {(row.cell.backend, row.cell.phase): row for row in found.rows if row.stream == probe and row.median}
    blockings = []
    for backend in found.backends:
        alone, together = rows.get((backend, "alone")), rows.get((backend, "together"))
        if alone is None or together is None:
            continue
        assert alone.median and together.median, "rows without an answer were left out"
        draws = samples.draws(together.cell, probe) / samples.draws(alone.cell, probe)
        blockings.append(
            Blocking(backend, alone, together, statistics.interval(together.median.value / alone.median.value, draws))
        )
    return blockings


def _leaks(blocks: Sequence[Block]) -> list[Leak]:
    found = []
    for block in blocks:
        levels = [(each.seconds, each.resident_bytes) for each in block.server.levels] if block.server else []
        if len(levels) < 3:
            continue
        seconds, resident = zip(*levels[len(levels) // SETTLING :], strict=True)
        slope = statistics.growth(seconds, resident)
        hourly = Interval(slope.value * 3600, slope.low * 3600, slope.high * 3600)
        found.append(Leak(block.cell.backend, hourly, levels[-1][0], tuple(levels)))
    return found


def longest_good(found: Analysis, backend: str, load: str, attainment: float) -> int | None:
    """The longest length up to which every measured one keeps the service level under a load; None: not even the shortest."""
    longest = None
    for row in found.rows_of(backend, load):
        if row.good is None or row.good.value < attainment:
            break
        longest = row.cell.tokens
    return longest
