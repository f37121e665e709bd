"""The scenarios carried out: which block follows which, what a server's forecasts and limits change, what ends a run early."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import aiohttp
from rich.console import Console

from loadtests import capacity, measures, plan, progress, result, session, workload
from loadtests import target as targets
from loadtests.generator import Interrupt
from loadtests.plan import Planned
from loadtests.progress import Live
from loadtests.result import Report, Search
from loadtests.scenario import Api, Capacity, InFlight, Mixed, Poisson, Soak, Stream, Sweep, fingerprint
from loadtests.session import ServerGone, Session
from loadtests.target import Target

FIRST_LOOK_REQUESTS = 5  # one at a time, before a capacity search, to know where to begin
FIRST_LOOK_SECONDS = 2.0


class Interrupted(Exception):
    """The operator stopped the run."""


async def run(
    scenario: Sweep | Capacity | Mixed | Soak,
    target: Target,
    tokenizer: Path | None,
    path: Path,
    resumed: Report | None,
    console: Console,
    interrupt: Interrupt,
    records: TextIO | None,
) -> Report:
    """Carry a scenario out; the report is at `path` whenever a block has ended. Raises TargetError and ScenarioError."""
    for backend in scenario.backends or ("",):
        target.model(scenario.model, backend or None)  # a backend that is not served is told before anything runs
    model = target.model(scenario.model, (scenario.backends or ("",))[0] or None)
    async with aiohttp.ClientSession(headers=target.headers) as asking:
        api = _apis(scenario)[0]
        cutter = await workload.cutter(target, asking, model, api, tokenizer, scenario.distinct_prompts, scenario.seed)
        plans, notes = _plans(scenario, target)
        expected = await session.forecasts(target, scenario, plans)
        report = resumed or _empty(scenario, target, model, cutter.method)
        with Live(console, len(plans), 0.0) as live:
            run = Session(target, scenario, cutter, live, interrupt, path, report, records, expected)
            live.expect(sum(run.estimate(each) for each in plans if not run.is_done(each)))
            for note in notes:
                run.note(note)
            await _carried_out(run, plans)
            run.update()
            return run.report


async def _carried_out(run: Session, plans: Sequence[Planned]) -> None:
    run.update(interrupted=False)
    try:
        if isinstance(run.scenario, Capacity):
            await _search(run, run.scenario)
        else:
            for each in plans:
                if not run.is_done(each):
                    _check(run)
                    await run.run(each)
        _check(run)
    except Interrupted:
        run.update(interrupted=True)
        run.note("interrupted: what follows holds what was measured until then")
    except ServerGone as error:
        run.update(interrupted=True)
        run.note(f"{error}; the rest was not run")


def _check(run: Session) -> None:
    if run.interrupt:
        raise Interrupted


def _apis(scenario: Sweep | Capacity | Mixed | Soak) -> list[Api]:
    if isinstance(scenario, Mixed):
        return [stream.api for stream in scenario.streams]
    return [scenario.stream.api if isinstance(scenario, Soak) else scenario.api]


def _plans(scenario: Sweep | Capacity | Mixed | Soak, target: Target | None) -> tuple[list[Planned], list[str]]:
    """The blocks to run (of a capacity search: its first looks), and what was left out and why."""
    planned = first_looks(scenario) if isinstance(scenario, Capacity) else plan.blocks(scenario)
    if target is None:
        return planned, []
    fitting = [each for each in planned if not plan.too_long(each, target)]
    left = sorted({each.cell.tokens or 0 for each in planned} - {each.cell.tokens or 0 for each in fitting})
    if not left:
        return planned, []
    told = ", ".join(f"{tokens:,}" for tokens in left)
    return fitting, [
        f"left out: inputs of {told} tokens, for with their outputs they pass the {target.max_tokens:,} that the server takes"
    ]


def _empty(scenario: Sweep | Capacity | Mixed | Soak, target: Target, model: str, method: str) -> Report:
    return Report(
        kind=scenario.kind,
        name=scenario.name,
        started=result.now(),
        finished=result.now(),
        scenario=scenario.model_dump(mode="json"),
        fingerprint=fingerprint(scenario),
        url=target.url,
        model=model.partition("@")[0],
        info=target.info,
        max_tokens=target.max_tokens,
        tokens_by=method,
        machine=result.machine(),
    )


def first_looks(scenario: Capacity) -> list[Planned]:
    """One closed-loop block for each cell of a capacity search."""
    load = InFlight(requests=1)
    return [
        Planned(
            plan.cell_of(backend, lengths, load),
            0,
            (Stream(api=scenario.api, lengths=lengths, output_tokens=scenario.output_tokens, arrivals=load),),
            FIRST_LOOK_SECONDS,
            FIRST_LOOK_REQUESTS,
        )
        for backend, lengths in plan.searched(scenario)
    ]


async def _search(run: Session, scenario: Capacity) -> None:
    """One search for each cell; those a resumed report holds are not repeated."""
    plans, _ = _plans(scenario, run.target)
    for first in plans:
        cell = first.cell.model_copy(update={"load": "capacity"})
        if any(each.cell == cell for each in run.report.searches):
            continue
        rate = scenario.first_rate or await _first_rate(run, first)
        level = scenario.service_level
        probes, found = await capacity.search(
            lambda rate, number, first=first: _attempt(run, scenario, first, rate, number),  # type: ignore[misc]
            rate,
            level.attainment,
            scenario.precision,
            scenario.max_probes,
        )
        run.update(searches=(*run.report.searches, Search(cell=cell, probes=tuple(probes), rate=found)))
        run.live.say(f"{cell.told}: {'none' if found is None else f'{found:.3g} requests a second'} keep the service level")


async def _first_rate(run: Session, first: Planned) -> float:
    """What one request at a time reaches."""
    _check(run)
    latency = (await run.run(first)).streams["requests"].latency
    _check(run)
    median = measures.quantile(latency.values(), 0.5)
    if median is None:
        raise ServerGone(f"no request was answered in {first.cell.told}")
    return 1 / max(median, 1e-3)


async def _attempt(run: Session, scenario: Capacity, first: Planned, rate: float, number: int) -> tuple[int, int]:
    _check(run)
    stream = first.streams[0].model_copy(update={"arrivals": Poisson(rate=rate)})
    cell = plan.cell_of(first.cell.backend, stream.lengths, stream.arrivals)
    block = await run.run(Planned(cell, number, (stream,), scenario.requests / rate, requests=scenario.requests))
    _check(run)
    measured = block.streams["requests"]
    assert measured.good is not None, "a capacity search has a service level"
    return measured.good, measured.count


async def dry_run(scenario: Sweep | Capacity | Mixed | Soak, url: str | None, key: str | None, console: Console) -> int:
    """Print what would run and for how long. Asks a running server for its forecasts; sends no load. Returns 0."""
    target = await targets.find(url, key) if url else None
    plans, notes = _plans(scenario, target)
    expected = await session.forecasts(target, scenario, plans) if target else {}

    def seconds_of(planned: Planned, stream: Stream) -> float:
        length = planned.cell.length if planned.cell.tokens else stream.name
        return expected.get((planned.cell.backend, length, stream.api), plan.GUESSED_SECONDS)

    total = 0.0
    for each in plans:
        seconds = plan.estimate(each, scenario.warm_up_requests, lambda stream, each=each: seconds_of(each, stream))  # type: ignore[misc]
        total += seconds
        console.print(f"{each.cell.told}, repeat {each.repeat + 1}: {progress.duration(seconds)}", highlight=False)
    for note in notes:
        console.print(note, highlight=False)
    basis = "by the server's own forecasts" if expected else f"if a request takes {plan.GUESSED_SECONDS:g} s"
    more = ", and the searches after these first looks" if isinstance(scenario, Capacity) else ""
    console.print(f"{len(plans)} blocks, about {progress.duration(total)} {basis}{more}; nothing was sent", highlight=False)
    return 0
