"""The plots of a report. What they are drawn on is `canvas.py`."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from loadtests.analysis import Analysis, Row
from loadtests.canvas import (
    HEIGHT,
    INK,
    LEFT,
    MUTED,
    PAPER,
    WIDTH,
    Plot,
    color,
    cost_axis,
    figure,
    label_ends,
    length_axis,
    plain_bytes,
    plain_seconds,
    short,
)
from loadtests.measures import quantile
from loadtests.quality import Quality
from loadtests.result import Report


def against_length(
    found: Analysis, load: str, value: Callable[[Row], tuple[float, float, float] | None], ends: Callable[[str], str]
) -> tuple[Figure, Axes, list[int], list[tuple[float, float, str, str]]]:
    """One line a backend with its interval as a band; what is left to do is the axes."""
    made, (axes,) = figure()
    labels: list[tuple[float, float, str, str]] = []
    lengths: set[int] = set()
    for place, backend in enumerate(found.backends):
        points = [(row.cell.tokens or 0, value(row)) for row in found.rows_of(backend, load)]
        known = [(tokens, each) for tokens, each in points if each is not None]
        if not known:
            continue
        x = [tokens for tokens, _ in known]
        middle, low, high = zip(*(each for _, each in known), strict=True)
        axes.fill_between(x, low, high, color=color(place), alpha=0.18, linewidth=0)
        axes.plot(x, middle, "o-", color=color(place))
        labels.append((x[-1], middle[-1], ends(backend), color(place)))
        lengths |= set(x)
    return made, axes, sorted(lengths), labels


def latency(found: Analysis, report: Report, load: str) -> Plot | None:
    """Median latency against length with the fitted exponents."""
    powers = {each.backend: each.latency for each in found.growths if each.load == load and each.latency}

    def end(backend: str) -> str:
        power = powers.get(backend)
        return (backend or report.model) + (f"\n~ n^{power.value:.2f}" if power else "")

    def value(row: Row) -> tuple[float, float, float] | None:
        return (row.median.value, row.median.low, row.median.high) if row.median else None

    made, axes, lengths, labels = against_length(found, load, value, end)
    if len(lengths) < 2:
        return None
    length_axis(axes, lengths)
    cost_axis(axes, f"median latency, {load}", plain_seconds)
    label_ends(axes, labels)
    since = min((each.from_tokens for each in found.growths if each.load == load), default=None)
    fits = f" Exponents are fitted from {since:,} tokens on." if since else ""
    caption = f"From the intended send to the last byte of the answer, {load}; bands are 95% intervals.{fits}"
    return Plot("latency", "Latency against length", caption, made)


def peak(found: Analysis, report: Report, load: str) -> Plot | None:
    """Reserved bytes of one request against length, with what single steps were measured to take."""
    slopes = {each.backend: each.bytes_per_token for each in found.growths if each.load == load and each.bytes_per_token}

    def end(backend: str) -> str:
        slope = slopes.get(backend)
        return (backend or report.model) + (f"\n{_per_token(slope.value)}" if slope else "")

    def value(row: Row) -> tuple[float, float, float] | None:
        return (float(row.reserved_bytes),) * 3 if row.reserved_bytes else None

    made, axes, lengths, labels = against_length(found, load, value, end)
    if len(lengths) < 2:
        return None
    measured = False
    for place, backend in enumerate(found.backends):
        points = [(row.cell.tokens or 0, row.measured_bytes) for row in found.rows_of(backend, load) if row.measured_bytes]
        if points:
            measured = True
            axes.plot(*zip(*points, strict=True), "D", color=color(place), markerfacecolor=PAPER, markersize=5, linewidth=0)
    length_axis(axes, lengths)
    cost_axis(axes, "bytes of one request", plain_bytes, binary=True)
    label_ends(axes, labels)
    caption = "Dots: state and workspace the server reserves, by its receipts."
    caption += " Diamonds: what it measured, of a sample of requests." if measured else ""
    return Plot("bytes", "Peak bytes against length", caption, made)


def _per_token(slope: float) -> str:
    return "no growth" if abs(slope) < 1 else f"{slope:,.0f} B/token" if slope < 9999 else f"{slope / 1024:,.0f} KiB/token"


def throughput(found: Analysis, report: Report) -> Plot | None:
    """p95 latency against requests a second, one panel a length, one line a backend through its loads."""
    if len(found.loads) < 2:
        return None
    lengths = sorted({row.cell.tokens for row in found.rows if row.cell.tokens and row.ok})
    chosen = sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]}) if lengths else []
    if not chosen:
        return None
    made, panels = figure(len(chosen), right=16, height=HEIGHT + 24)
    made.subplots_adjust(wspace=0.62, top=1 - 40 / (HEIGHT + 24))
    for axes, tokens in zip(panels, chosen, strict=True):
        for place, backend in enumerate(found.backends):
            rows = [row for load in found.loads for row in found.rows_of(backend, load) if row.cell.tokens == tokens]
            points = [(row.requests_per_second, quantile(row.latency, 0.95) or 0.0) for row in rows]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=color(place))
        axes.set_title(f"{short(tokens)} tokens", fontsize=11, color=INK, loc="left")
        axes.margins(0.15)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain_seconds(round(value, 6)) if value else ""))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panels[0].set_ylabel("p95 latency")
    panels[len(panels) // 2].set_xlabel("answered requests a second")
    legend(made, found, report)
    caption = f"Each line goes through the loads {', '.join(found.loads)}. "
    caption += "Rates are answers over the time from the first send to the last answer."
    return Plot("throughput", "Throughput against p95 latency", caption, made)


def legend(made: Figure, found: Analysis, report: Report) -> None:
    """The backends' names in their colours along the top, for plots whose lines have no common end."""
    x = float(LEFT)
    for place, backend in enumerate(found.backends):
        name = backend or report.model
        made.text(
            x / WIDTH, 1 - 8 / (made.get_figheight() * 72), f"● {name}", color=color(place), va="top", ha="left", fontsize=11
        )
        x += 8.2 * (len(name) + 3)


