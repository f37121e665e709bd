"""Ray as the command line needs it: start one on this machine, deploy a checked file on it, ask it, end it.

Beside `app.py` the only module that imports Ray. Two calls go through Serve's client, which is private: `deploy_apps`, the
call behind `serve run config.yaml` (the public `serve.run` would replace replicas when only the switch has changed), and
`get_serve_details`, the one behind `serve status`.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",  # Ray runs what it is told: only this user's processes, who can read the token, may tell it
    "RAY_worker_niceness": "0",  # Ray's default of 15 lets any other process of the machine starve the model
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing of ours is reported to anybody
    "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "service.http.proxy:middlewares",  # what stands around Serve's proxy
    "RAY_SERVE_LOG_TO_STDERR": "0",  # Serve's own lines stay in its files; ours are on stderr
}
os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})  # Ray reads them on import

import ray  # noqa: E402
from ray import serve  # noqa: E402
from ray.serve.schema import ServeDeploySchema  # noqa: E402

from service.config import DEPLOYMENT, ApplicationSection, ServeFile  # noqa: E402
from service.http.proxy import LIMITS  # noqa: E402

OBJECT_STORE_BYTES = 100 * 2**20  # requests and answers do not pass through it; Ray's default takes 30 % of the memory
POLL_SECONDS = 0.1
ASK_SECONDS = 10.0  # a replica's answer to a question about itself
SERVE_NAMESPACE = "serve"

logging.getLogger("ray.serve").setLevel(logging.ERROR)


class DeployFailed(Exception):
    """An application did not come to run; the message is the replica's own."""


def start(file: ServeFile, cpus: int) -> None:
    """Start Ray on this machine and Serve's proxy, as the file says: no dashboard, no usage report, a small object store."""
    os.environ[LIMITS] = file.applications[0].args.http.line.model_dump_json()  # the first application's, for all
    ray.init(
        num_cpus=max(cpus, _reserved_cpus(file)),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        namespace=SERVE_NAMESPACE,
        logging_level="ERROR",
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


def deploy(file: ServeFile) -> None:
    """Make the file the target of the running Serve. Replicas stay when only their `user_config` has changed."""
    _client().deploy_apps(ServeDeploySchema.model_validate(file.to_serve()))


def wait_until_running(file: ServeFile, stopped: threading.Event) -> bool:
    """True when every application of the file runs, False when `stopped` is set before. Raises DeployFailed."""
    waiting = {application.name for application in file.applications}
    while not stopped.is_set():
        for name, application in serve.status().applications.items():
            if application.status == "RUNNING":
                waiting.discard(name)
            if application.status == "DEPLOY_FAILED" and name in waiting:
                raise DeployFailed(_reason(application))
        if not waiting:
            return True
        stopped.wait(POLL_SECONDS)
    return False


def _reason(application: Any) -> str:
    """The last line of the replica's traceback, which is what was raised; else all there is."""
    told = "\n".join([application.message, *(each.message for each in application.deployments.values())])
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    raised = [
        line for line in lines if line.partition(":")[0].replace(".", "").isidentifier() and "Error" in line.partition(":")[0]
    ]
    return raised[-1] if raised else told


def http_options() -> dict[str, Any]:
    """The address the running proxy was started with."""
    return dict(_details()["http_options"])


def deployed() -> dict[str, Any]:
    """The config that each running application was deployed with."""
    return {name: application["deployed_app_config"] for name, application in _details()["applications"].items()}


def report(file: ServeFile) -> dict[str, Any]:
    """Each application's status, and each of its replicas: state, process and switch."""
    return {
        application.name: _report_one(application, _details()["applications"].get(application.name))
        for application in file.applications
    }


def _report_one(application: ApplicationSection, found: Mapping[str, Any] | None) -> dict[str, Any]:
    if found is None:
        return {"status": "NOT_STARTED", "replicas": []}
    replicas = found["deployments"][DEPLOYMENT]["replicas"]
    switches = {state["replica"]: state for state in ask_replicas(application, "state", ASK_SECONDS)}
    return {
        "status": str(found["status"].value),
        "replicas": [
            {"pid": each["pid"], "state": str(each["state"].value), **switches.get(each["replica_id"], {})} for each in replicas
        ],
    }


def _details() -> Mapping[str, Any]:
    return cast(Mapping[str, Any], _client().get_serve_details())


def _client() -> Any:
    """Serve's client: private, see the module's docstring."""
    from ray.serve.context import _get_global_client

    return _get_global_client()


def ask_replicas(application: ApplicationSection, method: str, timeout_seconds: float) -> list[Any]:
    """Call a method of every running replica of an application. Raises what one of them raises, or TimeoutError."""
    handle = serve.get_deployment_handle(DEPLOYMENT, app_name=application.name)
    return list(handle.broadcast(method).results(timeout_s=timeout_seconds))


def stop() -> None:
    """End the Ray that this process started, Serve and all its processes with it. Who wants to drain does so before."""
    ray.shutdown()


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Joined to a running Ray for as long as the block lasts. Raises ConnectionError when there is none."""
    ray.init(address=address, namespace=SERVE_NAMESPACE, logging_level="ERROR", log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
