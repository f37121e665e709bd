"""Reports of every kind, made up from laws, for tests of what is written about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from loadtests import measures, result, scenario
from loadtests.client import Outcome, Record
from loadtests.measures import Gate, StreamMeasures
from loadtests.plan import blocks
from loadtests.result import Block, Cell, Probe, Report, Search
from loadtests.scenario import Mixed, ServiceLevel, Soak, Sweep
from loadtests.scrape import Check, Level, ServerView

BACKENDS = ("dense", "sliding_window", "performer")
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LEVEL = {"latency": {"seconds": 0.25, "seconds_per_token": 0.0001}}
LAWS = {
    "": lambda n: 0.02 + 1e-5 * n,
    "dense": lambda n: 0.012 + 1e-5 * n + 6e-9 * n * n,
    "sliding_window": lambda n: 0.014 + 3.1e-5 * n,
    "performer": lambda n: 0.013 + 3.4e-5 * n,
}
BYTES = {
    "dense": lambda n: 2**20 + 3072 * n,
    "sliding_window": lambda n: 2**20 + 3072 * min(n, 1028),
    "performer": lambda n: 2**21 + 3072 * min(n, 1024),
}


def scenario_of(kind: str, backends: tuple[str, ...] = BACKENDS, **fields: Any) -> Sweep | Mixed | Soak:
    """A scenario of a kind; of a capacity search its sweep."""
    fixed = {"kind": "fixed", "tokens": 128}
    common: dict[str, Any] = {"name": "sample", "kind": kind, "backends": backends, "service_level": LEVEL}
    stream = {"name": "short", "api": "stream", "lengths": fixed, "arrivals": {"kind": "constant", "rate": 2}}
    own: dict[str, dict[str, Any]] = {
        "sweep": {
            "lengths": {"kind": "list", "tokens": LENGTHS},
            "loads": [{"kind": "in_flight", "requests": 1}, {"kind": "in_flight", "requests": 4}],
            "repeats": 3,
        },
        "mixed": {
            "probe": "short",
            "streams": [stream, stream | {"name": "long", "lengths": {"kind": "fixed", "tokens": 8192}}],
        },
        "soak": {"stream": stream},
    }
    read = scenario.parse(common | own[kind] | fields, "sample")
    assert isinstance(read, (Sweep, Mixed, Soak))
    return read


def report_of(
    kind: str,
    backends: tuple[str, ...] = BACKENDS,
    failing: bool = False,
    slower: Mapping[tuple[str, int], float] | None = None,
    chance: int = 1,
    **fields: Any,
) -> Report:
    """A report of a kind; `failing` ones hold failed requests and failed gates. `slower` multiplies some cells' latencies."""
    made = scenario_of("sweep" if kind == "capacity" else kind, backends, **fields)
    planned = blocks(made)
    rng = np.random.default_rng(chance)
    done = [
        _block(each.cell, each.repeat, [s.name for s in each.streams], rng, failing, made, slower or {}) for each in planned
    ]
    searches = [_search(cell) for cell in {b.cell.key: b.cell for b in done}.values()] if kind == "capacity" else []
    told = made.model_dump(mode="json")
    return Report(
        kind=kind,  # type: ignore[arg-type]
        name="sample",
        started="2026-11-25T12:00:00+00:00",
        finished="2026-11-25T12:09:00+00:00",
        scenario=told,
        fingerprint=scenario.fingerprint(made),
        url="http://127.0.0.1:8000",
        model="longserve-stdlib-5m",
        info={"versions": {"longserve": "0.1.0", "torch": "2.13.0+cpu"}, "dtype": "bfloat16", "threads": 2},
        max_tokens=32768,
        tokens_by="the server's /tokenize",
        machine=result.machine() | {"cpu": "AMD EPYC 9B45", "load_average": 0.1},
        blocks=tuple(done),
        searches=tuple(searches),
        interrupted=False,
    )


def _block(
    cell: Cell,
    repeat: int,
    names: list[str],
    rng: np.random.Generator,
    failing: bool,
    made: Sweep | Mixed | Soak,
    slower: Mapping[tuple[str, int], float],
) -> Block:
    factor = slower.get((cell.backend, cell.tokens or 0), 1.0)
    streams = {name: _stream(name, cell, rng, failing, made.service_level, factor) for name in names}
    late = Gate(
        name="sent on time", passed=not failing or repeat > 0, told="requests: p99 of the sends' delay 9.1 ms, allowed 5.0 ms"
    )
    levels = tuple(Level(seconds=s, resident_bytes=5e8 + 2e4 * s + 1e6 * rng.random(), waiting=0) for s in range(0, 600, 20))
    size = float(BYTES[cell.backend](cell.tokens or 128)) if cell.backend in BYTES else None
    checks = (Check(what="input tokens", client=1.0, server=1.0),)
    view = ServerView(
        dialect="longserve", checks=checks, levels=levels, measured_peak_bytes=size and size * 0.93, measured_steps=3
    )
    return Block(
        cell=cell,
        repeat=repeat,
        started="2026-11-25T12:00:00+00:00",
        seconds=3.0,
        streams=streams,
        lag=measures.distribution([0.001] * 50),
        gates=(late, Gate(name="counted alike by the server", passed=True, told="3 counts of the server's equal the client's")),
        server=view,
        load_average=(0.1, 1.2),
        processes=1,
    )


def _stream(
    name: str, cell: Cell, rng: np.random.Generator, failing: bool, level: ServiceLevel | None, factor: float
) -> StreamMeasures:
    tokens = cell.tokens or (8192 if name == "long" else 128)
    wide = int(cell.load.split()[0]) if "in flight" in cell.load else 1
    base = (
        factor
        * LAWS[cell.backend](tokens)
        * (1 + 0.8 * (wide - 1))
        * (4 if cell.phase == "together" and name == "short" else 1)
    )
    records = []
    for place in range(max(6, min(60, int(3 / base)))):
        seconds = base * rng.lognormal(0, 0.04)
        record = Record(name, place, place * base / wide, place * base / wide + 1e-4, asked_tokens=tokens, prompt_tokens=tokens)
        record.done, record.output_tokens, record.outcome, record.status, record.told = (
            record.intended + seconds,
            8,
            Outcome.OK,
            200,
            "",
        )
        record.first, record.chunk_times = (
            record.intended + seconds * 0.8,
            [record.intended + seconds * x for x in (0.8, 0.9, 1)],
        )
        size = BYTES[cell.backend](tokens) if cell.backend in BYTES else None
        record.receipt = {
            "backend": cell.backend,
            "queue_seconds": 0.0,
            "prefill_seconds": seconds * 0.8,
            "decode_seconds": seconds * 0.1,
        }
        record.receipt |= {"reserved_bytes": size, "measured_bytes": int(size * 0.97)} if size else {}
        if failing and place == 0:
            record.outcome, record.status, record.told = Outcome.SERVER_ERROR, 500, "500: internal error"
        records.append(record)
    return measures.measure(name, records, level)


def _search(cell: Cell) -> Search:
    rate = 0.7 / LAWS[cell.backend](cell.tokens or 128)
    probes = tuple(
        Probe(rate=rate * factor, good=80 if factor <= 1 else 61, count=80, kept=factor <= 1, decided=factor != 1)
        for factor in (0.5, 1, 2)
    )
    return Search(cell=cell.model_copy(update={"load": "capacity"}), probes=probes, rate=rate)
