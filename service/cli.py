"""`longserve`: serve a config file, apply an edited one, tell how the service stands, plan, check or convert a model.

Ray is imported only by the commands that need it; `plan` speaks HTTP.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from service.child import heeded, run_in_own_session
from service.config import ApplicationSection, AttentionConfig, ConfigError, ServeFile, UserConfig, admin_keys, api_keys, read
from service.difference import RESTARTING, Change, differences
from service.machine import available_cpus
from service.model import files

READY_SECONDS = 5.0  # how long an application that runs may take to answer through the proxy
SAME_SIGNAL_SECONDS = 0.5  # a terminal and a wrapper may both pass on one Ctrl-C
NICENESS = 5  # of an `apply`: its imports and its rehearsal must not take the CPUs from those who are served
SWITCH_SECONDS = 120.0  # how long building and checking new backends may take
BEHIND_THIS_FILE = Path(__file__).resolve().parent.parent / "deploy" / "local.yaml"
INSTALLED = Path(sysconfig.get_path("data")) / "share" / "longserve" / "local.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 when it failed, 2 when it was asked wrongly."""
    options = _parser().parse_args(argv)
    try:
        return int(options.run(options))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except (Refused, ConnectionError) as error:
        print(f"longserve {options.command}: {error}", file=sys.stderr)
        return 1


