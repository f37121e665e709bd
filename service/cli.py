"""`longserve`: serve a config file, apply an edited one, tell how the service stands, plan, check or convert a model, and
tell what many replicas would hold.

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
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, get_args

from service import scratch
from service.asking import Refused, ask, ask_for, base_url, ray_address
from service.capacity.command import add_arguments
from service.capacity.command import run as run_on_paper
from service.child import Signals, run_in_own_session
from service.config import ApplicationSection, ConfigError, ServeFile, ServiceConfig, admin_keys, api_keys, read
from service.machine import available_cpus
from service.model import files

NICENESS = 5  # of an `apply`: its imports must not take the CPUs from those who are served
READY_SECONDS = 5.0  # how long an application that runs may take to answer through the proxy
BEHIND_THIS_FILE = Path(__file__).resolve().parent.parent / "deploy" / "local.yaml"
INSTALLED = Path(sysconfig.get_path("data")) / "share" / "longserve" / "local.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 when it failed, 2 when it was asked wrongly."""
    options = _parser().parse_args(argv)
    try:
        _check_folder()
        status = int(options.run(options))
        print(end="", flush=True)  # here, where it may fail
        return status
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except (Refused, OSError) as error:
        print(f"longserve {options.command}: {error}", file=sys.stderr)
        _give_up_stdout()
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _check_folder() -> None:
    """Raise for a working directory that has been deleted: what Ray and torch say then names another reason."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError("the folder that this was started in is gone; start it from another") from error


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
        (
            "capacity",
            capacity,
            "calls a second that so many replicas would hold, simulated; `python -m loadtests capacity` loads a real service",
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
            command.add_argument("text", type=argparse.FileType("rb"), help="a file with the prompt; - reads standard input")
            command.add_argument("--max-tokens", type=int, default=16)
        if name == "apply":
            command.add_argument("--restart", action="store_true", help="also what restarts replicas")
            command.add_argument("--rollback", action="store_true", help="the switch that served before, not the file's")
        if name == "capacity":
            add_arguments(command)
        if name == "check":
            command.add_argument("directory", type=Path, help="a checkpoint in Hugging Face format")
            for field in ("weights", "kv"):
                kinds = get_args(ServiceConfig.model_fields[field].annotation)
                command.add_argument(f"--{field}", choices=kinds, help="in the place of the config's")
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
    signals = Signals()
    status = run_in_own_session(lambda: _serve(config_path(options.file), signals), signals.handle)
    _give_up_stdout()  # all is told: one that takes nothing must not fail the exit
    if status > 128:
        left = f"{scratch.place()}/longserve-*"
        print(f"longserve serve: killed by {signal.Signals(status - 128).name}; {left} has what Ray logged", file=sys.stderr)
    return status


def _serve(path: Path, signals: Signals) -> int:
    began = time.monotonic()
    file = read(path)
    _check_startable(path, file)
    from service import cluster

    with cluster.running(file, available_cpus(), signals) as logs:
        try:
            cluster.deploy(file)
            cluster.wait_until_running(file)
            signals.serves = True
            _announce(file, time.monotonic() - began)
        except (cluster.DeployFailed, Refused) as error:
            raise Refused(f"the service did not start: {error} (Ray's logs are in {logs})") from error
        ways = cluster.ways_to_end(file)
        dead = cluster.outlived(signals.stopped)
        _drain(file, ways)
        if dead:
            raise Refused(f"{dead} has died, and all of Ray with it (its logs are in {logs})")
    return 0


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
        _give_up_stdout()


def _give_up_stdout() -> None:
    """What is left in its buffer, with nobody to take it, must not fail the exit."""
    with suppress(OSError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def curl_line(base: str, application: ApplicationSection) -> str:
    """One line to paste that gets an answer."""
    name = application.args.http.api_keys_env
    key = f' -H "authorization: Bearer ${name}"' if name else ""
    body = shlex.quote(json.dumps({"prompt": "def fibonacci(n):", "max_tokens": 32}))
    return f"curl {base}/v1/completions -H 'content-type: application/json'{key} -d {body}"


def _wait_until_ready(base: str, application: ApplicationSection) -> None:
    """Wait until the proxy routes to a ready replica. Raises Refused."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            ask(f"{base}/ready", application, timeout_seconds=READY_SECONDS)
            return
        except Refused as error:
            if time.monotonic() > deadline:
                raise Refused(f"it runs but is not ready: {error}") from error
        time.sleep(0.1)


