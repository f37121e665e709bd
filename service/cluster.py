"""Ray as the command line needs it: start one on this machine, deploy a checked file on it, ask it, end it.

Beside `app.py` and `router.py` the only module that imports Ray. Two calls go through Serve's client, which is private:
`deploy_apps`, the call behind `serve run config.yaml` (the public `serve.run` would replace replicas when only the switch has
changed), and `get_serve_details`, the one behind `serve status`. Two more things are private: a handle's `_init`, which says
where it runs, and which of Ray's processes is its store.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",  # Ray runs what it is told: only this user's processes, who can read the token, may tell it
    "RAY_worker_niceness": "0",  # Ray's default of 15 lets any other process of the machine starve the model
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing of ours is reported to anybody
    # Ray's name for: this machine is a cluster of its own. Its node is 127.0.0.1 then, and all its daemons listen there only
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray would start a second one of its own for whoever calls it after the end: a handle's poll that comes back just then does
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "grpc_proxy": "",  # Serve's proxy calls replicas directly, whatever http_proxy says
    "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # three of these pass before a proxy that died is replaced; Ray's is 10
    # A replica that fails its health check has not moved for long: Ray would give it its time to drain all the same
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "service.http.proxy:middlewares",  # what stands around Serve's proxy
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # a line per request to a process that counts it; `/metrics` has what it counts
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",  # Ray's minute may be too short for what runs when its store has died
    "RAY_SERVE_LOG_TO_STDERR": "0",  # Serve's own lines stay in its files; ours are on stderr
    # From Serve's proxy to a replica over a connection, not through Ray's object store. It ends with the replica's process, but
    # for minutes not with the machine below it, so on several machines it stays off. An answer may be longer than gRPC's 4 MiB.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
}
HAPROXY_FILES = {  # Ray's own are in /tmp/haproxy-serve, with a socket that lets any user of the machine steer HAProxy
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
}
os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})  # Ray reads them on import

import ray  # noqa: E402
from ray import serve  # noqa: E402
from ray._private.ray_constants import PROCESS_TYPE_GCS_SERVER, PROCESS_TYPE_RAYLET  # noqa: E402
from ray.exceptions import RayError, RayTaskError  # noqa: E402
from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY  # noqa: E402
from ray.serve.exceptions import RayServeException  # noqa: E402
from ray.serve.schema import ServeDeploySchema  # noqa: E402

from service import scratch  # noqa: E402
from service.asking import Refused  # noqa: E402
from service.child import Signals, Stopped, catch, end_session  # noqa: E402
from service.config import DEPLOYMENT, ApplicationSection, AttentionConfig, ServeFile, ServiceConfig  # noqa: E402
from service.http import proxy as front  # noqa: E402

OBJECT_STORE_BYTES = 100 * 2**20  # requests and answers do not pass through it; Ray's default takes 30 % of the memory
POLL_SECONDS = 0.1
ASK_SECONDS = 10.0  # a replica's answer to a question about itself
DRAINED_SECONDS = 3.0  # beyond its time to drain, for a replica to say that it has
END_SECONDS = 3.0  # Ray's processes, once told to end; then they are killed
SERVE_NAMESPACE = "serve"
VITAL = {PROCESS_TYPE_GCS_SERVER: "Ray's store (GCS)", PROCESS_TYPE_RAYLET: "Ray's raylet"}  # processes by Ray's name for them

logging.getLogger("ray.serve").setLevel(logging.ERROR)


class Unanswered(Exception):
    """A replica has not answered a question: it died under it, is not up yet, or took too long."""


class DeployFailed(Exception):
    """An application did not come to run; the message is the replica's own."""


@contextmanager
def running(file: ServeFile, cpus: int, signals: Signals) -> Iterator[str]:
    """Ray on this machine and Serve's proxy, as the file says, for as long as the block lasts. The process leads a session.

    No dashboard, no usage report, a small object store. Yields the folder of Ray's sockets and logs, which like all of Ray's
    files is this user's alone. At the block's end Ray's processes are ended (who wants to drain does so before), and the folder
    goes, but for an error: its logs may tell why. `signals` are handled from the start to the end.

    Raises:
        Refused: Ray does not start.
        ConfigError: there is no place for what it keeps.
    """
    os.umask(0o077)
    scratch.close_token()
    folder = signals.folder = scratch.make_folder()
    keeps_logs = False
    try:
        try:
            _start(file, cpus, folder)
        except Exception as error:  # Ray raises many kinds, Exception itself among them
            raise Refused(f"Ray did not start: {_reason(str(error))} (its logs are in {folder})") from error
        catch(signals.handle)  # again, for Ray sets a handler of its own
        yield folder
    except Exception:
        keeps_logs = True
        raise
    finally:
        logging.getLogger("asyncio").disabled = True  # a handle's poll that comes back from here on shows that it finds no Ray
        ray.shutdown()
        end_session(os.getpid(), END_SECONDS)
        if not keeps_logs:
            shutil.rmtree(folder)


