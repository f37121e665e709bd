"""What a server's `/metrics` say: read before, during and after a block, and held against what the client counted.

Names differ by server; a `Dialect` says which series answers which question. A server without `/metrics` is measured all the
same, and the report says that nobody checked the client's counts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from loadtests.measures import Kept, StreamMeasures
from loadtests.workload import PATHS

SETTLE_SECONDS = 2.0  # a server may count a request a moment after its answer has gone out
SCRAPE_TIMEOUT_SECONDS = 10.0
NOW = {"cache-control": "no-cache"}  # a page kept from a moment ago would give a block the counts of the one before

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]
"""Value by name and labels."""


@dataclass(frozen=True)
class Dialect:
    """The series of one kind of server."""

    name: str
    responses: str | None  # counter by route and status
    requests: str | None  # counter of answered requests
    prompt_tokens: str
    output_tokens: str
    resident: str
    waiting: str
    peak: str | None = None  # histogram of the bytes of single steps


DIALECTS = (
    Dialect(
        "longserve",
        "longserve_http_responses_total",
        None,
        "longserve_input_tokens_sum",
        "longserve_output_tokens_sum",
        "longserve_process_resident_memory_bytes",
        "longserve_requests_waiting",
        "longserve_forward_peak_bytes",
    ),
    Dialect(
        "vllm",
        None,
        "vllm:request_success_total",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "process_resident_memory_bytes",
        "vllm:num_requests_waiting",
    ),
)


@dataclass
class Scrape:
    """One reading; `at` in monotonic seconds."""

    at: float
    series: Series

    def total(self, name: str | None, **labels: str) -> float:
        """The sum of a name's series that carry these labels, over replicas and all other labels."""
        wanted = set(labels.items())
        return sum(value for (found, has), value in self.series.items() if found == name and wanted <= has)

    def dialect(self) -> Dialect | None:
        names = {name for name, _ in self.series}
        return next((each for each in DIALECTS if each.resident in names and each.waiting in names), None)


class Level(Kept):
    """Gauges at a moment of a block."""

    seconds: float  # since the block began
    resident_bytes: float
    waiting: float


class Check(Kept):
    """One count of the client's beside the server's."""

    what: str
    client: float
    server: float

    @property
    def agrees(self) -> bool:
        return self.client == self.server


class ServerView(Kept):
    """What the server's metrics say about one block."""

    dialect: str
    checks: tuple[Check, ...]
    levels: tuple[Level, ...]
    measured_peak_bytes: float | None  # mean over the steps whose peak was measured
    measured_steps: int

    @property
    def agrees(self) -> bool:
        return all(check.agrees for check in self.checks)


@dataclass
class Scraper:
    """Reads `/metrics` over a session of its own."""

    session: aiohttp.ClientSession
    url: str
    readings: list[Scrape] = field(default_factory=list)

    async def read(self) -> Scrape | None:
        """The metrics now; None when they cannot be read."""
        try:
            timeout = aiohttp.ClientTimeout(total=SCRAPE_TIMEOUT_SECONDS)
            async with self.session.get(f"{self.url}/metrics", headers=NOW, timeout=timeout) as response:
                return Scrape(time.monotonic(), parse(await response.text())) if response.status == 200 else None
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError):
            return None

    async def follow(self, every_seconds: float) -> None:
        """Read again and again, until cancelled."""
        while True:
            await asyncio.sleep(every_seconds)
            if (reading := await self.read()) is not None:
                self.readings.append(reading)


def parse(text: str) -> Series:
    """The series of Prometheus' text format. Raises ValueError for another text."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def settled(
    scraper: Scraper, before: Scrape, sent: Sequence[StreamMeasures], api_of: Mapping[str, str]
) -> ServerView | None:
    """The server's view of a block that has ended, read again for a moment where its counts lag behind the client's."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        after = await scraper.read()
        found = None if after is None else view(before, after, scraper.readings, sent, api_of)
        if found is None or found.agrees or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.1)


def view(
    before: Scrape, after: Scrape, during: Sequence[Scrape], sent: Sequence[StreamMeasures], api_of: Mapping[str, str]
) -> ServerView | None:
    """What happened between two readings, beside what the client sent (warm-up included). None for an unknown server."""
    dialect = after.dialect()
    if dialect is None:
        return None

    def counted(name: str | None, **labels: str) -> float:
        return after.total(name, **labels) - before.total(name, **labels)

    levels = [
        Level(seconds=each.at - before.at, resident_bytes=each.total(dialect.resident), waiting=each.total(dialect.waiting))
        for each in (before, *during, after)
    ]
    steps = counted(f"{dialect.peak}_count") if dialect.peak else 0.0
    return ServerView(
        dialect=dialect.name,
        checks=tuple(_checks(dialect, counted, sent, api_of)),
        levels=tuple(levels),
        measured_peak_bytes=counted(f"{dialect.peak}_sum") / steps if steps else None,
        measured_steps=int(steps),
    )


def _checks(dialect: Dialect, counted: object, sent: Sequence[StreamMeasures], api_of: Mapping[str, str]) -> list[Check]:
    assert callable(counted)
    checks = []
    if dialect.responses:
        for path in sorted({PATHS[api] for api in api_of.values()}):  # type: ignore[index]
            mine = [each for each in sent if PATHS[api_of[each.name]] == path]  # type: ignore[index]
            for status in sorted({status for each in mine for status in each.statuses}):
                client = sum(each.statuses.get(status, 0) for each in mine)
                server = counted(dialect.responses, route=path, status=status)
                checks.append(Check(what=f"answers {status} of {path}", client=client, server=server))
    if dialect.requests:
        checks.append(Check(what="answered requests", client=sum(each.ok for each in sent), server=counted(dialect.requests)))
    if all(each.ok == each.count for each in sent):  # what a failed request made the server read is known to it alone
        checks.append(
            Check(what="input tokens", client=sum(e.prompt_tokens for e in sent), server=counted(dialect.prompt_tokens))
        )
        checks.append(
            Check(what="output tokens", client=sum(e.output_tokens for e in sent), server=counted(dialect.output_tokens))
        )
    return checks
