"""From registries to what a scrape reads: one replica's families as text, all replicas' families as one page, kept a second.

Every replica writes its own text, so two take no longer than one, and who answers the scrape only lays them side by side.
Prometheus' text format or, for those who ask, OpenMetrics with exemplars. What describes a family is the client library's
text; the lines of samples are written here, for the library takes four times as long and a scrape shares the cores with the
model. Cost: some 6 microseconds a line. A test holds every line to the library's.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, exposition
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

Format = Literal["text", "openmetrics"]
CONTENT_TYPES: Mapping[Format, str] = {
    "text": exposition.CONTENT_TYPE_PLAIN_0_0_4,
    "openmetrics": openmetrics.CONTENT_TYPE_LATEST,
}
WRITERS: Mapping[Format, Callable[[Collector], bytes]] = {
    "text": exposition.generate_latest,
    "openmetrics": openmetrics.generate_latest,
}
END = b"# EOF\n"
ESCAPED = frozenset('\\\n"')  # in the values of labels
ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
KEEP_SECONDS = 1.0

Families = Mapping[str, tuple[bytes, bytes]]
"""One replica's metrics by family: the lines that describe it, and those of its samples."""


@dataclass(frozen=True)
class Gathered:
    """What the replicas answered."""

    replicas: Sequence[Families]
    missing: int = 0  # replicas that did not answer in time


Gather = Callable[[Format], Awaitable[Gathered]]


def format_of(accept: str) -> Format:
    """The format that a caller's `Accept` header asks for."""
    kinds = (part.split(";")[0].strip() for part in accept.split(","))
    return "openmetrics" if "application/openmetrics-text" in kinds else "text"


def families(registry: CollectorRegistry, replica: str, format: Format) -> Families:
    """A registry's metrics as text, each sample with its `replica`."""
    return dict(_family(metric, format, replica=replica) for metric in registry.collect())


def page(gathered: Gathered, format: Format) -> bytes:
    """All replicas' metrics as one text, and how many replicas those are."""
    heads: dict[str, bytes] = {}
    bodies: defaultdict[str, list[bytes]] = defaultdict(list)
    for replica in (*gathered.replicas, dict([_family(_count(gathered), format)])):
        for name, (head, body) in replica.items():
            heads.setdefault(name, head)
            bodies[name].append(body)
    return b"".join(part for name, head in heads.items() for part in (head, *bodies[name])) + _end(format)


class Page:
    """The page of all replicas, made when it is asked for and kept for a second, whoever asks how often."""

    def __init__(self, gather: Gather) -> None:
        self._gather = gather
        self._lock = asyncio.Lock()
        self._kept: dict[Format, tuple[float, bytes]] = {}

    async def text(self, format: Format, is_fresh: bool = False) -> bytes:
        """The page; `is_fresh`: as it is now, not up to a second ago."""
        oldest = time.monotonic() - (0 if is_fresh else KEEP_SECONDS)
        async with self._lock:  # who waited here takes what was begun meanwhile
            begun, text = self._kept.get(format, (float("-inf"), b""))
            if begun < oldest:
                begun = time.monotonic()
                gathered = await self._gather(format)
                text = await asyncio.to_thread(page, gathered, format)
                self._kept[format] = (begun, text)
            return text


class _Head(Collector):
    """A family without its samples."""

    def __init__(self, metric: Metric) -> None:
        self._metric = Metric(metric.name, metric.documentation, metric.type, metric.unit)

    def collect(self) -> Iterator[Metric]:
        yield self._metric


def _family(metric: Metric, format: Format, **labels: str) -> tuple[str, tuple[bytes, bytes]]:
    """A family's name, and its text in two parts; the library's `_created` series, which nobody reads, are left out."""
    head = WRITERS[format](_Head(metric)).removesuffix(_end(format))
    samples = (sample for sample in metric.samples if not sample.name.endswith("_created"))
    return metric.name, (head, "".join(_line(sample, format, labels) for sample in samples).encode())


def _line(sample: Sample, format: Format, labels: Mapping[str, str]) -> str:
    """One sample with labels of its own and those given, in the order of their names."""
    told = f"{sample.name}{_braced({**sample.labels, **labels})} {floatToGoString(sample.value)}"
    if format == "openmetrics" and sample.exemplar is not None:
        labelled, value, when = sample.exemplar
        told += f" # {_braced(labelled)} {floatToGoString(value)} {when}"
    return told + "\n"


def _braced(labels: Mapping[str, str]) -> str:
    return "{" + ",".join([f'{name}="{_escaped(labels[name])}"' for name in sorted(labels)]) + "}" if labels else ""


def _escaped(value: str) -> str:
    return value.translate(ESCAPES) if not ESCAPED.isdisjoint(value) else value


def _count(gathered: Gathered) -> Metric:
    family = GaugeMetricFamily("longserve_replicas", "Replicas by whether they answered this scrape.", labels=("state",))
    family.add_metric(("answered",), len(gathered.replicas))
    family.add_metric(("missing",), gathered.missing)
    return family


def _end(format: Format) -> bytes:
    return END if format == "openmetrics" else b""