def _start(file: ServeFile, cpus: int, folder: str) -> None:
    os.environ[front.LIMITS] = file.applications[0].args.http.line.model_dump_json()  # the first application's, for all
    for name, path in HAPROXY_FILES.items():
        os.environ.setdefault(name, os.path.join(folder, path))
    ray.init(
        address="local",  # whatever RAY_ADDRESS says
        num_cpus=max(cpus, _reserved_cpus(file)),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        namespace=SERVE_NAMESPACE,
        logging_level="ERROR",
        _temp_dir=os.path.join(folder, "ray"),  # one below, for Ray opens it to everybody
    )
    options = file.http_options.model_dump(exclude_none=True)
    serve.start(proxy_location=file.proxy_location, http_options=options, logging_config={"log_level": "ERROR"})


def _reserved_cpus(file: ServeFile) -> int:
    """CPUs that the file's replicas reserve together. Ray would wait for ever for more than it was told there are."""
    reserved = 0.0
    for application in file.applications:
        (deployment,) = application.deployments
        options = deployment.ray_actor_options
        each = 1.0 if options is None or options.num_cpus is None else options.num_cpus
        reserved += each * (deployment.num_replicas if isinstance(deployment.num_replicas, int) else 1)
    return math.ceil(reserved)


def deploy(file: ServeFile, running: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Make the file the target of the running Serve. Replicas stay when only their `user_config` has changed.

    running: what `deployed` tells. Its `args` that mean the file's are sent as they came: Serve compares them as data and would
    restart every replica for a default that one side writes out and the other leaves out. Raises DeployFailed.
    """
    wanted = file.to_serve()
    for application, section in zip(file.applications, wanted["applications"], strict=True):
        told = (running or {}).get(application.name, {}).get("args", {})
        if ServiceConfig.model_validate(told) == application.args:
            section["args"] = told
    try:
        _client().deploy_apps(ServeDeploySchema.model_validate(wanted))
    except (RayError, RayServeException) as error:
        raise DeployFailed(f"Serve did not take the file: {_first_line(error)}") from error


def wait_until_running(file: ServeFile) -> None:
    """Return when every application of the file runs. Raises DeployFailed."""
    waiting = {application.name for application in file.applications}
    while waiting:
        if dead := _died():
            raise DeployFailed(f"{dead} has died")
        for name, application in _statuses().items():
            if application.status == "RUNNING":
                waiting.discard(name)
            if application.status == "DEPLOY_FAILED" and name in waiting:
                told = [application.message, *(each.message for each in application.deployments.values())]
                raise DeployFailed(_reason("\n".join(told)))
        time.sleep(POLL_SECONDS)


def _statuses() -> Mapping[str, Any]:
    """Each application's; none while Serve's controller is dead, which Ray starts again."""
    try:
        return dict(serve.status().applications)
    except (RayError, RayServeException):
        return {}


def outlived(stopped: Stopped) -> str | None:
    """None when `stopped` is set; what has died of Ray before: without it nothing can be started, so all has to end."""
    while not stopped.wait(POLL_SECONDS):
        if dead := _died():
            return dead
    return None


def _died() -> str | None:
    """The name of what has died of the Ray that this process has started, if any of it has."""
    processes = ray._private.worker._global_node.all_processes
    found = ((each.process, name) for kind, name in VITAL.items() for each in processes.get(kind, []))
    return next((name for process, name in found if process.poll() is not None), None)


def _reason(told: str) -> str:
    """The last line of a traceback, which is what was raised; else all there is."""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    raised = [
        line for line in lines if line.partition(":")[0].replace(".", "").isidentifier() and "Error" in line.partition(":")[0]
    ]
    return raised[-1] if raised else " ".join(lines)


def http_options() -> dict[str, Any]:
    """The address the running proxy was started with."""
    return dict(_details()["http_options"])


def deployed() -> dict[str, Any]:
    """The config that each running application was deployed with."""
    return {name: application["deployed_app_config"] for name, application in _details()["applications"].items()}


def report(file: ServeFile) -> dict[str, Any]:
    """Each application's status, and each of its replicas: state, switch, and process, which is None until it has a node."""
    return {
        application.name: _report_one(application, _details()["applications"].get(application.name))
        for application in file.applications
    }


def _report_one(application: ApplicationSection, found: Mapping[str, Any] | None) -> dict[str, Any]:
    if found is None:
        return {"status": "NOT_STARTED", "replicas": []}
    replicas = found["deployments"][DEPLOYMENT]["replicas"]
    try:
        switches = {state["replica"]: state for state in ask_replicas(application, "state", ASK_SECONDS)}
    except Unanswered:  # told by each replica's lack of a switch
        switches = {}
    return {
        "status": str(found["status"].value),
        "replicas": [
            {"pid": each.get("pid"), "state": str(each["state"].value), **switches.get(each["replica_id"], {})}
            for each in replicas
        ],
    }


def _details() -> Mapping[str, Any]:
    return cast(Mapping[str, Any], _client().get_serve_details())


def _client() -> Any:
    """Serve's client: private, see the module's docstring."""
    from ray.serve.context import _get_global_client

    return _get_global_client()


def ask_replicas(application: ApplicationSection, method: str, timeout_seconds: float) -> list[Any]:
    """Call a method of every running replica of an application. Raises Unanswered unless each has answered."""
    try:
        return list(_ask(application, method).results(timeout_s=timeout_seconds))
    except (RayError, RayServeException, TimeoutError) as error:
        raise Unanswered(f"a replica of {application.name} has not answered: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def rehearse(application: ApplicationSection, attention: AttentionConfig, timeout_seconds: float) -> None:
    """Have a running replica build and check what a switch names. Raises ValueError for what cannot serve, and Unanswered."""
    try:
        _handle(application).rehearse.remote(attention).result(timeout_s=timeout_seconds)
    except RayTaskError as error:
        raise ValueError(str(error.cause)) from error
    except (RayError, RayServeException, TimeoutError) as error:
        raise Unanswered(f"no replica of {application.name} has tried the switch: {error}") from error


def num_replicas(application: ApplicationSection) -> int:
    """How many replicas of an application Serve wants just now."""
    return int(_details()["applications"][application.name]["deployments"][DEPLOYMENT]["target_num_replicas"])


def drain(file: ServeFile, seconds: float) -> list[str]:
    """Have all replicas of all applications finish what runs, each within `seconds`. Returns what went wrong, a line each."""
    asked = {application.name: _ask(application, "drain") for application in file.applications}
    deadline = time.monotonic() + seconds + DRAINED_SECONDS
    faults = []
    for name, answers in asked.items():  # one that hangs or has died does not keep the others from draining
        found = answers.results(timeout_s=max(0.0, deadline - time.monotonic()), return_exceptions=True)
        faults += [f"{name} has not drained: {_first_line(each)}" for each in found if isinstance(each, Exception)]
    return faults


def ways_to_end(file: ServeFile) -> list[Any]:
    """Have at hand what ends the service in order: without Ray's store, which may die, none of it could be found.

    The applications' handles, which know their replicas from now on, are kept here; the proxies, as of now, are returned.
    """
    for application in file.applications:
        _handle(application)
    try:
        return _proxies()
    except (RayError, RayServeException, ValueError):  # one is just being replaced: it will be ended with the rest
        return []


def hang_up(known: Sequence[Any]) -> list[str]:
    """Have Serve's proxies end when they have answered what came to them. Returns what went wrong, a line each.

    `known`: those to tell where Ray's store has died.
    """
    deadline = time.monotonic() + END_SECONDS
    try:
        waiting = known if _died() else _proxies()
        while waiting and time.monotonic() < deadline:
            done = ray.get([proxy.__ray_call__.remote(front.hang_up) for proxy in waiting], timeout=END_SECONDS)
            waiting = [proxy for proxy, is_done in zip(waiting, done, strict=True) if not is_done]
            time.sleep(POLL_SECONDS / 2)
    except (RayError, RayServeException, TimeoutError, ValueError) as error:
        return [f"the proxy has not hung up: {_first_line(error)}"]
    return [f"callers of {len(waiting)} proxies do not read their answers"] * bool(waiting)


def _proxies() -> list[Any]:
    """Serve's, as actors. HAProxy is none: it is ended with the rest, and hangs up by itself."""
    if RAY_SERVE_ENABLE_HA_PROXY:
        return []
    names = [proxy["actor_name"] for proxy in _details()["proxies"].values()]
    return [ray.get_actor(name, namespace=SERVE_NAMESPACE) for name in names]


def _ask(application: ApplicationSection, method: str) -> Any:
    return _handle(application).broadcast(method)


def _handle(application: ApplicationSection) -> Any:
    handle = serve.get_deployment_handle(DEPLOYMENT, app_name=application.name)
    if not handle.is_initialized:  # under RAY_SERVE_THROUGHPUT_OPTIMIZED it would look for an event loop, and here is none
        handle._init(_run_router_in_separate_loop=True)
    return handle


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Joined to a running Ray for as long as the block lasts. Raises Refused when there is none, or none that lets us in."""
    try:
        ray.init(address=address, namespace=SERVE_NAMESPACE, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError, RayError) as error:
        token = "a service whose token is not the one in ~/.ray/auth_token now, as another user's, lets nobody in"
        raise Refused(f"{_first_line(error)}; {token}") from error
    try:
        yield
    finally:
        ray.shutdown()
