"""One self-contained page: no script, no network, readable as text, in light and dark. The verdict comes first.

The template is `page/report.html`, its looks `page/style.css`; here stand the numbers it shows, as words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from loadtests import canvas, plots
from loadtests.analysis import Analysis, Row
from loadtests.client import MEANINGS, Outcome
from loadtests.measures import FEW_FOR_P99, quantile
from loadtests.quality import Quality
from loadtests.result import Report
from loadtests.verdict import mebibytes, seconds, span, verdict

FOLDER = Path(__file__).with_name("page")


@dataclass(frozen=True)
class Grid:
    """A table as the template draws it: words throughout; the first `names` columns are names, the rest numbers."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    names: int = 1
    folded: bool = False


def render(report: Report, found: Analysis, quality: Quality | None) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bound"] = bound
    drawn = plots.all_of(found, report, quality)
    return environment.get_template("report.html").render(
        report=report,
        verdict=verdict(report, found, quality),
        style=Markup(_style()),
        plots=[(each, Markup(each.svg)) for each in drawn],
        glance=_glance(report, found, quality),
        grids=[grid for grid in _grids(report, found) if grid.rows],
        facts=_facts(report),
        gates=_gates(report),
    )


def bound(text: str) -> str:
    """The text with its numbers kept on the line of their units."""
    return re.sub(r"(\d) (ms|s|MiB|tokens|times|an hour)\b", "\\1\u00a0\\2", text)


def _style() -> str:
    """The style sheet, its colours those of the plots."""

    light = canvas.variables(canvas.LIGHT, canvas.SERIES_LIGHT)
    dark = canvas.variables(canvas.DARK, canvas.SERIES_DARK)
    colors = f":root{{color-scheme:light dark;--font:{canvas.FONT};{light}}}"
    colors += f"@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return colors + (FOLDER / "style.css").read_text()


def _name(backend: str, report: Report) -> str:
    return backend or report.model


def _glance(report: Report, found: Analysis, quality: Quality | None) -> Grid | None:
    """A sweep at one look: a line a length, a column a backend."""
    if report.kind != "sweep" or not found.loads:
        return None
    load = found.loads[0]
    rows = {backend: {row.cell.tokens: row for row in found.rows_of(backend, load)} for backend in found.backends}
    lengths = sorted({tokens for each in rows.values() for tokens in each if tokens})
    lines = [(f"{tokens:,}", *(_median(rows[backend].get(tokens)) for backend in found.backends)) for tokens in lengths]
    head = ("tokens", *(_name(backend, report) for backend in found.backends))
    told = [f"Median latency with its 95% interval, {load}."]
    if quality:
        told.append(f"Quality is read from {Path(quality.source).name}, not measured here.")
    return Grid("At one look", head, lines, " ".join(told))


def _median(row: Row | None) -> str:
    return "-" if row is None or row.median is None else f"{seconds(row.median.value)}\n{span(row.median)}"


def _grids(report: Report, found: Analysis) -> list[Grid]:
    return [
        _crossovers(found),
        _growth(report, found),
        _goodput(report, found),
        _probes(report),
        _latencies(report, found),
        _streams(report, found),
        _server(report, found),
        _failures(report),
    ]


def _crossovers(found: Analysis) -> Grid:
    rows = []
    for each in found.crossings:
        at = each.at
        where = (
            f"{at.tokens.value:,.0f} ({at.tokens.low:,.0f} to {at.tokens.high:,.0f})"
            if at.tokens
            else "always"
            if at.always
            else "never"
        )
        ratio = f"{each.ratio.value:.2f} ({each.ratio.low:.2f} to {each.ratio.high:.2f})"
        rows.append((f"{each.second} over {each.first}", each.load, where, f"{at.certainty:.0%}", ratio))
    head = ("pair", "load", "faster from (tokens)", "resamples that agree", "times as fast at the longest")
    note = (
        "From this length on the second stays faster, between measured lengths by straight lines in logarithms. "
        "The last column is the first's median over the second's."
    )
    return Grid("Crossover lengths", head, rows, note, names=2)


