"""`longserve capacity`: what so many replicas would hold, on paper. Arguments here, and what is printed."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.asking import Refused, ask, key_header
from service.capacity.mix import FORM, Mix
from service.config import ApplicationSection, ConfigError, ServeFile

if TYPE_CHECKING:
    from service.capacity.fleet import Outcome
    from service.capacity.search import Capacity
    from service.capacity.site import Site

ASKED = 12  # times, for what a replica tells: whichever answers


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Those of the command, but for its file."""
    lengths = command.add_mutually_exclusive_group(required=True)
    lengths.add_argument("--lengths", metavar="MIX", help=f"{FORM}, comma-separated: 2048:128@0.8,16384:256@0.2")
    lengths.add_argument("--pairs", type=Path, help="a file of them: a prompt's and an answer's tokens on each line")
    command.add_argument("--replicas", type=_counts, default=(1,), metavar="N[,N...]", help="how many; by default 1")
    command.add_argument("--machines", type=_count, help="that carry them; by default one for each replica")
    command.add_argument("--cpus", type=_count, help="of a machine; by default as many as where the replica was measured")
    command.add_argument("--backend", help="that calls ask for; by default none, which leaves it to the file")
    command.add_argument("--first-token", type=_seconds, default=2.0, metavar="SECONDS", help="at most; by default 2")
    command.add_argument(
        "--per-token", type=_seconds, default=0.1, metavar="SECONDS", help="between two tokens; by default 0.1"
    )
    command.add_argument("--share", type=_share, default=0.95, help="of the calls that keep both; by default 0.95")
    command.add_argument("--rate", type=_seconds, help="calls a second: tell what becomes of them, and look for no other rate")
    command.add_argument("--url", help="of a running service: its laws and limits, instead of measuring the file's model here")
    command.add_argument(
        "--probe", action="store_true", help="with --url: send it some calls, for what HTTP and neighbours cost"
    )
    command.add_argument("--calls", type=_count, help="of a run; by default 10 for each replica, and 1000 at least")
    command.add_argument("--seed", type=int, default=0, help="of lengths and arrivals")
    command.add_argument("--json", action="store_true", help="print it for programs")