def capacity(found: Analysis, report: Report) -> Plot | None:
    """The highest rate that keeps the service level, against length."""
    backends = list(dict.fromkeys(search.cell.backend for search in report.searches))
    made, (axes,) = figure()
    labels, lengths = [], set()
    for place, backend in enumerate(backends):
        points = sorted(
            (s.cell.tokens, s.rate) for s in report.searches if s.cell.backend == backend and s.cell.tokens and s.rate
        )
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, "o-", color=color(place))
            labels.append((x[-1], y[-1], backend or report.model, color(place)))
            lengths |= set(x)
    if not lengths:
        return None
    length_axis(axes, sorted(lengths))
    cost_axis(axes, "requests a second", lambda value: f"{value:g}")
    label_ends(axes, labels)
    level = report.scenario["service_level"]["attainment"]
    return Plot(
        "capacity",
        "Highest rate within the service level",
        f"Poisson arrivals of which {level:.0%} kept the service level.",
        made,
    )


def blocking(found: Analysis, report: Report) -> Plot | None:
    """The probe's median and p95, alone and beside the other streams."""
    if not found.blockings:
        return None
    made, (axes,) = figure(height=90 + 62 * len(found.blockings), right=24)
    made.subplots_adjust(left=118 / WIDTH, top=1 - 34 / (made.get_figheight() * 72))
    for place, each in enumerate(reversed(found.blockings)):
        for row, offset, filled in ((each.alone, 0.17, False), (each.together, -0.17, True)):
            assert row.median is not None
            points = (row.median.value, quantile(row.latency, 0.95) or row.median.value)
            hue = color(found.backends.index(each.backend))
            axes.plot(points, (place + offset,) * 2, "-", color=hue, linewidth=2)
            axes.plot(points[0], place + offset, "o", color=hue, markerfacecolor=hue if filled else PAPER)
            axes.plot(points[1], place + offset, "|", color=hue, markersize=11, markeredgewidth=2)
    axes.set_yticks(range(len(found.blockings)), [each.backend or report.model for each in reversed(found.blockings)])
    axes.set_ylim(-0.6, len(found.blockings) - 0.4)
    axes.set_xscale("log")
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain_seconds(value)))
    axes.set_xlabel(f"latency of the {found.blockings[0].alone.stream} requests")
    made.text(
        118 / WIDTH,
        1 - 8 / (made.get_figheight() * 72),
        "○ alone   ● beside the others   | p95",
        color=MUTED,
        va="top",
        fontsize=11,
    )
    caption = "Circles are medians, bars 95th percentiles: hollow alone, filled beside the other streams."
    return Plot("blocking", "Short requests beside long ones", caption, made)