def _growth(report: Report, found: Analysis) -> Grid:
    rows = []
    for each in found.growths:
        power = f"{each.latency.value:.2f} ({each.latency.low:.2f} to {each.latency.high:.2f})" if each.latency else "-"
        slope = each.bytes_per_token
        per_token = f"{slope.value:,.0f} ({slope.low:,.0f} to {slope.high:,.0f})" if slope else "-"
        power_of_bytes = "-" if each.bytes_exponent is None else f"{each.bytes_exponent:.2f}"
        rows.append((_name(each.backend, report), each.load, power, power_of_bytes, per_token, f"{each.from_tokens:,}"))
    head = ("backend", "load", "latency grows as n to the", "bytes as n to the", "bytes per token", "fitted from (tokens)")
    return Grid(
        "How costs grow with length",
        head,
        rows,
        "Fitted through the three longest lengths; shorter ones are mostly overhead.",
        names=2,
    )


def _goodput(report: Report, found: Analysis) -> Grid:
    rows = []
    for row in found.rows:
        if row.good is not None:
            share = f"{row.good.value:.1%} ({row.good.low:.1%} to {row.good.high:.1%})"
            good = row.good_count / row.seconds if row.seconds else 0.0
            rows.append((*_place(row, report), share, f"{good:.3g}", f"{row.requests_per_second:.3g}"))
    head = (*PLACE, "share within the level", "good a second", "answered a second")
    note = f"The level: {'; '.join(_bounds(report))}. Failed requests are not good."
    return Grid("Goodput", head, rows, note, names=3, folded=len(rows) > 12)


def _bounds(report: Report) -> list[str]:
    level = report.scenario.get("service_level") or {}
    bounds = {what: bound for what in ("latency", "first_token") if (bound := level.get(what))}
    return [
        f"{what.replace('_', ' ')} at most {each['seconds']:g} s and {each['seconds_per_token'] * 1e3:g} ms an input token"
        for what, each in bounds.items()
    ]


PLACE = ("backend", "length", "load")


def _place(row: Row, report: Report) -> tuple[str, str, str]:
    """What names a row."""
    load = f"{row.stream} {row.cell.phase}" if row.cell.phase else row.cell.load
    return _name(row.cell.backend, report), row.cell.length, load


def _probes(report: Report) -> Grid:
    rows = []
    for search in report.searches:
        for probe in search.probes:
            verdict = ("kept" if probe.kept else "broken") + ("" if probe.decided else ", undecided")
            share = f"{probe.good} of {probe.count}"
            rows.append((_name(search.cell.backend, report), search.cell.length, f"{probe.rate:.3g}", share, verdict))
    return Grid(
        "Probes of the capacity search", ("backend", "length", "requests a second", "good", "level"), rows, names=2, folded=True
    )


def _latencies(report: Report, found: Analysis) -> Grid:
    rows = []
    for row in found.rows:
        quantiles = tuple(seconds(quantile(row.latency, share)) for share in (0.5, 0.9, 0.95, 0.99))
        spread = f"{row.variation:.1%}" if row.variation is not None else "-"
        rates = (
            f"{row.requests_per_second:.3g}",
            f"{row.input_tokens_per_second:,.0f}",
            f"{row.output_tokens_per_second:,.0f}",
        )
        rows.append((*_place(row, report), f"{row.ok} of {row.count}", *quantiles, spread, *rates))
    measured = ("p50", "p90", "p95", "p99", "between repeats", "requests/s", "input tokens/s", "output tokens/s")
    note = (
        f"Latencies from the intended send. A p99 is shown from {FEW_FOR_P99} answers on. Between repeats: standard deviation "
        "of the repeats' medians over their mean. Rates are over the time from the first send to the last answer."
    )
    return Grid("Latencies and rates of every cell", (*PLACE, "answered", *measured), rows, note, names=3, folded=True)


def _streams(report: Report, found: Analysis) -> Grid:
    rows = []
    for row in found.rows:
        if len(row.first_token):
            values = [quantile(each, share) for each in (row.first_token, row.per_output_token) for share in (0.5, 0.95)]
            rows.append((*_place(row, report), *(seconds(each) for each in values)))
    head = (*PLACE, "first token p50", "p95", "per output token p50", "p95")
    return Grid("Streams: first token and the tokens after it", head, rows, names=3)


