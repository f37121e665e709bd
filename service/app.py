"""The service as a Ray Serve application: one deployment, whose ingress replica holds model and engine.

No gateway in front: a second hop costs two thirds of the throughput and 25 times per streamed token. `build` is what a
Serve config's `import_path` names. `user_config` is the attention switch, everything else an argument.
"""

from __future__ import annotations

from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from starlette.types import ASGIApp

from service import logs
from service.config import DEPLOYMENT, ServiceConfig, UserConfig, explain
from service.exposition import Families, Format, Gathered
from service.replica import Replica
from service.switch import parse

GATHER_SECONDS = 2.0  # a replica that takes longer to export its metrics is counted as missing


class Longserve:
    """The deployment: hands Ray Serve's calls to a `Replica`."""

    def __init__(self, config: ServiceConfig) -> None:
        logs.install(config.log_file)
        self._context = serve.get_replica_context()
        self._name: str = self._context.replica_tag
        self._peers: Any = None  # a handle on this deployment, made at the first scrape
        self._started = False
        self._replica = Replica(
            config,
            name=self._name,
            facts={"ray_address": ray.get_runtime_context().gcs_address},  # where `longserve apply` finds this service
            gather=self._gather,
            echoes_request_id=False,  # Serve's proxy does
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
            await self._replica.start(parse(user_config))
            self._started = True

    def check_health(self) -> None:
        """Raise when this replica should be replaced."""
        if fault := self._replica.fault():
            raise RuntimeError(fault)

    async def export(self, format: Format) -> tuple[str, Families]:
        """This replica's name and metrics, for the one that answers a scrape."""
        return self._name, await self._replica.export(format)

    def state(self) -> dict[str, Any]:
        """This replica's switch, for `longserve apply`."""
        return dict(self._replica.readiness())

    async def drain(self) -> None:
        """Admit nothing more and finish what runs, for `longserve serve` at its end."""
        await self._replica.drain()

    async def __del__(self) -> None:
        await self._replica.stop()

    async def _gather(self, format: Format) -> Gathered:
        """All replicas' metrics: this one's, and those of the peers that answer in time."""
        if self._peers is None:
            self._peers = serve.get_deployment_handle(DEPLOYMENT, app_name=self._context.app_name)
        asked = self._peers.broadcast("export", format)
        answers = await asked.results_async(timeout_s=GATHER_SECONDS, return_exceptions=True)
        arrived = dict(answer for answer in answers if not isinstance(answer, BaseException))
        missing = len(answers) - len(arrived)
        if self._name not in arrived:  # Serve does not count it among those that answer: it starts, or it drains
            arrived[self._name] = await self._replica.export(format)
        return Gathered(list(arrived.values()), missing)


_deployment: Any = serve.deployment(
    serve.ingress()(Longserve),
    name=DEPLOYMENT,
    user_config=UserConfig().model_dump(mode="json"),  # without one, Serve never calls `reconfigure`
    max_constructor_retry_count=1,  # a wrong config does not get better by trying
)


def build(args: dict[str, Any]) -> serve.Application:
    """The application of a Serve config's `args`. Raises ValueError naming key, value and what is allowed."""
    try:
        config = ServiceConfig.model_validate(args)
    except ValidationError as error:
        raise ValueError("\n".join(f"args.{fault}" for fault in explain(error, ServiceConfig))) from error
    return _deployment.bind(config)