def _drain(file: ServeFile, ways: Sequence[Any]) -> None:
    """Let every replica finish what runs, then every proxy what its callers have not read yet."""
    from service import cluster

    seconds = max(application.args.drain_seconds for application in file.applications)
    _tell(f"draining, at most {seconds:.0f} s; Ctrl-C again ends at once")
    for fault in [*cluster.drain(file, seconds), *cluster.hang_up(ways)]:
        _tell(f"longserve serve: {fault}")


def apply(options: argparse.Namespace) -> int:
    """Put the file in force; with --rollback the switch that served before, the rest of the file unchanged."""
    os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    path = config_path(options.file)
    file = read(path)
    from service import apply

    return apply.apply(path, file, may_restart=options.restart, is_rollback=options.rollback)


def status(options: argparse.Namespace) -> int:
    """Print each application's state and each replica's switch. Exit status 1 unless all run undegraded."""
    file = read(config_path(options.file))
    from service import cluster

    with cluster.connected(ray_address(file)):
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
    base, text = base_url(file, application), _text(options.text)
    backends = [each["name"] for each in ask_for(f"{base}/info", application, "attention", "backends")]
    print(f"{'backend':<16}{'tokens':>8}{'MiB':>9}{'seconds':>9}  verdict")
    for backend in backends:
        body = {"prompt": text, "max_tokens": options.max_tokens, "attention": backend}
        found = ask(f"{base}/v1/plan", application, body)["data"][0]
        size, seconds = found["needed_bytes"] / 2**20, sum(found["predicted_seconds"].values())
        why = f": {found['reason']}, longest {found['longest_tokens']} tokens" if found["reason"] else ""
        print(f"{backend:<16}{found['total_tokens']:>8}{size:>9.1f}{seconds:>9.2f}  {found['verdict']}{why}")
    for told, wish in (("no wish", {}), ("auto", {"attention": "auto"})):
        found = ask(f"{base}/v1/plan", application, {"prompt": text, "max_tokens": options.max_tokens, **wish})["data"][0]
        print(f"{told}: {found['backend']} ({found['why']})")
    return 0


def _text(file: BinaryIO) -> str:
    try:
        return file.read().decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file.name}: no UTF-8, {error.reason} at byte {error.start}") from error


def check(options: argparse.Namespace) -> int:
    """Print what the file's first application would make of a checkpoint."""
    application = read(config_path(options.file)).applications[0]
    from service.survey import survey  # brings torch

    try:
        args = application.args
        told = {field: getattr(options, field) for field in ("weights", "kv") if getattr(options, field) is not None}
        args = args.model_copy(update=told)
        for line in survey(options.directory, args, application.deployments[0].user_config.attention):
            print(line)
    except (FileNotFoundError, ValueError) as error:
        raise Refused(str(error)) from error
    return 0


def capacity(options: argparse.Namespace) -> int:
    """Print what so many replicas of the file's first application would hold."""
    return run_on_paper(options, read(config_path(options.file)))


def convert(options: argparse.Namespace) -> int:
    """Write a long encoder, and print how far it has moved."""
    from service.convert import convert as converted  # brings torch

    try:
        for line in converted(options.directory, options.target, options.length, options.window):
            print(line)
    except (FileNotFoundError, FileExistsError, ValueError) as error:
        raise Refused(str(error)) from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
