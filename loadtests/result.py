"""The report file: everything that was measured, versioned, one JSON. Every table and plot is computed from it alone."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from loadtests.faults import ScenarioError
from loadtests.measures import Distribution, Gate, Kept, StreamMeasures
from loadtests.scrape import ServerView

VERSION = 1
LIBRARIES = ("httptools", "numpy", "scipy", "hdrhistogram")


class Cell(Kept):
    """One combination of what a scenario varies."""

    backend: str  # empty: the model as it is served
    length: str  # tokens, or the name of a law
    tokens: int | None  # where every input has the same number
    load: str
    phase: str = ""  # of mixed traffic: alone, together

    @property
    def key(self) -> str:
        return " | ".join(part for part in (self.backend, self.length, self.load, self.phase) if part)

    @property
    def told(self) -> str:
        """The cell in words."""
        length = f"{self.tokens:,} tokens" if self.tokens else self.length
        return ", ".join(part for part in (self.backend, length, self.load, self.phase) if part)


class Block(Kept):
    """One repeat of one cell."""

    cell: Cell
    repeat: int
    started: str  # ISO 8601
    seconds: float
    streams: dict[str, StreamMeasures]
    lag: Distribution
    gates: tuple[Gate, ...]
    server: ServerView | None
    load_average: tuple[float, float]  # of one minute, before and after
    processes: int
    partial: bool = False  # interrupted


class Probe(Kept):
    """One rate that a capacity search tried."""

    rate: float
    good: int
    count: int
    kept: bool
    decided: bool  # the interval of the share lies on one side of the wanted one


class Search(Kept):
    """The highest rate that keeps the service level in one cell; None: not even the lowest that was tried."""

    cell: Cell
    probes: tuple[Probe, ...]
    rate: float | None


class Report(Kept):
    """One run."""

    version: Literal[1] = 1
    kind: Literal["sweep", "capacity", "mixed", "soak"]
    name: str
    started: str
    finished: str
    scenario: dict[str, Any]
    fingerprint: str  # of the scenario
    url: str
    model: str
    info: dict[str, Any]  # what the server tells of itself
    max_tokens: int | None
    tokens_by: str
    machine: dict[str, Any]
    blocks: tuple[Block, ...] = ()
    searches: tuple[Search, ...] = ()
    notes: tuple[str, ...] = ()
    interrupted: bool = False

    @property
    def failed_gates(self) -> list[tuple[Block, Gate]]:
        return [(block, gate) for block in self.blocks for gate in block.gates if not gate.passed]

    @property
    def valid(self) -> bool:
        """Whether the figures may be believed: the generator kept its schedule, and the server counted what it did."""
        return bool(self.blocks) and not self.failed_gates

    @property
    def failed_requests(self) -> int:
        """Requests without a good answer, refusals of a busy server and the interrupted ones left out."""
        return sum(
            count
            for block in self.blocks
            for stream in block.streams.values()
            for outcome, count in stream.outcomes.items()
            if outcome not in ("ok", "refused", "cancelled", "not_sent")
        )


def machine() -> dict[str, Any]:
    """The machine the generator runs on; with a server on loopback, the server's too."""
    return {
        "cpu": _first(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def _first(path: Path, key: str) -> str | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def save(report: Report, path: Path) -> None:
    """Write the file so that a reader finds either the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(report.model_dump_json(indent=1))
    fresh.replace(path)


def load(path: Path) -> Report:
    """Read a report file. Raises ScenarioError for one that is none, or of another version."""
    try:
        return Report.model_validate_json(path.read_text())
    except OSError as error:
        raise ScenarioError(f"{path}: {error.strerror}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        fault = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        place = ".".join(map(str, fault["loc"]))
        raise ScenarioError(f"{path}: no report of version {VERSION}: {place} {fault['msg']}") from error


def by_cell(blocks: Iterable[Block]) -> dict[str, list[Block]]:
    """The repeats of each cell, cells in the order in which a table shows them."""
    found: dict[str, list[Block]] = {}
    for block in sorted(blocks, key=lambda each: (each.cell.tokens or 0, each.cell.length, each.repeat)):
        found.setdefault(block.cell.key, []).append(block)
    return found


def samples(blocks: Sequence[Block], stream: str, measure: str = "latency") -> list[Any]:
    """Each repeat's samples of a measure in seconds, repeats without any left out."""
    found = [getattr(block.streams[stream], measure).values() for block in blocks if stream in block.streams]
    return [each for each in found if len(each)]
