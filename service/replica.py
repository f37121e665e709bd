"""One replica: model, engine, attention switch, metrics and HTTP app in one process. Knows no Ray; `service/app.py` wraps it.

replica = Replica(config)                # loads the weights
await replica.start(user_config)         # builds and checks the backends, warms up
replica.app                              # ASGI: serve it with anything
replica.retarget(user_config)            # returns at once; the switch happens beside the requests
await replica.stop()
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from prometheus_client.metrics_core import Metric
from starlette.types import ASGIApp

from service import metrics
from service.config import HttpConfig, ServiceConfig, UserConfig, api_keys
from service.engine.engine import Engine
from service.http.errors import NotReady
from service.http.face import ModelCard
from service.http.routes import create_app
from service.machine import available_cpus, in_passing_thread
from service.metrics import Metrics
from service.model import checkpoint
from service.model.tokenizer import Tokenizer
from service.switch import Switch, parse

LOGGERS = ("longserve", "service")
"""Roots of all our loggers: what users read by topic, and modules by their own name."""

Gather = Callable[[], Awaitable[Mapping[str, Sequence[Metric]]]]
"""Every replica's metrics by replica name."""


class Replica:
    """One model under one switch. The routes' `Host`.

    Args:
        config: what it is made of.
        name: this replica's name in metrics.
        facts: what `/info` tells of this replica beside its name and process.
        gather: asks all replicas for their metrics; None: this is the only one.
        echoes_request_id: False where a proxy in front answers with the request id itself.

    Raises:
        ValueError, FileNotFoundError: something in the config cannot be served.
    """

    def __init__(
        self,
        config: ServiceConfig,
        *,
        name: str = "0",
        facts: Mapping[str, str] | None = None,
        gather: Gather | None = None,
        echoes_request_id: bool = True,
    ) -> None:
        for logger in LOGGERS:
            logging.getLogger(logger).setLevel(config.log_level.upper())
        torch.set_num_threads(config.threads or available_cpus())
        torch.set_float32_matmul_precision(config.float32_matmul_precision)
        self.settings = config
        self.name = name
        self._facts = facts or {}
        self._gather = gather or self._only_mine
        self._loaded = in_passing_thread(lambda: checkpoint.load(_directory(config), config.dtype, config.device, config.name))
        self._started = time.time()
        self._metrics = Metrics()
        self._switch = Switch(self._loaded.model.head_shape(), self._loaded.max_length, self._metrics)
        self._engine: Engine | None = None
        self.app: ASGIApp = create_app(self, api_keys(config.http), echoes_request_id)

    async def start(self, user: UserConfig) -> None:
        """Build and check the backends, then start the engine. Raises ValueError for a backend that cannot serve."""
        backends = await self._switch.build(user.attention)
        engine = Engine(self._loaded.model, self._loaded.tokenizer, backends, self.settings.engine, self._metrics)
        await engine.start()
        self._metrics.threads.set(torch.get_num_threads())
        self._metrics.build.labels(version("longserve"), torch.__version__, self._loaded.id).set(1)
        self._metrics.watch(engine.snapshot)
        self._engine = engine

    def retarget(self, user_config: Mapping[str, Any]) -> None:
        """Aim the switch elsewhere. Returns at once, never raises; requests in flight keep their backend."""
        try:
            user = parse(user_config)
        except ValueError as error:
            self._switch.refuse(str(error))
        else:
            self._switch.aim(user.attention, self.engine)

    async def drain(self) -> None:
        """Admit nothing more; finish what runs within `drain_seconds`."""
        if self._engine is not None:
            await self._engine.drain(self.settings.drain_seconds)

    async def stop(self) -> None:
        """End at once. Idempotent."""
        await self._switch.stop()
        if self._engine is not None:
            await self._engine.stop()

    @property
    def config(self) -> HttpConfig:
        return self.settings.http

    @property
    def card(self) -> ModelCard:
        model = self._loaded.model.config
        return ModelCard(self._loaded.id, int(self._started), self._loaded.max_length, model.hidden_size)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._loaded.tokenizer

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise NotReady("the service is starting; /ready says when it is done")
        return self._engine

    @property
    def backends(self) -> Sequence[str]:
        return self.engine.backends.names

    def fault(self) -> str | None:
        """No step has ended for `stall_seconds` although work waits: nothing but a new replica helps."""
        if self._engine is None:
            return None
        now = self._engine.snapshot()
        stalled = time.monotonic() - now.last_progress
        if stalled < self.settings.stall_seconds:  # an idle engine makes progress; one whose loop died never does
            return None
        return f"no step has ended for {stalled:.0f} s while {now.running} requests run and {now.waiting} wait"

    def readiness(self) -> Mapping[str, Any]:
        is_ready = self._engine is not None and not self._engine.snapshot().draining
        return {"ready": is_ready, "replica": self.name, **self._switch.state()}

    def info(self) -> Mapping[str, Any]:
        engine, model = self.engine, self._loaded.model
        return {
            "model": self._loaded.id,
            "max_model_len": self._loaded.max_length,
            "parameters": sum(each.numel() for each in model.parameters()),
            "dtype": str(model.head_shape().dtype).removeprefix("torch."),
            "dtype_reason": self._loaded.dtype_reason,
            "device": self.settings.device,
            "threads": torch.get_num_threads(),
            "attention": {
                "default": engine.backends.default,
                "backends": [backend.describe() for backend in engine.backends.by_name.values()],
            },
            "memory_budget_bytes": engine.snapshot().budget_bytes,
            "limits": self.config.model_dump(exclude={"api_keys_env"}),
            "engine": self.settings.engine.model_dump(),
            "versions": {"longserve": version("longserve"), "torch": torch.__version__},
            "replica": {"name": self.name, "pid": os.getpid(), "started": int(self._started), **self._facts},
        }

    async def metrics(self) -> bytes:
        exports = await self._gather()
        return await asyncio.to_thread(metrics.render, exports)  # some 10 ms of text: not on the event loop

    def export(self) -> list[Metric]:
        """This replica's metrics."""
        return self._metrics.export()

    def responded(self, route: str, method: str, status: int) -> None:
        self._metrics.responded(route, method, status)

    async def _only_mine(self) -> Mapping[str, Sequence[Metric]]:
        return {self.name: self.export()}


def _directory(config: ServiceConfig) -> str:
    return str(checkpoint.EMBEDDED) if config.model == "embedded" else config.model
