"""Two reports of the same scenario: the ratio of their medians cell by cell, with its interval."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from loadtests import result, statistics
from loadtests.faults import ScenarioError
from loadtests.result import Report
from loadtests.statistics import Interval
from loadtests.verdict import seconds

TOLERANCE = 0.05  # that the second may be slower without being a regression


@dataclass(frozen=True)
class Compared:
    """One cell's stream in both reports; `ratio` is the second median over the first."""

    name: str
    before: float
    after: float
    ratio: Interval

    def is_regression(self, tolerance: float) -> bool:
        """Slower by more than the tolerance, with all of the interval."""
        return self.ratio.low > 1 + tolerance

    def is_gain(self, tolerance: float) -> bool:
        return self.ratio.high < 1 - tolerance


def add_to(commands: Any) -> None:
    """The subcommand."""
    help = "two reports cell by cell; exit status 1 where the second is slower"
    command: argparse.ArgumentParser = commands.add_parser("compare", help=help, description=help)
    command.set_defaults(run=run)
    command.add_argument("before", type=Path)
    command.add_argument("after", type=Path)
    command.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help=f"slower by this share is allowed (default {TOLERANCE})"
    )


def run(options: argparse.Namespace) -> int:
    """Print the comparison; 1 for a regression, 3 where a report is not valid."""
    before, after = result.load(options.before), result.load(options.after)
    found = compared(before, after)
    console = Console(soft_wrap=True)
    console.print(_table(found, options.tolerance))
    for path, report in ((options.before, before), (options.after, after)):
        if not report.valid:
            console.print(f"! {path} is not valid: its own page says why", highlight=False)
    missing = {block.cell.told for block in before.blocks} ^ {block.cell.told for block in after.blocks}
    for name in sorted(missing):
        console.print(f"! in one report only: {name}", highlight=False)
    worse = [each for each in found if each.is_regression(options.tolerance)]
    console.print(f"{len(worse)} regressions in {len(found)} cells", highlight=False)
    return 1 if worse else 0 if before.valid and after.valid else 3


def compared(before: Report, after: Report) -> list[Compared]:
    """Every cell and stream that both have. Raises ScenarioError when they share none."""
    old, new = result.by_cell(before.blocks), result.by_cell(after.blocks)
    rng = np.random.default_rng(int(before.scenario.get("seed", 1)))
    found = []
    for key in (key for key in old if key in new):
        for stream in old[key][0].streams:
            ours, theirs = result.samples(old[key], stream), result.samples(new[key], stream)
            if ours and theirs:
                medians = [float(np.median(np.concatenate(each))) for each in (ours, theirs)]
                draws = statistics.medians(theirs, rng) / statistics.medians(ours, rng)
                name = old[key][0].cell.told + (f", {stream}" if len(old[key][0].streams) > 1 else "")
                found.append(Compared(name, medians[0], medians[1], statistics.interval(medians[1] / medians[0], draws)))
    if not found:
        raise ScenarioError("the reports share no cell: same scenario, backends, lengths and loads are needed")
    return found


def _table(found: list[Compared], tolerance: float) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("cell", "before", "after", "after/before (95%)", ""):
        table.add_column(name, justify="left" if name in ("cell", "") else "right")
    for each in found:
        word = "REGRESSION" if each.is_regression(tolerance) else "faster" if each.is_gain(tolerance) else ""
        ratio = f"{each.ratio.value:.3f} ({each.ratio.low:.3f} to {each.ratio.high:.3f})"
        table.add_row(each.name, seconds(each.before), seconds(each.after), ratio, word)
    return table
