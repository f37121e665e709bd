"""What plots are drawn on: SVG whose text is text and whose colours are the page's, so it follows light and dark.

Drawn by matplotlib with marker colours that stand for CSS variables. Every axis says what it counts, in which unit; every line
is labelled at its end.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

# A colour that no drawing has by chance stands for each variable of page/style.css.
INK, MUTED, GRID, PAPER = "#010101", "#010102", "#010103", "#010104"
SERIES = tuple(f"#0102{place:02x}" for place in range(1, 8))
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {c: f"series-{i}" for i, c in enumerate(SERIES, 1)}
LIGHT = {"ink": "#1d2330", "muted": "#5b6475", "grid": "#dfe3ea", "paper": "#ffffff"}
DARK = {"ink": "#e8ebf1", "muted": "#a3adbd", "grid": "#333b48", "paper": "#14181f"}
SERIES_LIGHT = ("#1f5fa8", "#b4530f", "#1e7a55", "#7a45a8", "#b3264f", "#0f7486", "#75651a")
SERIES_DARK = ("#7db4f5", "#f2a25c", "#6fd0a2", "#c19bf0", "#f58aa9", "#6ccadb", "#d9c76a")
FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', sans-serif"
WIDTH, HEIGHT = 470, 330  # CSS pixels of one plot at its natural size
NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
LEFT = 72  # pixels for the numbers and the name of the upright axis
LABEL_GAP = 14  # pixels between two labels at the lines' ends

matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",
        "text.parse_math": False,  # names are names, also with dollars in them
        "svg.hashsalt": "loadtests",
        "font.family": "DejaVu Sans",
        "font.size": 11,
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "axes.linewidth": 1,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.labelsize": 11,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelsize": 11,
        "ytick.labelsize": 11,
        "text.color": INK,
        "grid.color": GRID,
        "grid.linewidth": 1,
        "lines.linewidth": 2,
        "lines.markersize": 5,
    }
)


@dataclass(frozen=True)
class Plot:
    """A figure with its heading, and the words for who cannot see it."""

    name: str
    title: str
    caption: str
    figure: Figure

    @property
    def svg(self) -> str:
        """The drawing, to stand inside a page."""
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
        box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
        assert box is not None, "matplotlib writes a viewBox"
        told = html.escape(f"{self.title}. {self.caption}")
        head = f'<svg role="img" aria-label="{told}" {box[0]} {NAMESPACES}>'
        text = head + text[text.index(">") + 1 :]
        for marker, name in VARIABLES.items():
            text = text.replace(marker, f"var(--{name})")
        text = re.sub(r"font: ([\d.]+px) 'DejaVu Sans'[^;\"]*", r"font: \1 var(--font)", text)
        text = re.sub(r"(\bid=\"|url\(#|href=\"#)", rf"\g<1>{self.name}-", text)
        return text


def standalone(plot: Plot) -> str:
    """The drawing as a file of its own, for light and dark readers."""

    light, dark = variables(LIGHT, SERIES_LIGHT), variables(DARK, SERIES_DARK)
    style = f"svg{{--font:{FONT};{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}"
    text = plot.svg
    place = text.index(">") + 1
    return f"{text[:place]}<style>{style}</style>{text[place:]}\n"


def variables(palette: Mapping[str, str], series: Sequence[str]) -> str:
    """CSS declarations of all colours."""
    named = dict(palette) | {f"series-{place}": value for place, value in enumerate(series, 1)}
    return "".join(f"--{name}:{value};" for name, value in named.items())


def figure(panels: int = 1, height: int = HEIGHT, right: int = 128) -> tuple[Figure, list[Axes]]:
    """An empty figure with panels side by side, and room at the right for the labels of the last."""
    made = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)  # a point is a CSS pixel
    axes = list(np.atleast_1d(made.subplots(1, panels)))
    left, gap = LEFT, 20
    made.subplots_adjust(left=left / WIDTH, right=1 - right / WIDTH, top=1 - 14 / height, bottom=52 / height, wspace=gap / 100)
    axes[0].yaxis.set_label_coords(16 / WIDTH, 0.5 + 19 / height, transform=made.transFigure)
    for each in axes:
        each.grid(True, axis="y")
        each.set_axisbelow(True)
        each.tick_params(length=0, pad=6)
    return made, axes


def color(place: int) -> str:
    return SERIES[place % len(SERIES)]


def length_axis(axes: Axes, tokens: Sequence[int], label: str = "input length (tokens)") -> None:
    """A logarithmic axis whose ticks are the lengths that were measured."""
    axes.set_xscale("log")
    shown = list(tokens) if len(tokens) <= 7 else list(tokens)[:: -(-len(tokens) // 7)]
    axes.set_xticks(shown, [short(each) for each in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(tokens) / 1.15, max(tokens) * 1.1)
    axes.set_xlabel(label)


def cost_axis(axes: Axes, label: str, told: Callable[[float], str], binary: bool = False) -> None:
    """A logarithmic axis with few, plainly written ticks."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.1, high * 1.25)
    decades = np.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 2.1 else (1.0, 3.0) if decades < 3.2 else (1.0,)
    axes.yaxis.set_major_locator(
        LogLocator(2.0 ** (1 + (decades > 1.6) + (decades > 2.8)), numticks=12)
        if binary
        else LogLocator(subs=subs, numticks=12)
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: told(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(label)


def short(tokens: float) -> str:
    """A number of tokens as an axis writes it."""
    return f"{tokens / 1024:g}k" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:g}"


def plain_seconds(value: float) -> str:
    return f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms"


def plain_bytes(value: float) -> str:
    return (
        f"{value / 2**30:.3g} GiB"
        if value >= 2**30
        else f"{value / 2**20:.3g} MiB"
        if value >= 2**20
        else f"{value / 2**10:.3g} KiB"
    )


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write (x, y, text, colour) at the right of lines' ends, moved apart where they would touch."""
    lines = [text.count("\n") + 1 for _, _, text, _ in ends]
    order = sorted(range(len(ends)), key=lambda i: ends[i][1])
    axes.get_ylim()  # settles the limits, on which the transformation rests
    places = {i: axes.transData.transform((ends[i][0], ends[i][1]))[1] for i in order}
    for low, high in pairwise(order):
        places[high] = max(places[high], places[low] + LABEL_GAP * (lines[low] + lines[high]) / 2)
    top = axes.transAxes.transform((0, 1))[1] + 4
    over = max(0.0, max((places[i] + LABEL_GAP * (lines[i] - 1) / 2 for i in order), default=0.0) - top)
    for i in order:
        _, _, text, hue = ends[i]
        y = axes.transAxes.inverted().transform((0, places[i] - over))[1]
        axes.annotate(
            text,
            (1, y),
            xycoords="axes fraction",
            xytext=(8, 0),
            textcoords="offset points",
            color=hue,
            va="center",
            ha="left",
            annotation_clip=False,
        )
