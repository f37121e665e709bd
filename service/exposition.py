"""From registries to what a scrape reads: one replica's families as text, all replicas' families as one page, kept a second.

Every replica writes its own text, so two take no longer than one, and who answers the scrape only lays them side by side.
Prometheus' text format or, for those who ask, OpenMetrics with exemplars. Cost: some 10 microseconds a line, 15 in OpenMetrics.
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
    return dict(_family(_labelled(metric, replica), format) for metric in registry.collect())


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


class _One(Collector):
    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        yield self._metric


def _family(metric: Metric, format: Format) -> tuple[str, tuple[bytes, bytes]]:
    """A family's name, and its text in two parts."""
    lines = WRITERS[format](_One(metric)).removesuffix(_end(format)).splitlines(keepends=True)
    head = sum(line.startswith(b"#") for line in lines)
    return metric.name, (b"".join(lines[:head]), b"".join(lines[head:]))


def _labelled(metric: Metric, replica: str) -> Metric:
    """The family with its replica; the client library's `_created` series, which nobody reads, are left out."""
    labelled = Metric(metric.name, metric.documentation, metric.type, metric.unit)
    labelled.samples = [
        sample._replace(labels={**sample.labels, "replica": replica})
        for sample in metric.samples
        if not sample.name.endswith("_created")
    ]
    return labelled


def _count(gathered: Gathered) -> Metric:
    family = GaugeMetricFamily("longserve_replicas", "Replicas by whether they answered this scrape.", labels=("state",))
    family.add_metric(("answered",), len(gathered.replicas))
    family.add_metric(("missing",), gathered.missing)
    return family


def _end(format: Format) -> bytes:
    return END if format == "openmetrics" else b""
