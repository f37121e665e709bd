"""`longserve apply`: what an edited file changes, a rehearsal of it, the change itself, and how it went in each replica."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from service import cluster
from service.asking import Refused, ask, base_url, ray_address
from service.config import ApplicationSection, AttentionConfig, ConfigError, ServeFile, UserConfig
from service.difference import RESTARTING, Change, differences

SWITCH_SECONDS = 120.0  # how long building and checking new backends may take


def apply(path: Path, file: ServeFile, *, may_restart: bool, is_rollback: bool) -> int:
    """Put a file in force, or what served before it; returns the exit status.

    Tells what changes first. Refused where that would restart replicas and must not, and where a backend cannot serve, before
    Serve hears of it.
    """
    with cluster.connected(ray_address(file)):
        file = _as_before(file) if is_rollback else file
        running = cluster.deployed()
        changes = _changes(file, cluster.http_options(), running)
        print("\n".join(map(str, changes)) or "nothing differs from what the service was told last", flush=True)
        restarting = [change.key for change in changes if change.restarts]
        if restarting and not may_restart:
            raise Refused(f"{', '.join(restarting)} would restart the replicas; with --restart they are")
        _rehearse(path, file, restarts=bool(restarting))
        return _put_in_force(file, running)


def _put_in_force(file: ServeFile, running: Mapping[str, Any]) -> int:
    """Have Serve make the file true, wait for every replica, tell how it went."""
    try:
        cluster.deploy(file, running)
        cluster.wait_until_running(file)
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


def _rehearse(path: Path, file: ServeFile, *, restarts: bool) -> None:
    """Build and check the file's backends, and let go of them. Raises ConfigError for one that cannot serve.

    A running replica does it, between the steps of requests: it has the model and the machine. Not where it is to be another
    model or dtype: then it is done here, without weights, for the replicas are about to be restarted anyway.
    """
    for index, application in enumerate(file.applications):
        switch = application.deployments[0].user_config.attention
        try:
            if restarts:
                _rehearse_here(file, application, switch)
            else:
                cluster.rehearse(application, switch, SWITCH_SECONDS)
        except cluster.Unanswered as error:
            raise Refused(str(error)) from error
        except (ValueError, FileNotFoundError) as error:
            where = f"applications.{index}.deployments.0.user_config.attention"
            raise ConfigError(f"{path}: {where}: {error}") from error


def _rehearse_here(file: ServeFile, application: ApplicationSection, switch: AttentionConfig) -> None:
    from service.survey import rehearse

    told = ask(f"{base_url(file, application)}/info", application)
    rehearse(application.args, switch, str(told["dtype"]), int(told["memory_budget_bytes"]))


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
    (deployment,) = told.get("deployments") or [{}]
    user = UserConfig.model_validate(deployment.get("user_config") or {}).model_dump(mode="json", exclude_none=True)
    plain = section.model_dump(mode="json", include=set(RESTARTING), exclude_none=True)
    return {**told, **plain, "deployments": [{**deployment, "user_config": user}]}


def _switched(application: ApplicationSection) -> list[dict[str, Any]]:
    """The replicas' switches, once each has done with the file's. Raises Refused when that takes too long.

    One that dies meanwhile is waited for: Serve starts another in its place, with the file's switch.
    """
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
