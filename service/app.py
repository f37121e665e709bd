"""The service as a Ray Serve application: one deployment, whose ingress replica holds model and engine.

No gateway in front: a second hop costs two thirds of the throughput and 25 times per streamed token. `build` is what a
Serve config's `import_path` names. `user_config` is the attention switch, everything else an argument.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import ray
from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray._common.network_utils import build_address
from ray.experimental import internal_kv
from ray.serve import context as context_of_serve
from ray.serve._private import replica as serve_replica
from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY
from ray.serve.schema import ServeDeploySchema
from starlette.types import ASGIApp

from service import logs
from service.config import DEPLOYMENT, IMPORT_PATH, AttentionConfig, ServiceConfig, UserConfig, explain
from service.exposition import Families, Format, Gathered
from service.machine import Place
from service.replica import Replica
from service.routing import TOLD_SECONDS, Told
from service.scaling import HOLDS, WORK
from service.switch import LastServed

MOST_CALLS = 1000  # that Serve lets a replica have at a time, unless a config says so: by its own 5 no batch would fill
AUTO_REPLICAS = 100  # what Serve's `num_replicas: auto` may grow to
KEPT_SWITCHES = 10  # of those that served last
ASK_SECONDS = 10.0  # a replica's answer to a question about itself
SWITCH_SECONDS = 120.0  # how long building and checking may take
POLL_SECONDS = 0.1
GATHER_SECONDS = 2.0  # a replica that takes longer to export its metrics is counted as missing

_SWITCHES = TypeAdapter(list[AttentionConfig])
logger = logging.getLogger("longserve.app")


class Longserve:
    """The deployment: hands Ray Serve's calls to a `Replica`."""

    def __init__(self, config: ServiceConfig) -> None:
        logs.install(config.log_file)
        _listen_on_the_node_only()
        self._context = serve.get_replica_context()
        self._name: str = self._context.replica_tag
        self._peers: Any = None  # a handle on this deployment, made at the first scrape
        self._started = False
        self._kept = KeptByRay(self._context.app_name)
        self._replica = Replica(
            config,
            name=self._name,
            facts={"ray_address": ray.get_runtime_context().gcs_address},  # where `longserve apply` finds this service
            gather=self._gather,
            echoes_request_id=False,  # Serve's proxy does
            place=_place(self._context),
            last_served=self._kept,
            admin=AdminByRay(self),
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._replica.app

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take a new switch.

        The first call belongs to the start: it ends when the replica can answer, and raises what hinders it. Later ones
        return in milliseconds and never raise: Serve takes a replica that reconfigures out of routing, and replaces one
        that raises.
        """
        if self._started:
            self._replica.retarget(user_config)
        else:
            await self._replica.start(user_config)
            self._started = True

    def check_health(self) -> None:
        """Raise when this replica should be replaced."""
        if fault := self._replica.fault():
            raise RuntimeError(fault)

    def record_routing_stats(self) -> Told:
        """This replica's work, for `service/router.py`; Serve sends it on when it differs from the last."""
        return self._replica.work()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The same, for `service/scaling.py`."""
        return {WORK: self._replica.work().get("outstanding_seconds", 0.0), HOLDS: float(self._replica.holds_pins)}

    async def export(self, format: Format) -> tuple[str, Families]:
        """This replica's name and metrics, for the one that answers a scrape."""
        return self._name, await self._replica.export(format)

    async def ask_all(self, method: str, *arguments: Any, seconds: float) -> list[Any]:
        """What a method of this deployment answers in every replica that runs; an exception for one that does not answer."""
        if self._peers is None:
            self._peers = serve.get_deployment_handle(DEPLOYMENT, app_name=self._context.app_name)
        asked = self._peers.broadcast(method, *arguments)
        return list(await asked.results_async(timeout_s=seconds, return_exceptions=True))

    async def rehearse(self, attention: AttentionConfig) -> None:
        """Build and check a switch here. Raises ValueError for a backend that cannot serve."""
        await self._replica.rehearse(attention)

    async def redeploy(self, attention: AttentionConfig) -> None:
        """Have Serve put a switch in force in all replicas, and in those that it starts later."""
        await asyncio.to_thread(_redeploy, self._context.app_name, attention)

    async def num_replicas(self) -> int:
        """How many replicas Serve wants just now."""
        details = await asyncio.to_thread(lambda: context_of_serve._get_global_client().get_serve_details())
        return int(details["applications"][self._context.app_name]["deployments"][DEPLOYMENT]["target_num_replicas"])

    def admin_state(self) -> dict[str, Any]:
        """This replica's switch and its changes of late."""
        return self._replica.admin_state()

    async def check_truth(self) -> dict[str, Any]:
        """Check what this replica serves against its definition."""
        return await self._replica.check_truth()

    def state(self) -> dict[str, Any]:
        """This replica's switch, for `longserve apply`."""
        return dict(self._replica.readiness())

    async def former(self) -> dict[str, Any] | None:
        """The switch that served before the one in force, for `longserve apply --rollback`; None: there was no other."""
        in_force = self._replica.readiness()["attention"]
        former = [each.model_dump() for each in await self._kept.all()]
        return next((each for each in reversed(former) if each != in_force), None)

    async def drain(self) -> None:
        """Admit nothing more and finish what runs, for `longserve serve` at its end."""
        await self._replica.drain()

    async def __del__(self) -> None:
        await self._replica.stop()

    async def _gather(self, format: Format) -> Gathered:
        """All replicas' metrics: this one's, and those of the peers that answer in time."""
        answers = await self.ask_all("export", format, seconds=GATHER_SECONDS)
        arrived = dict(answer for answer in answers if not isinstance(answer, BaseException))
        missing = len(answers) - len(arrived)
        if self._name not in arrived:  # Serve does not count it among those that answer: it starts, or it drains
            arrived[self._name] = await self._replica.export(format)
        return Gathered(list(arrived.values()), missing)


class AdminByRay:
    """The `Admin` of a deployment: asks all replicas, and has Serve keep the switch for those that it starts later."""

    def __init__(self, deployment: Longserve) -> None:
        self._deployment = deployment

    async def states(self) -> list[Mapping[str, Any]]:
        return await self._all("admin_state", ASK_SECONDS)

    async def switch(self, attention: AttentionConfig) -> list[Mapping[str, Any]]:
        await self._deployment.rehearse(attention)
        await self._deployment.redeploy(attention)
        wanted, deadline = attention.model_dump(), time.monotonic() + SWITCH_SECONDS
        while time.monotonic() < deadline:
            states = await self.states()
            done = [state for state in states if state["asked"] == wanted and not state["switching"]]
            if len(done) == len(states) == await self._deployment.num_replicas():  # Serve asks none that it is telling just now
                break
            await asyncio.sleep(POLL_SECONDS)
        if failed := [state for state in states if state["degraded"]]:  # a replica that is restarted must not try it again
            await self._deployment.redeploy(AttentionConfig.model_validate(failed[0]["attention"]))
        return states

    async def check_truth(self) -> list[Mapping[str, Any]]:
        return await self._all("check_truth", SWITCH_SECONDS)

    async def _all(self, method: str, seconds: float) -> list[Mapping[str, Any]]:
        answers = await self._deployment.ask_all(method, seconds=seconds)
        return [answer for answer in answers if not isinstance(answer, BaseException)]


def _redeploy(application: str, attention: AttentionConfig) -> None:
    """Tell Serve all that it was told, but for the switch of one application."""
    user = UserConfig(attention=attention).model_dump(mode="json", exclude_none=True)
    client = context_of_serve._get_global_client()
    sections = [dict(each["deployed_app_config"] or {}) for each in client.get_serve_details()["applications"].values()]
    for section in sections:
        if section.get("name") == application:
            (deployment,) = section.get("deployments") or [{"name": DEPLOYMENT}]
            section["deployments"] = [{**deployment, "user_config": user}]
    client.deploy_apps(ServeDeploySchema.model_validate({"applications": sections}))


class KeptByRay(LastServed):
    """The switches that served last, in the key-value store of the Ray cluster: they live as long as that."""

    def __init__(self, application: str) -> None:
        self._key = f"switches:{application}"

    async def recall(self) -> AttentionConfig | None:
        return next(reversed(await self.all()), None)

    async def all(self) -> list[AttentionConfig]:
        """The newest last. Never raises."""
        try:
            kept = await asyncio.to_thread(internal_kv._internal_kv_get, self._key, namespace=DEPLOYMENT)
            return [] if kept is None else _SWITCHES.validate_json(kept)
        except Exception:  # the store is away, or holds what another version wrote: as good as nothing kept
            logger.exception("the switches that served last cannot be recalled")
            return []

    async def keep(self, config: AttentionConfig) -> None:
        former = await self.all()
        if former[-1:] == [config]:  # the other replicas say the same
            return
        kept = _SWITCHES.dump_json([*former, config][-KEPT_SWITCHES:])
        try:
            await asyncio.to_thread(internal_kv._internal_kv_put, self._key, kept, namespace=DEPLOYMENT)
        except Exception:  # it serves all the same
            logger.exception("the switch cannot be kept for a replica that is restarted")


_deployment: Any = serve.deployment(
    serve.ingress()(Longserve),
    name=DEPLOYMENT,
    user_config=UserConfig().model_dump(mode="json"),  # without one, Serve never calls `reconfigure`
    logging_config={"enable_access_log": False},  # a line per request in Serve's files; `log_level: info` writes a better one
    max_ongoing_requests=MOST_CALLS,  # an outer wall; the engine's own queue is the real one
    max_constructor_retry_count=1,  # a wrong config does not get better by trying
)

_routed: Any = _deployment
if not RAY_SERVE_ENABLE_HA_PROXY:  # which sends to replicas past Serve's router, and Serve refuses one that would not be asked
    _routed = _deployment.options(
        request_router_config={
            "request_router_class": "service.router:LeastWork",
            "request_routing_stats_period_s": TOLD_SECONDS,
        }
    )


def build(args: dict[str, Any]) -> serve.Application:
    """The application of a Serve config's `args`. Raises ValueError naming key, value and what is allowed."""
    try:
        config = ServiceConfig.model_validate(args)
    except ValidationError as error:
        raise ValueError("\n".join(f"args.{fault}" for fault in explain(error, ServiceConfig))) from error
    return _routed.bind(config)


def _place(context: Any) -> Place:
    """Where this replica stands among all that Serve may put on its node: those of other applications count too."""
    node = next(each["Resources"] for each in ray.nodes() if each["NodeID"] == ray.get_runtime_context().get_node_id())
    details = context_of_serve._get_global_client().get_serve_details()["applications"]
    configs = {name: each["deployed_app_config"] or {} for name, each in details.items()}
    sections: dict[str, Mapping[str, Any]] = {
        name: next(iter(config.get("deployments", [])), {})
        for name, config in sorted(configs.items())
        if config.get("import_path") == IMPORT_PATH or name == context.app_name
    }
    counts = {name: most_replicas_on(node, section) for name, section in sections.items()}
    before = sum(count for name, count in counts.items() if name < context.app_name)
    per_gpu = math.floor(1 / ((sections[context.app_name].get("ray_actor_options") or {}).get("num_gpus") or 1))
    return Place(before + context.rank.local_rank, sum(counts.values()), max(1, per_gpu))


def most_replicas_on(node: Mapping[str, float], section: Mapping[str, Any]) -> int:
    """Replicas of one deployment, as its section of a Serve config says, that may come to run on a node with such resources."""
    scaling, number = section.get("autoscaling_config"), section.get("num_replicas")
    if number == "auto":
        number = (scaling or {}).get("max_replicas", AUTO_REPLICAS)
    elif scaling is not None:
        number = scaling.get("max_replicas", 1)
    options = section.get("ray_actor_options") or {}
    asked = {"CPU": options.get("num_cpus", 1), "GPU": options.get("num_gpus"), **(options.get("resources") or {})}
    room = [math.floor(node.get(name, 0) / amount + 1e-6) for name, amount in asked.items() if amount]
    return int(min([number or 1, section.get("max_replicas_per_node") or math.inf, *room]))


def _listen_on_the_node_only() -> None:
    """Have Serve's replica listen for calls at its node's address instead of on every interface.

    There is no setting for it. Its callers are Serve's proxies, and only where RAY_SERVE_PROXY_USE_GRPC says so.
    """
    bind = serve_replica.add_port_to_grpc_server
    serve_replica.add_port_to_grpc_server = lambda server, _: bind(server, build_address(ray.util.get_node_ip_address(), 0))
