"""A run: blocks one after the other, each warmed up, sent, scraped and judged; saved after each, so that nothing is lost."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import aiohttp

from loadtests import generator, measures, result
from loadtests import target as targets
from loadtests.client import Client, Outcome, Record, begun
from loadtests.generator import Interrupt, Load, Traffic
from loadtests.plan import Planned, drawn, estimate
from loadtests.progress import Live
from loadtests.result import Block, Report
from loadtests.scenario import Capacity, Mixed, Soak, Stream, Sweep
from loadtests.scrape import Scrape, Scraper, ServerView, settled
from loadtests.target import Target
from loadtests.workload import Cutter

RECORD_FIELDS = ("stream", "index", "outcome", "status", "told", "asked_tokens", "prompt_tokens", "output_tokens", "receipt")


class ServerGone(Exception):
    """Not one request of a block reached the server: going on would measure nothing."""


@dataclass
class Session:
    """One run against one server."""

    target: Target
    scenario: Sweep | Capacity | Mixed | Soak
    cutter: Cutter
    live: Live
    interrupt: Interrupt
    path: Path  # of the report file
    report: Report
    records: TextIO | None = None  # one line of JSON for each request, where asked for
    expected: dict[tuple[str, str, str], float] = field(default_factory=dict)  # see seconds_of

    def is_done(self, planned: Planned) -> bool:
        """Whether the report holds this block already."""
        return any(
            block.cell == planned.cell and block.repeat == planned.repeat and not block.partial for block in self.report.blocks
        )

    async def run(self, planned: Planned) -> Block:
        """Run one block and save the report with it. Raises ServerGone, TargetError and ScenarioError."""
        self.live.begin(planned.cell.told)
        block = await self._block(planned)
        self._keep(block)
        self.live.end(block, self.estimate(planned))
        outcomes = [outcome for stream in block.streams.values() for outcome in stream.outcomes]
        if outcomes and set(outcomes) == {Outcome.UNREACHABLE}:
            raise ServerGone(f"the server stopped answering in {block.cell.told}")
        return block

    def estimate(self, planned: Planned) -> float:
        """Seconds a block is expected to take."""
        return estimate(planned, self.scenario.warm_up_requests, lambda stream: self.seconds_of(planned, stream))

    def seconds_of(self, planned: Planned, stream: Stream) -> float:
        """What one request of a stream takes alone, as far as the server foretold it."""
        length = planned.cell.length if planned.cell.tokens else stream.name
        return self.expected.get((planned.cell.backend, length, stream.api), 0.2)

    def note(self, line: str) -> None:
        """Put a remark into the report, once."""
        if line not in self.report.notes:
            self.report = self.report.model_copy(update={"notes": (*self.report.notes, line)})
            self.live.say(line)

    def update(self, **changes: Any) -> None:
        """Change the report and save it."""
        self.report = self.report.model_copy(update={"finished": result.now(), **changes})
        result.save(self.report, self.path)

    def _keep(self, block: Block) -> None:
        earlier = [each for each in self.report.blocks if (each.cell, each.repeat) != (block.cell, block.repeat)]
        self.update(blocks=(*earlier, block))

    async def _block(self, planned: Planned) -> Block:
        model = self.target.model(self.scenario.model, planned.cell.backend or None)
        asked = self.scenario
        traffic, clipped = await drawn(planned, asked.seed, self.target, model, self.cutter, asked.ignore_eos)
        load = Load(self.target.url, self.target.headers, self.scenario.timeout_seconds, self.scenario.max_in_flight, traffic)
        processes = self.scenario.processes or generator.processes_for(planned.rate)
        started, before, began = result.now(), os.getloadavg()[0], time.monotonic()
        async with self._scraping() as scraper:
            first = await scraper.read() if scraper else None
            warm = await self._warm_up(load)
            with self._following(scraper):
                sent = await generator.run(load, processes, self.interrupt, self.live.heard)
            view = await self._view(scraper, first, planned, [*warm, *sent.records])
        self._write(planned, sent.records)
        streams = self._measured(planned, sent.records, clipped)
        return Block(
            cell=planned.cell,
            repeat=planned.repeat,
            started=started,
            seconds=time.monotonic() - began,
            streams=streams,
            lag=measures.distribution(sent.lags),
            gates=tuple(self._gates(planned, traffic, streams, sent, view)),
            server=view,
            load_average=(before, os.getloadavg()[0]),
            processes=processes,
            partial=sent.interrupted,
        )

    async def _warm_up(self, load: Load) -> list[Record]:
        """A few requests of each stream, one at a time; they count for nothing but the server's own counts."""
        client = Client(load.url, load.headers, load.timeout_seconds)
        try:
            found: list[Record] = []
            for each in load.traffic:
                for ask in each.asks[: self.scenario.warm_up_requests]:
                    if not self.interrupt:
                        found.append(begun(ask, time.monotonic()))
                        await client.send(ask, found[-1])
            return found
        finally:
            client.close()

    @asynccontextmanager
    async def _scraping(self) -> AsyncIterator[Scraper | None]:
        if not self.target.has_metrics:
            yield None
            return
        async with aiohttp.ClientSession(headers=self.target.headers) as session:
            yield Scraper(session, self.target.url)

    @contextmanager
    def _following(self, scraper: Scraper | None) -> Iterator[None]:
        task = asyncio.create_task(scraper.follow(self.scenario.scrape_seconds)) if scraper else None
        try:
            yield
        finally:
            if task:
                task.cancel()

    async def _view(
        self, scraper: Scraper | None, first: Scrape | None, planned: Planned, records: Sequence[Record]
    ) -> ServerView | None:
        if scraper is None or first is None:
            return None
        api_of = {stream.name: stream.api for stream in planned.streams}
        sent = [measures.measure(name, [r for r in records if r.stream == name], None) for name in api_of]
        return await settled(scraper, first, sent, api_of)

    def _measured(
        self, planned: Planned, records: Sequence[Record], clipped: dict[str, float]
    ) -> dict[str, measures.StreamMeasures]:
        level = self.scenario.service_level
        return {
            stream.name: measures.measure(
                stream.name, [r for r in records if r.stream == stream.name], level, clipped[stream.name]
            )
            for stream in planned.streams
        }

    def _gates(
        self,
        planned: Planned,
        traffic: Sequence[Traffic],
        streams: dict[str, measures.StreamMeasures],
        sent: generator.Sent,
        view: ServerView | None,
    ) -> list[measures.Gate]:
        found: dict[tuple[str, str], measures.Gate] = {}
        for each in traffic:
            for gate in measures.gates(streams[each.name], each.in_flight is None, sent):
                found[gate.name, gate.told] = gate
        others = {name for each in streams.values() for name in each.backends} - {planned.cell.backend}
        if others and planned.cell.backend:
            told = f"answers name {', '.join(sorted(others))}"
            found["backend", ""] = measures.Gate(name="served by the backend asked for", passed=False, told=told)
        if view is not None and not sent.interrupted:
            wrong = [
                f"{check.what}: client {check.client:,.0f}, server {check.server:,.0f}"
                for check in view.checks
                if not check.agrees
            ]
            told = "; ".join(wrong) or f"{len(view.checks)} counts of the server's equal the client's"
            found["counts", ""] = measures.Gate(name="counted alike by the server", passed=not wrong, told=told)
        return list(found.values())

    def _write(self, planned: Planned, records: Sequence[Record]) -> None:
        if self.records is None:
            return
        for record in records:
            row = {"cell": planned.cell.key, "repeat": planned.repeat}
            row |= {name: getattr(record, name) for name in RECORD_FIELDS}
            row |= {"latency": record.done - record.intended, "delay": record.sent - record.intended}
            row |= {"first_token": None if record.first is None else record.first - record.intended}
            self.records.write(json.dumps(row) + "\n")
        self.records.flush()


async def forecasts(
    target: Target, scenario: Sweep | Capacity | Mixed | Soak, plans: Sequence[Planned]
) -> dict[tuple[str, str, str], float]:
    """What the server expects one request of each kind to take, for the estimate of the run; empty where it does not tell."""
    found: dict[tuple[str, str, str], float] = {}
    for planned in plans:
        for stream in planned.streams:
            key = (planned.cell.backend, planned.cell.length if planned.cell.tokens else stream.name, stream.api)
            tokens = getattr(stream.lengths, "tokens", None)
            if key in found or not isinstance(tokens, int):
                continue
            model = target.model(scenario.model, planned.cell.backend or None)
            told = await targets.plan_seconds(target, model, stream.api, tokens, stream.output_tokens)
            if told is None:
                return found
            found[key] = told
    return found
