"""What a run leaves behind: report.html, report.csv, the table on the terminal, the README's table and plot."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loadtests import canvas, page, plots
from loadtests.analysis import Analysis, Row, analyse
from loadtests.measures import quantile
from loadtests.quality import Quality
from loadtests.result import Report
from loadtests.verdict import Verdict, mebibytes, seconds, span, verdict

QUANTILES = (0.5, 0.9, 0.95, 0.99)


def publish(report: Report, folder: Path, quality: Quality | None, console: Console) -> None:
    """Write the page and the CSV beside the report file; print the table, the verdict and where the page is."""
    found = analyse(report)
    (folder / "report.html").write_text(page.render(report, found, quality))
    with (folder / "report.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        writer.writerows(_csv_row(row) for row in found.rows)
    _print(report, found, verdict(report, found, quality), folder / "report.html", console)


CSV_COLUMNS = (
    *("backend", "length", "load", "phase", "stream", "repeats", "requests", "answered"),
    *("median_seconds", "median_low_seconds", "median_high_seconds", "p90_seconds", "p95_seconds", "p99_seconds"),
    *("first_token_median_seconds", "per_output_token_median_seconds", "requests_per_second"),
    *(
        "input_tokens_per_second",
        "output_tokens_per_second",
        "good_share",
        "reserved_bytes",
        "measured_bytes",
        "measured_peak_bytes",
    ),
)


def _csv_row(row: Row) -> tuple[object, ...]:
    median = (row.median.value, row.median.low, row.median.high) if row.median else (None, None, None)
    return (
        *(row.cell.backend, row.cell.length, row.cell.load, row.cell.phase, row.stream, row.repeats, row.count, row.ok),
        *(*median, *(quantile(row.latency, share) for share in QUANTILES[1:])),
        *(quantile(row.first_token, 0.5), quantile(row.per_output_token, 0.5), row.requests_per_second),
        *(row.input_tokens_per_second, row.output_tokens_per_second, row.good.value if row.good else None),
        *(row.reserved_bytes, row.measured_bytes, row.measured_peak_bytes),
    )


def _print(report: Report, found: Analysis, told: Verdict, path: Path, console: Console) -> None:
    console.print(_table(report, found))
    for line in (told.headline, *told.facts):
        console.print(f"- {line}", highlight=False, markup=False)
    for line in told.doubts:
        console.print(f"! {line}", highlight=False, markup=False)
    console.print(f"{told.validity}: {path}", highlight=False, markup=False)


def _table(report: Report, found: Analysis) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    several = len({row.stream for row in found.rows}) > 1
    names = ("backend", "length", "load", *(("stream",) if several else ()))
    for name in (*names, "answered", "median", "95%", "p95", "requests/s", "reserved"):
        table.add_column(name, justify="left" if name in ("backend", "load", "stream") else "right", no_wrap=True)
    for row in found.rows:
        median, between = (seconds(row.median.value), span(row.median)) if row.median else ("-", "-")
        cells = [
            row.cell.backend or report.model,
            row.cell.length,
            row.cell.phase or row.cell.load,
            *([row.stream] if several else []),
        ]
        cells += [
            f"{row.ok}/{row.count}",
            median,
            between,
            seconds(quantile(row.latency, 0.95)),
            f"{row.requests_per_second:.3g}",
        ]
        table.add_row(*cells, mebibytes(row.reserved_bytes))
    return table


def markdown(report: Report, quality: Quality | None) -> str:
    """The sweep's table for a README: a line a backend, latency and reserved bytes by length, requests one at a time."""
    found = analyse(report)
    load = found.loads[0] if found.loads else ""
    lengths = sorted({row.cell.tokens for row in found.rows if row.cell.tokens})
    shown = [tokens for tokens in (512, 2048, 4096, 8192, 16384, 32768) if tokens in lengths] or lengths
    head = [
        "backend",
        *(f"{_short(tokens)} tokens" for tokens in shown),
        f"memory at {_short(shown[-1])}" if shown else "memory",
    ]
    head += ["requests/s at most"] + (["bits/byte", "needles found"] if quality else [])
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for backend in found.backends:
        rows = {row.cell.tokens: row for row in found.rows_of(backend, load)}
        cells = [seconds(rows[tokens].median.value) if tokens in rows and rows[tokens].median else "-" for tokens in shown]  # type: ignore[union-attr]
        last = rows.get(shown[-1]) if shown else None
        cells += [mebibytes(last.reserved_bytes if last else None), _best(found, backend, shown)]
        cells += _quality(quality, backend, shown) if quality else []
        lines.append(f"| `{backend or report.model}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _best(found: Analysis, backend: str, shown: Sequence[int]) -> str:
    rates = [row.requests_per_second for row in found.rows if row.cell.backend == backend and row.cell.tokens == shown[-1]]
    return f"{max(rates):.2g}" if rates else "-"


def _quality(quality: Quality, backend: str, shown: Sequence[int]) -> list[str]:
    bits, needles = quality.bits_per_byte.get(backend, {}), quality.needle_recall.get(backend, {})
    tokens = max((each for each in bits if each <= shown[-1]), default=None)
    if tokens is None:
        return ["-", "-"]
    return [f"{bits[tokens]:.2f}", f"{needles[tokens]:.0%}" if tokens in needles else "-"]


def write_plot(report: Report, path: Path) -> None:
    """The plot of latency and reserved bytes against length, as an SVG that suits light and dark pages by itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(canvas.standalone(plots.readme(analyse(report), report)))