class Refused(Exception):
    """The command cannot do what it was asked; the message says why and what helps."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="longserve", description="Serve long inputs under switchable attention.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, help in (
        ("serve", serve, "start the service and stay until Ctrl-C"),
        ("apply", apply, "put an edited file in force in the running service; tells first what it changes"),
        ("status", status, "how the running service stands"),
        ("plan", plan, "what a text would cost under each backend, and whether it would be let in now"),
        (
            "convert",
            convert,
            "write a BERT or RoBERTa that reads long texts: positions copied, windows, a first token that sees all",
        ),
        (
            "check",
            check,
            "what a checkpoint would be served as: what is lossy, bytes by length; starts nothing",
        ),
    ):
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=run)
        if name == "convert":
            command.add_argument("directory", type=Path, help="a checkpoint in Hugging Face format")
            command.add_argument("target", type=Path, help="the directory to write, which is not there yet")
            command.add_argument("--length", type=int, default=4096, help="tokens of the longest text")
            command.add_argument("--window", type=int, default=512, help="tokens that a token sees, both sides together")
            continue
        if name == "plan":
            command.add_argument("text", type=argparse.FileType("r"), help="a file with the prompt; - reads standard input")
            command.add_argument("--max-tokens", type=int, default=16)
        if name == "apply":
            command.add_argument("--restart", action="store_true", help="also what restarts replicas")
            command.add_argument("--rollback", action="store_true", help="the switch that served before, not the file's")
        if name == "check":
            command.add_argument("directory", type=Path, help="a checkpoint in Hugging Face format")
        command.add_argument("file", nargs="?", type=Path, help="a Serve config; by default deploy/local.yaml")
    return parser


def config_path(given: Path | None) -> Path:
    """The config file to use: the one given, else the `local.yaml` of this checkout or installation."""
    if given is not None:
        return given
    found = next((path for path in (BEHIND_THIS_FILE, INSTALLED) if path.is_file()), None)
    if found is None:
        raise ConfigError(f"no config file given, and none at {BEHIND_THIS_FILE} or {INSTALLED}")
    return found


def serve(options: argparse.Namespace) -> int:
    """Start Ray, deploy the file, stay until a signal, drain, end all of it."""
    return run_in_own_session(lambda: _serve(config_path(options.file)))


def _serve(path: Path) -> int:
    began, stopped = time.monotonic(), threading.Event()
    handle = _stopper(stopped)
    _catch(handle)
    file = read(path)
    _check_startable(path, file)
    from service import cluster

    try:
        with cluster.running(file, available_cpus()) as logs:
            _catch(handle)  # again, for Ray sets handlers of its own
            try:
                cluster.deploy(file)
                if cluster.wait_until_running(file, stopped):
                    _announce(file, time.monotonic() - began)
                    stopped.wait()
                    _drain(file)
            except (cluster.DeployFailed, Refused) as error:
                raise Refused(f"the service did not start: {error} (Ray's logs are in {logs})") from error
    except KeyboardInterrupt:
        _tell("ended at once")
    return 0


Handler = Callable[[int, FrameType | None], None]


def _stopper(stopped: threading.Event) -> Handler:
    """A signal handler that sets `stopped` at the first signal; a later one is a KeyboardInterrupt."""
    first = 0.0

    def handle(_: int, __: FrameType | None) -> None:
        nonlocal first
        if stopped.is_set() and time.monotonic() - first > SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt
        first = first or time.monotonic()
        stopped.set()

    return handle


def _catch(handle: Handler) -> None:
    for number in heeded():
        signal.signal(number, handle)


def _check_startable(path: Path, file: ServeFile) -> None:
    """Raise for what would fail later and less clearly: keys that are not there, a model that is not, a port in use."""
    for index, application in enumerate(file.applications):
        model = application.args.model
        try:
            if model != "embedded":
                files.find(Path(model))
        except FileNotFoundError as error:
            raise ConfigError(f"{path}: applications.{index}.args.model: {error}") from error
        try:
            api_keys(application.args.http)
            admin_keys(application.args.http)
        except ValueError as error:
            raise ConfigError(f"{path}: applications.{index}.args.{error}") from error
    host, port = file.http_options.host, file.http_options.port
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise Refused(f"cannot listen on {host} port {port} ({error.strerror}); change http_options in {path}") from error


def _announce(file: ServeFile, seconds: float) -> None:
    for application in file.applications:
        base = base_url(file, application)
        _wait_until_ready(base, application)
        _tell(f"{application.name} is ready at {base} after {seconds:.1f} s; Ctrl-C stops it")
        _tell(f"  {curl_line(base, application)}")


def _tell(line: str) -> None:
    """Print a line of a service's life. With nobody to read it, as after a hang-up of the terminal, that life goes on."""
    try:
        print(line, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, what is left in the old one's buffer must not fail the exit


def curl_line(base: str, application: ApplicationSection) -> str:
    """One line to paste that gets an answer."""
    name = application.args.http.api_keys_env
    key = f' -H "authorization: Bearer ${name}"' if name else ""
    body = shlex.quote(json.dumps({"prompt": "def fibonacci(n):", "max_tokens": 32}))
    return f"curl {base}/v1/completions -H 'content-type: application/json'{key} -d {body}"


def _wait_until_ready(base: str, application: ApplicationSection) -> None:
    """Wait until the proxy routes to a ready replica. Raises Refused."""
    last = ""
    for _ in range(int(READY_SECONDS / 0.1)):
        try:
            _get(f"{base}/ready", application)
            return
        except Refused as error:
            last = str(error)
            time.sleep(0.1)
    raise Refused(f"it runs but is not ready: {last}")


def _drain(file: ServeFile) -> None:
    """Let every replica finish what runs."""
    from service import cluster

    seconds = max(application.args.drain_seconds for application in file.applications)
    _tell(f"draining, at most {seconds:.0f} s; Ctrl-C again ends at once")
    for fault in cluster.drain(file, seconds):
        _tell(f"longserve serve: {fault}")


def apply(options: argparse.Namespace) -> int:
    """Put the file in force; with --rollback the switch that served before, the rest of the file unchanged.

    Tells what changes first. Refused where that would restart replicas and --restart is not given, and where a backend
    cannot serve, before Ray hears of it.
    """
    os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    path = config_path(options.file)
    file = read(path)
    from service import cluster

    with cluster.connected(_ray_address(file)):
        file = _as_before(file) if options.rollback else file
        running = cluster.deployed()
        changes = _changes(file, cluster.http_options(), running)
        print("\n".join(map(str, changes)) or "nothing differs from what the service was told last", flush=True)
        if not options.restart and (restarting := [change.key for change in changes if change.restarts]):
            raise Refused(f"{', '.join(restarting)} would restart the replicas; with --restart they are")
        _rehearse(path, file)
        return _put_in_force(file, running)


def _put_in_force(file: ServeFile, running: Mapping[str, Any]) -> int:
    """Have Serve make the file true, wait for every replica, tell how it went."""
    from service import cluster

    try:
        cluster.deploy(file, running)
        cluster.wait_until_running(file, threading.Event())
    except cluster.DeployFailed as error:
        raise Refused(f"the service does not run as the file says: {error}") from error
    states = {application.name: _switched(application) for application in file.applications}
    for name, replicas in states.items():
        for state in replicas:
            print(f"{name}, replica {state['replica']}: {_told_switch(state)}")
    served = _as_served(file, states)
    if served == file:
        return 0
    print("longserve apply: the switch failed; the former one stays in force, and the file's is forgotten", file=sys.stderr)
    cluster.deploy(served, running)  # else a replica that is restarted would try the one that failed
    for application in served.applications:
        _switched(application)
    return 1


def _told_switch(state: Mapping[str, Any]) -> str:
    switch = state["attention"]
    serves = f"serves {switch['default']} of {', '.join(switch['backends'])}"
    return f"failed: {state['degraded']}; {serves} as before" if state["degraded"] else serves


def _as_before(file: ServeFile) -> ServeFile:
    """The file with the switch that served each application before the present one. Raises Refused where none has."""
    from service import cluster

    def before(application: ApplicationSection) -> ApplicationSection:
        try:
            found = [each for each in cluster.ask_replicas(application, "former", cluster.ASK_SECONDS) if each]
        except cluster.Unanswered as error:
            raise Refused(str(error)) from error
        if not found:
            raise Refused(f"no other switch has served {application.name} since it was started")
        return _with_switch(application, AttentionConfig.model_validate(found[0]))

    return file.model_copy(update={"applications": [before(application) for application in file.applications]})


def _with_switch(application: ApplicationSection, attention: AttentionConfig) -> ApplicationSection:
    (deployment,) = application.deployments
    user = UserConfig(attention=attention)
    return application.model_copy(update={"deployments": [deployment.model_copy(update={"user_config": user})]})


def _rehearse(path: Path, file: ServeFile) -> None:
    """Build and check the file's backends here, without weights. Raises ConfigError for one that cannot serve."""
    from service.survey import rehearse

    for index, application in enumerate(file.applications):
        told = _get(f"{base_url(file, application)}/info", application)
        switch = application.deployments[0].user_config.attention
        try:
            rehearse(application.args, switch, str(told["dtype"]), int(told["memory_budget_bytes"]))
        except (ValueError, FileNotFoundError) as error:
            where = f"applications.{index}.deployments.0.user_config.attention"
            raise ConfigError(f"{path}: {where}: {error}") from error


def _as_served(file: ServeFile, states: Mapping[str, Sequence[Mapping[str, Any]]]) -> ServeFile:
    """The file with the switch that is in force where its own failed."""

    def served(application: ApplicationSection) -> ApplicationSection:
        former = [state["attention"] for state in states[application.name] if state["degraded"]]
        if not former:
            return application
        return _with_switch(application, AttentionConfig.model_validate(former[0]))

    return file.model_copy(update={"applications": [served(application) for application in file.applications]})


def _changes(file: ServeFile, address: Mapping[str, Any], deployed: Mapping[str, Any]) -> list[Change]:
    """What the file changes of the running service. Raises Refused where only another service could be it."""
    if (address["host"], address["port"]) != (file.http_options.host, file.http_options.port):
        raise Refused(f"http_options: the service listens on {address['host']}:{address['port']}, which only a restart changes")
    if (names := sorted(deployed)) != sorted(application.name for application in file.applications):
        raise Refused(f"applications: the service runs {', '.join(names)}; another set needs a restart")
    changes = []
    for index, wanted in enumerate(file.to_serve()["applications"]):
        found = differences(_meant(deployed[wanted["name"]]), wanted)
        changes += [replace(change, key=f"applications.{index}.{change.key}") for change in found]
    return changes


def _meant(told: Mapping[str, Any]) -> dict[str, Any]:
    """A deployed section with the defaults that whoever deployed it has left out."""
    section = ApplicationSection.model_validate({key: told[key] for key in RESTARTING if key in told})
    return {**told, **section.model_dump(mode="json", include=set(RESTARTING), exclude_none=True)}


def _switched(application: ApplicationSection) -> list[dict[str, Any]]:
    """The replicas' switches, once each has done with the file's. Raises Refused when that takes too long.

    One that dies meanwhile is waited for: Serve starts another in its place, with the file's switch.
    """
    from service import cluster

    wanted = application.deployments[0].user_config.attention.model_dump()
    deadline, last = time.monotonic() + SWITCH_SECONDS, ""
    while time.monotonic() < deadline:
        try:
            states = cluster.ask_replicas(application, "state", cluster.ASK_SECONDS)
        except cluster.Unanswered as error:
            last = f" ({error})"
        else:
            done = [state for state in states if state["asked"] == wanted and not state["switching"]]
            if len(done) == len(states) == cluster.num_replicas(application):
                return states
        time.sleep(cluster.POLL_SECONDS)
    seconds = f"{SWITCH_SECONDS:.0f} s"
    raise Refused(f"{application.name} has not switched within {seconds}{last}; longserve status tells how it stands")


def _ray_address(file: ServeFile) -> str:
    """Where the Ray of the service behind the file's address is: the service itself says it."""
    application = file.applications[0]
    return str(_get(f"{base_url(file, application)}/info", application)["replica"]["ray_address"])


def status(options: argparse.Namespace) -> int:
    """Print each application's state and each replica's switch. Exit status 1 unless all run undegraded."""
    file = read(config_path(options.file))
    from service import cluster

    with cluster.connected(_ray_address(file)):
        report = cluster.report(file)
    print(json.dumps(report, indent=2))
    return 0 if all(map(_is_well, report.values())) else 1


def _is_well(application: Mapping[str, Any]) -> bool:
    """Whether it runs and every replica serves what it was asked to. One that has not told its switch does not."""
    return application["status"] == "RUNNING" and all(
        each.get("degraded", "untold") is None for each in application["replicas"]
    )


def plan(options: argparse.Namespace) -> int:
    """Print what the text would cost under each backend of the running service."""
    file = read(config_path(options.file))
    application = file.applications[0]
    base, text = base_url(file, application), options.text.read()
    backends = [each["name"] for each in _get(f"{base}/info", application)["attention"]["backends"]]
    print(f"{'backend':<16}{'tokens':>8}{'MiB':>9}{'seconds':>9}  verdict")
    for backend in backends:
        body = {"prompt": text, "max_tokens": options.max_tokens, "attention": backend}
        found = _get(f"{base}/v1/plan", application, body)["data"][0]
        size, seconds = found["needed_bytes"] / 2**20, sum(found["predicted_seconds"].values())
        why = f": {found['reason']}, longest {found['longest_tokens']} tokens" if found["reason"] else ""
        print(f"{backend:<16}{found['total_tokens']:>8}{size:>9.1f}{seconds:>9.2f}  {found['verdict']}{why}")
    for told, wish in (("no wish", {}), ("auto", {"attention": "auto"})):
        found = _get(f"{base}/v1/plan", application, {"prompt": text, "max_tokens": options.max_tokens, **wish})["data"][0]
        print(f"{told}: {found['backend']} ({found['why']})")
    return 0


def check(options: argparse.Namespace) -> int:
    """Print what the file's first application would make of a checkpoint."""
    application = read(config_path(options.file)).applications[0]
    from service.survey import survey  # brings torch

    try:
        for line in survey(options.directory, application.args, application.deployments[0].user_config.attention):
            print(line)
    except (FileNotFoundError, ValueError) as error:
        raise Refused(str(error)) from error
    return 0


def convert(options: argparse.Namespace) -> int:
    """Write a long encoder, and print how far it has moved."""
    from service.convert import convert as converted  # brings torch

    try:
        for line in converted(options.directory, options.target, options.length, options.window):
            print(line)
    except (FileNotFoundError, FileExistsError, ValueError) as error:
        raise Refused(str(error)) from error
    return 0


def base_url(file: ServeFile, application: ApplicationSection) -> str:
    """Where this machine reaches an application."""
    options = file.http_options
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(
        options.host, f"[{options.host}]" if ":" in options.host else options.host
    )
    return f"{'https' if options.ssl_certfile else 'http'}://{host}:{options.port}{application.route_prefix.rstrip('/')}"


def _get(url: str, application: ApplicationSection, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON a route answers; POST when there is a body. Raises Refused with the service's own words, if it has some."""
    name = application.args.http.api_keys_env
    headers = {"content-type": "application/json"}
    if name and (keys := os.environ.get(name)):
        headers["authorization"] = f"Bearer {keys.split(',')[0].strip()}"
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return dict(json.load(response))
    except urllib.error.HTTPError as error:
        told = error.read().decode(errors="replace")
        raise Refused(f"{url} answered {error.code}: {told}") from error
    except urllib.error.URLError as error:
        raise Refused(f"nothing answers at {url} ({error.reason}); longserve serve starts the service") from error


if __name__ == "__main__":
    sys.exit(main())
