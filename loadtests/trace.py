"""Traces of real traffic, replayed: CSV or JSONL, by the columns they are published with.

| trace    | time                         | input            | output            |
| Azure    | TIMESTAMP (date and time)    | ContextTokens    | GeneratedTokens   |
| Mooncake | timestamp (milliseconds)     | input_length     | output_length     |
| BurstGPT | Timestamp (seconds)          | Request tokens   | Response tokens   |
| plain    | at (seconds)                 | input_tokens     | output_tokens     |
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtests.faults import ScenarioError


@dataclass(frozen=True)
class Arrival:
    """One request of a trace."""

    at: float  # seconds from the first
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Columns:
    """Where a trace's format keeps what is needed; `unit` is seconds per unit of its time, None for a date and time."""

    time: str
    input: str
    output: str
    unit: float | None


FORMATS = (
    Columns("TIMESTAMP", "ContextTokens", "GeneratedTokens", None),
    Columns("timestamp", "input_length", "output_length", 0.001),
    Columns("Timestamp", "Request tokens", "Response tokens", 1.0),
    Columns("at", "input_tokens", "output_tokens", 1.0),
)


def read(path: Path, time_scale: float = 1.0) -> list[Arrival]:
    """A trace's requests in order, the first at 0, all times multiplied by `time_scale`. Raises ScenarioError."""
    try:
        rows = list(_rows(path))
    except OSError as error:
        raise ScenarioError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ScenarioError(f"{path}: {error}") from error
    if not rows:
        raise ScenarioError(f"{path}: the trace has no rows")
    columns = _columns(path, rows[0][1])
    read = sorted((_arrival(f"{path}, line {line}", row, columns) for line, row in rows), key=lambda each: each.at)
    return [Arrival((each.at - read[0].at) * time_scale, each.input_tokens, each.output_tokens) for each in read]


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Each row with its line number."""
    with path.open(newline="") as file:
        if path.suffix == ".csv":
            yield from enumerate(csv.DictReader(file), start=2)
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _object(f"{path}, line {number}", line)


def _object(where: str, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ScenarioError(f"{where}: no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ScenarioError(f"{where}: must be an object, received {type(row).__name__}")
    return row


def _columns(path: Path, row: Mapping[str, Any]) -> Columns:
    for columns in FORMATS:
        if {columns.time, columns.input, columns.output} <= row.keys():
            return columns
    known = "; ".join(f"{each.time}, {each.input}, {each.output}" for each in FORMATS)
    raise ScenarioError(f"{path}: needs the columns of one of {known}; received {', '.join(map(str, row))}")


def _arrival(where: str, row: Mapping[str, Any], columns: Columns) -> Arrival:
    try:
        at = _seconds(row[columns.time], columns.unit)
        tokens, output = int(row[columns.input]), int(row[columns.output])
    except (KeyError, TypeError, ValueError) as error:
        raise ScenarioError(f"{where}: no time and two numbers of tokens: {dict(row)!r:.200}") from error
    if tokens < 1 or output < 0:
        raise ScenarioError(f"{where}: {columns.input} must be at least 1 and {columns.output} at least 0: {dict(row)!r:.200}")
    return Arrival(at, tokens, max(output, 1))


def _seconds(value: Any, unit: float | None) -> float:
    if unit is not None:
        return float(value) * unit
    whole, _, fraction = str(value).partition(".")  # Azure's has seven digits, which datetime does not read
    moment = datetime.fromisoformat(whole)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return moment.timestamp() + float(f"0.{fraction.split('+')[0].rstrip('Z') or 0}")
