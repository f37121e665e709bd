"""What a backend costs in quality, read from a model card: the tables that `service.training.evaluate` prints into it.

A table is a title line that begins with one of TITLES, a line of context lengths, then one line a backend. Of a backend's rows
in several tables of one title the first counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests.faults import ScenarioError

TITLES = {"bits per byte by context": "bits_per_byte", "needle recall by context": "needle_recall"}


@dataclass(frozen=True)
class Quality:
    """By backend and context length: bits per byte (fewer is better), share of needles found (more is better)."""

    source: str
    bits_per_byte: dict[str, dict[int, float]]
    needle_recall: dict[str, dict[int, float]]


def read(path: Path) -> Quality:
    """The tables of a model card. Raises ScenarioError when it holds neither."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path}: {error}") from error
    found: dict[str, dict[str, dict[int, float]]] = {name: {} for name in TITLES.values()}
    for place, line in enumerate(lines):
        for title, name in TITLES.items():
            if line.startswith(title):
                found[name] = _table(lines[place + 1 :]) | found[name]
    if not any(found.values()):
        raise ScenarioError(f"{path}: no table titled {' or '.join(repr(title) for title in TITLES)}")
    return Quality(str(path), **found)


def _table(lines: Sequence[str]) -> dict[str, dict[int, float]]:
    contexts = [int(each) for each in re.findall(r"\d+", lines[0])] if lines else []
    rows: dict[str, dict[int, float]] = {}
    for line in lines[1:]:
        name, *cells = line.split() or [""]
        if len(cells) != len(contexts) or not cells:
            break
        rows[name] = dict(zip(contexts, map(float, cells), strict=True))
    return rows
