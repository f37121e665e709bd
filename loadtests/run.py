"""python -m loadtests sweep|capacity|mixed|soak|report|readme|compare: the command line.

Exit status: 0 measured and valid; 1 requests failed, or `compare` found a regression; 2 asked wrongly, or no server to
measure; 3 measured but INVALID; 130 interrupted, with what was measured until then kept.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TextIO

from rich.console import Console

from loadtests import compare, execute, outputs, quality, result, scenario, serve, target
from loadtests.faults import LoadTestError, ScenarioError
from loadtests.generator import Interrupt
from loadtests.scenario import Capacity, Mixed, Soak, Sweep

OK, FAILED, USAGE, INVALID, INTERRUPTED = 0, 1, 2, 3, 130
SCENARIOS = Path(__file__).with_name("scenarios")
KINDS = {
    "sweep": "every backend at every length under every load",
    "capacity": "the highest rate at which a running service keeps a service level; `longserve capacity` simulates replicas",
    "mixed": "long and short requests side by side",
    "soak": "one rate for long, watched for growth",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        return int(options.run(options))
    except LoadTestError as error:
        print(f"loadtests {options.command}: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("ended at once", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtests", description="Load tests of any OpenAI-compatible server.")
    commands = parser.add_subparsers(dest="command", required=True)
    for kind, help in KINDS.items():
        _add_measuring(commands.add_parser(kind, help=help, description=help), kind)
    for name, run, help in (
        ("report", report, "write a report file's page, table and CSV again"),
        ("readme", readme, "print a report's table as Markdown, and write its plot as SVG"),
    ):
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=run)
        command.add_argument("report", type=Path, help="a report.json")
        command.add_argument("--quality", type=Path, help="a model card with tables of quality by backend")
        if name == "readme":
            command.add_argument("--svg", type=Path, help="where the plot goes")
    compare.add_to(commands)
    return parser


def _add_measuring(command: argparse.ArgumentParser, kind: str) -> None:
    command.set_defaults(run=measure)
    command.add_argument(
        "scenario", nargs="?", type=Path, default=SCENARIOS / f"{kind}.yaml", help=f"YAML; left out: scenarios/{kind}.yaml"
    )
    where = command.add_mutually_exclusive_group()
    where.add_argument("--url", default="http://127.0.0.1:8000", help="base URL of the server, with or without /v1")
    where.add_argument(
        "--serve", type=Path, metavar="CONFIG", help="start `longserve serve` on a free port with this config, and stop it"
    )
    command.add_argument("--key-env", metavar="NAME", help="environment variable that holds the server's API key")
    command.add_argument("--tokenizer", type=Path, help="tokenizer.json, or its directory, for a server without /tokenize")
    command.add_argument("--quality", type=Path, help="a model card with tables of quality by backend, shown beside speed")
    command.add_argument("--out", type=Path, default=Path("results"), help="directory for reports (default: results)")
    command.add_argument(
        "--backends", type=lambda text: tuple(text.split(",")), help="comma-separated, in place of the scenario's"
    )
    command.add_argument("--model", help="in place of the scenario's")
    command.add_argument("--seed", type=int)
    command.add_argument("--repeats", type=int)
    command.add_argument("--processes", type=int, help="generator processes; left out: by the rate")
    if kind != "capacity":
        command.add_argument("--seconds", type=float, help="of sending in each block")
    command.add_argument("--records", action="store_true", help="keep one line of JSON for each request in requests.jsonl")
    command.add_argument("--dry-run", action="store_true", help="print the blocks and how long they would take; send nothing")
    command.add_argument("--resume", type=Path, metavar="REPORT", help="go on with an interrupted run's report.json")


CHANGES = ("backends", "model", "seed", "repeats", "processes", "seconds")


def measure(options: argparse.Namespace) -> int:
    """Run a scenario, write its report, print its table and verdict."""
    console = _console()
    asked = scenario.read(options.scenario, **{name: getattr(options, name, None) for name in CHANGES})
    if asked.kind != options.command:
        raise ScenarioError(f"{options.scenario}: is a {asked.kind}, so: python -m loadtests {asked.kind} {options.scenario}")
    shown = quality.read(options.quality) if options.quality else None
    resumed = _resumed(options, asked)
    if options.dry_run:
        return asyncio.run(execute.dry_run(asked, _url(options), _key(options), console))
    folder = options.resume.parent if resumed else options.out / f"{asked.name}-{datetime.now():%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True, exist_ok=True)
    with _server(options, folder, console) as url:
        report = asyncio.run(_measured(options, asked, url, folder, resumed, console))
    outputs.publish(report, folder, shown, console)
    return status(report)


async def _measured(
    options: argparse.Namespace,
    asked: Sweep | Capacity | Mixed | Soak,
    url: str,
    folder: Path,
    resumed: result.Report | None,
    console: Console,
) -> result.Report:
    interrupt = Interrupt()
    found = await target.find(url, _key(options))
    with _on_interrupt(interrupt), _records(options, folder) as records:
        return await execute.run(asked, found, options.tokenizer, folder / "report.json", resumed, console, interrupt, records)


@contextlib.contextmanager
def _server(options: argparse.Namespace, folder: Path, console: Console) -> Iterator[str]:
    """The URL to measure, of a service of one's own where asked for."""
    if options.serve is None:
        yield options.url
        return
    console.print(f"starting the service of {options.serve} ...", highlight=False)
    with serve.serving(options.serve, folder) as url:
        yield url


@contextlib.contextmanager
def _on_interrupt(interrupt: Interrupt) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) ends the run in order, a second at once."""
    loop = asyncio.get_running_loop()

    def first() -> None:
        interrupt.event.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, first)
    yield


@contextlib.contextmanager
def _records(options: argparse.Namespace, folder: Path) -> Iterator[TextIO | None]:
    if not options.records:
        yield None
        return
    with (folder / "requests.jsonl").open("a") as file:
        yield file


def _resumed(options: argparse.Namespace, asked: Sweep | Capacity | Mixed | Soak) -> result.Report | None:
    """The report to go on with. Raises ScenarioError when it is of another scenario."""
    if options.resume is None:
        return None
    found = result.load(options.resume)
    if found.fingerprint != scenario.fingerprint(asked):
        raise ScenarioError(f"{options.resume} was measured with another scenario or other options, so its blocks do not fit")
    return found


def _console() -> Console:
    """Where there is no terminal, lines are as long as they are."""
    found = Console(soft_wrap=True)
    return found if found.is_terminal else Console(soft_wrap=True, width=1000)


def _url(options: argparse.Namespace) -> str | None:
    return None if options.serve else options.url


def _key(options: argparse.Namespace) -> str | None:
    if options.key_env is None:
        return None
    if not (key := os.environ.get(options.key_env)):
        raise ScenarioError(f"--key-env: the environment has no {options.key_env}")
    return key


def status(report: result.Report) -> int:
    """The exit status that a report deserves."""
    if report.interrupted:
        return INTERRUPTED
    if not report.valid:
        return INVALID
    return FAILED if report.failed_requests else OK


def report(options: argparse.Namespace) -> int:
    """Write a report's page and tables again."""
    found, shown = result.load(options.report), quality.read(options.quality) if options.quality else None
    outputs.publish(found, options.report.parent, shown, _console())
    return status(found)


def readme(options: argparse.Namespace) -> int:
    """Print a report's Markdown table; write its plot."""
    found, shown = result.load(options.report), quality.read(options.quality) if options.quality else None
    print(outputs.markdown(found, shown))
    if options.svg:
        outputs.write_plot(found, options.svg)
    return status(found)