def memory(found: Analysis, report: Report) -> Plot | None:
    """Resident memory over time."""
    if not found.leaks:
        return None
    made, (axes,) = figure()
    labels = []
    for leak in found.leaks:
        x, y = zip(*leak.levels, strict=True)
        hue = color(found.backends.index(leak.backend))
        axes.plot([each / 60 for each in x], y, "-", color=hue)
        labels.append((x[-1] / 60, y[-1], leak.backend or report.model, hue))
    axes.set_xlabel("minutes")
    axes.set_ylabel("resident bytes of the server")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain_bytes(value)))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    made.subplots_adjust(left=90 / WIDTH)
    label_ends(axes, labels)
    caption = "Resident memory of the server's processes, by their own metric; growth is fitted without the first fifth."
    return Plot(
        "memory",
        "Memory over time",
        caption,
        made,
    )


def fidelity(found: Analysis, report: Report, quality: Quality | None) -> Plot | None:
    """Bits per byte against median latency at the longest length that both were measured at."""
    if quality is None or report.kind != "sweep" or not found.loads:
        return None
    load = found.loads[0]
    rows = {(row.cell.backend, row.cell.tokens): row for b in found.backends for row in found.rows_of(b, load)}
    shared = [n for b, n in rows if n in quality.bits_per_byte.get(b, {})]
    if not shared:
        return None
    tokens = max(shared)
    points = [
        (b, row.median.value, quality.bits_per_byte[b][tokens])
        for (b, n), row in rows.items()
        if n == tokens and row.median and tokens in quality.bits_per_byte.get(b, {})
    ]
    if len(points) < 2:
        return None
    made, (axes,) = figure(right=24)
    for backend, x, y in points:
        axes.plot(x, y, "o", color=color(found.backends.index(backend)), markersize=9)
    axes.grid(True)
    span = max(y for *_, y in points) - min(y for *_, y in points)
    axes.set_ylim(min(y for *_, y in points) - max(span, 0.01) * 0.5, max(y for *_, y in points) + max(span, 0.01) * 0.5)
    axes.set_xlim(0, max(x for _, x, _ in points) * 1.08)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain_seconds(round(value, 4)) if value else "0"))
    axes.set_xlabel(f"median latency of {tokens:,} tokens, {load}")
    axes.set_ylabel("bits per byte (fewer is better)")
    middle = axes.get_xlim()[1] / 2
    for backend, x, y in points:
        side, gap = ("left", 10) if x < middle else ("right", -10)
        hue = color(found.backends.index(backend))
        axes.annotate(backend, (x, y), xytext=(gap, 0), textcoords="offset points", color=hue, va="center", ha=side)
    needles = [(b, quality.needle_recall.get(b, {}).get(tokens)) for b, *_ in points]
    told = ", ".join(f"{name} {share:.0%}" for name, share in needles if share is not None)
    caption = "Bits per byte of held-out text from the model card." + (
        f" Needles found at this length: {told}." if told else ""
    )
    return Plot("fidelity", "Quality beside speed", caption, made)


def all_of(found: Analysis, report: Report, quality: Quality | None) -> list[Plot]:
    """The plots that a report has data for, in the order of the page."""
    load = found.loads[0] if found.loads else ""
    made = {
        "sweep": lambda: [
            latency(found, report, load),
            peak(found, report, load),
            throughput(found, report),
            fidelity(found, report, quality),
        ],
        "capacity": lambda: [capacity(found, report), latency(found, report, load)],
        "mixed": lambda: [blocking(found, report)],
        "soak": lambda: [memory(found, report)],
    }[report.kind]()
    return [each for each in made if each is not None]


def readme(found: Analysis, report: Report) -> Plot:
    """Latency and bytes side by side. Raises ValueError for a report without two lengths."""
    made = latency(found, report, found.loads[0] if found.loads else "")
    if made is None:
        raise ValueError("the report has no latencies of two lengths to plot")
    return made
