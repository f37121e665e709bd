"""What a waiting person sees: a bar with counts and time left on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from types import TracebackType

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from loadtests.client import Outcome, Record
from loadtests.result import Block


class Live:
    """Progress of a run whose blocks' seconds are estimated beforehand."""

    def __init__(self, console: Console, blocks: int, seconds: float) -> None:
        self._console, self._blocks, self._expected = console, blocks, max(seconds, 0.1)
        self._done = self._passed = 0.0
        self._began = time.monotonic()
        self._title, self._ok, self._failed = "", 0, 0
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=self._expected, left="")

    def __enter__(self) -> Live:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def expect(self, seconds: float) -> None:
        """How long all blocks together are expected to take."""
        self._expected = max(seconds, 0.1)
        self._bar.update(self._task, total=self._expected)

    def begin(self, title: str) -> None:
        """A block begins."""
        self._title, self._ok, self._failed = title, 0, 0
        self._show()

    def heard(self, record: Record) -> None:
        """A request has ended."""
        self._ok += record.outcome is Outcome.OK
        self._failed += record.outcome is not Outcome.OK
        self._show()

    def end(self, block: Block, estimate: float) -> None:
        """A block has ended; `estimate` is what it had been expected to take."""
        self._done += 1
        self._passed += estimate
        self._bar.update(self._task, completed=self._passed)
        self.say(
            f"[{self._done:.0f}/{self._blocks}] {block.cell.told}, repeat {block.repeat + 1}: {_told(block)}; {self._left()}"
        )

    def say(self, line: str) -> None:
        """One line that stays."""
        self._console.print(line, highlight=False, markup=False)

    def _left(self) -> str:
        """Seconds left, by how the estimates have fared so far."""
        pace = (time.monotonic() - self._began) / self._passed if self._passed else 1.0
        return f"about {duration(max(self._expected - self._passed, 0.0) * pace)} left"

    def _show(self) -> None:
        failed = f", {self._failed} failed" if self._failed else ""
        self._bar.update(self._task, description=f"{self._title}: {self._ok} answered{failed}", left=self._left())


def _told(block: Block) -> str:
    parts = []
    for stream in block.streams.values():
        found = stream.latency.values()
        median = f", median {np.median(found) * 1e3:.1f} ms" if len(found) else ""
        missing = f" of {stream.count}" if stream.ok < stream.count else ""
        parts.append(f"{stream.ok}{missing} answered{median}" + (f" ({stream.name})" if len(block.streams) > 1 else ""))
    invalid = [gate.told for gate in block.gates if not gate.passed]
    return ", ".join(parts) + (f"; INVALID: {'; '.join(invalid)}" if invalid else "")


def duration(seconds: float) -> str:
    """A time span as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