def _server(report: Report, found: Analysis) -> Grid:
    rows = []
    for row in found.rows:
        if row.server_seconds is None and row.measured_peak_bytes is None:
            continue
        client = row.median.value if row.median else None
        gap = None if client is None or row.server_seconds is None else max(client - row.server_seconds, 0.0)
        measured = f"{mebibytes(row.measured_peak_bytes)} ({row.measured_steps})" if row.measured_peak_bytes else "-"
        cells = (_name(row.cell.backend, report), row.cell.length, row.cell.phase or row.cell.load)
        rows.append(
            (
                *cells,
                seconds(client),
                seconds(row.server_seconds),
                seconds(gap),
                mebibytes(row.reserved_bytes),
                mebibytes(row.measured_bytes),
                measured,
            )
        )
    head = (
        "backend",
        "length",
        "load",
        "client's median",
        "server's",
        "between",
        "reserved",
        "measured",
        "peak of a step (steps)",
    )
    note = (
        "The server's: medians of queue, prefill and decode by its receipts, added. Between: HTTP, tokenizing and the client "
        "itself. Reserved and measured are the most of one request, by its receipt; peaks are means over the steps that the "
        "server sampled in the cell."
    )
    return Grid("The server's view beside the client's", head, rows, note, names=3, folded=True)


def _failures(report: Report) -> Grid:
    counts: Counter[tuple[str, str, str]] = Counter()
    for block in report.blocks:
        for stream in block.streams.values():
            for failure in stream.failures:
                counts[block.cell.told, failure.outcome, failure.told] += failure.count
    rows = [
        (cell, outcome.replace("_", " "), MEANINGS[Outcome(outcome)], told, str(count))
        for (cell, outcome, told), count in counts.most_common(40)
    ]
    return Grid(
        "Requests that failed",
        ("cell", "how", "meaning", "first words", "requests"),
        rows,
        "None of these counts as an answer.",
        names=4,
    )


def _facts(report: Report) -> list[tuple[str, str]]:
    """What was measured on what, as pairs of words."""
    machine, info = report.machine, report.info
    libraries = ", ".join(f"{name} {number}" for name, number in machine["libraries"].items())
    facts = [
        (
            "Server",
            f"{report.url}, model {report.model}"
            + (f", longest input {report.max_tokens:,} tokens" if report.max_tokens else ""),
        ),
        (
            "Machine of the generator",
            f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}",
        ),
        ("Load average", f"{machine['load_average']:.2f} before the run; {_load_range(report)} during it"),
        (
            "Generator",
            f"Python {machine['python']}, {libraries}; {max((b.processes for b in report.blocks), default=1)} process(es)",
        ),
        ("Lengths counted by", report.tokens_by),
        ("Scenario", f"{report.name}, fingerprint {report.fingerprint}, seed {report.scenario['seed']}"),
        ("Run", f"{report.started} to {report.finished}, {len(report.blocks)} blocks"),
    ]
    if isinstance(info.get("versions"), dict):
        facts.insert(1, ("Software of the server", _software(info)))
    return facts


def _software(info: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in info["versions"].items())
    parts = [versions, *(f"{name} {info[name]}" for name in ("dtype", "device", "threads") if name in info)]
    return ", ".join(parts)


def _load_range(report: Report) -> str:
    loads = [load for block in report.blocks for load in block.load_average]
    return f"{min(loads):.2f} to {max(loads):.2f}" if loads else "-"


def _gates(report: Report) -> list[tuple[str, bool, str]]:
    """Each kind of gate: its name, whether all blocks passed, and how many did."""
    counts: dict[str, Counter[bool]] = {}
    for block in report.blocks:
        for gate in block.gates:
            counts.setdefault(gate.name, Counter())[gate.passed] += 1
    return [(name, not each[False], f"{each[True]} of {each.total()}") for name, each in counts.items()]