def run(options: argparse.Namespace, file: ServeFile) -> int:
    """Print the capacity of each number of replicas. Raises ConfigError and Refused."""
    application = file.applications[0]
    try:
        mix = Mix.parse(options.lengths) if options.lengths else Mix.read(options.pairs)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    if options.probe and not options.url:
        raise ConfigError("--probe asks a running service: say which with --url")
    from service.capacity.fleet import Level  # brings torch
    from service.capacity.search import Question, capacity, trial

    level = Level(options.first_token, options.per_token, options.share)
    question = Question(mix, level, options.backend, options.seed, options.calls)
    found: list[Any] = []
    sites: dict[int, Site] = {}
    for number in options.replicas:
        layout = _layout(options, file, number)
        neighbours = -(-layout.replicas // layout.machines)
        if neighbours not in sites:
            sites[neighbours] = _site(options, file, application, mix, neighbours)
        site = sites[neighbours]
        if options.backend and options.backend not in (*site.lanes, "auto"):
            raise ConfigError(f"--backend {options.backend} is not served: {', '.join((*site.lanes, 'auto'))}")
        if (longest := mix.longest).prompt + longest.answer > site.max_length:
            asked = f"a call of {longest.prompt} tokens and {longest.answer} to answer"
            raise ConfigError(f"{asked} is longer than the model's context of {site.max_length} tokens")
        if options.rate:
            found.append((layout, trial(site, layout, replace(question, level=level), options.rate)))
        else:
            found.append(capacity(site, layout, question))
    around = {number: asdict(site.around) for number, site in sites.items()}
    if options.json:
        print(json.dumps({"level": asdict(level), "around": around, "capacity": [_plain(each) for each in found]}))
        return 0
    for line in told(found, around, options):
        print(line)
    return 0


def _layout(options: argparse.Namespace, file: ServeFile, replicas: int) -> Any:
    from service.capacity.fleet import Layout

    machines = min(options.machines or replicas, replicas)
    proxies = machines if file.proxy_location == "EveryNode" else 1
    return Layout(replicas, machines, proxies, options.cpus)


def _site(options: argparse.Namespace, file: ServeFile, application: ApplicationSection, mix: Mix, neighbours: int) -> Site:
    """What a replica is, with so many on its machine."""
    from service.capacity import site
    from service.capacity.probe import Sender, probe, together

    auto = application.deployments[0].user_config.attention.auto
    try:
        if not options.url:
            return site.told(asyncio.run(_measured(application, neighbours)), application.args, auto)
        url, around = options.url.rstrip("/").removesuffix("/v1"), site.Surroundings()
        if options.probe:
            info = ask(f"{url}/info", application)
            caller = Sender(url, key_header(application), options.backend, info["laws"]["vocabulary"])
            around = probe(caller, mix, neighbours, min(info["laws"]["cpus"], neighbours * info["threads"]))
        infos = {info["replica"]["name"]: info for info in (ask(f"{url}/info", application) for _ in range(ASKED))}
        return replace(site.told(together(list(infos.values())), application.args, auto), around=around)
    except (FileNotFoundError, ValueError) as error:
        raise Refused(str(error)) from error


async def _measured(application: ApplicationSection, neighbours: int) -> Mapping[str, Any]:
    """What a replica of the file tells of itself: started here, measured, ended. Nobody can call it."""
    from service.machine import Place
    from service.replica import Replica

    replica = Replica(application.args, place=Place(0, neighbours))
    try:
        await replica.start(application.deployments[0].user_config)
        return replica.info()
    finally:
        await replica.stop()


def told(found: list[Any], around: Mapping[int, Mapping[str, float]], options: argparse.Namespace) -> Iterator[str]:
    """The table, and what it takes no account of."""
    from service.capacity.search import TOLD, Capacity

    yield (
        f"level: first token within {options.first_token:g} s and {options.per_token:g} s a token, of {options.share:.0%} "
        "of the calls; times in seconds, p50 and p95"
    )
    yield (
        f"{'replicas':>8}{'machines':>9}{'calls/s':>9}{'first token':>16}{'per token':>18}{'busy':>6}{'HTTP':>6}{'refused':>8}"
        "  above it"
    )
    for each in found:
        layout, outcome = (each.layout, each.kept) if isinstance(each, Capacity) else each
        numbers = f"{'none':>9}" if outcome is None else _numbers(outcome)
        why = TOLD[each.bound] if isinstance(each, Capacity) else ""
        yield f"{layout.replicas:>8}{layout.machines:>9}{numbers}  {why}".rstrip()
    for neighbours, costs in around.items():
        machine = f"{neighbours} on a machine" if neighbours > 1 else "alone on its machine"
        if any(costs[name] for name in ("call_seconds", "token_seconds")):
            yield (
                f"a replica {machine}: HTTP takes {costs['call_seconds'] * 1e3:.1f} ms a call and "
                f"{costs['token_seconds'] * 1e3:.2f} ms a token, neighbours make a step {costs['crowding']:.2f} times as long"
            )
        else:
            yield f"a replica {machine}: HTTP costs nothing here, neighbours only CPUs; --url with --probe asks what they do"


def _numbers(outcome: Outcome) -> str:
    first, token = outcome.first_token_seconds, outcome.token_seconds
    times = f"{_pair(first, 3):>16}{_pair(token, 4):>18}"
    return f"{outcome.rate:>9.2f}{times}{outcome.utilisation:>6.0%}{outcome.front:>6.0%}{sum(outcome.refusals.values()):>8}"


def _pair(values: tuple[float, float] | None, digits: int) -> str:
    return "-" if values is None else f"{values[0]:.{digits}f} {values[1]:.{digits}f}"


def _plain(found: Capacity | tuple[Any, Outcome]) -> dict[str, Any]:
    return {"layout": asdict(found[0]), "outcome": asdict(found[1])} if isinstance(found, tuple) else asdict(found)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _count(text: str) -> int:
    if not (text.strip().isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be whole numbers above 0, received {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    return _between(text, float("inf"))


def _share(text: str) -> float:
    return _between(text, 1.0, is_within=True)


def _between(text: str, most: float, is_within: bool = False) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < most and not (is_within and number == most):
        raise argparse.ArgumentTypeError(
            f"must be a number above 0{f' and at most {most:g}' if is_within else ''}, received {text!r}"
        )
    return number
