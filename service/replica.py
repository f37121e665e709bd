"""One replica: model, engine, attention switch, metrics and HTTP app in one process. Knows no Ray; `service/app.py` wraps it.

replica = Replica(config)                # loads the weights
await replica.start(user_config)         # builds and checks the backends, warms up
replica.app                              # ASGI: serve it with anything
replica.retarget(user_config)            # returns at once; the switch happens beside the requests
await replica.stop()
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from starlette.types import ASGIApp

from service import exposition
from service.config import AttentionConfig, EngineConfig, HttpConfig, ServiceConfig, UserConfig, admin_keys, api_keys
from service.engine.engine import Engine, Profile
from service.exposition import Families, Format, Gather, Gathered, Page
from service.http.errors import NotReady
from service.http.face import Admin, ModelCard
from service.http.reader import Reader
from service.http.routes import create_app
from service.http.workers import Workers
from service.logs import LOGGERS
from service.machine import Place, available_cpus, cache_folder, dealt_cpus, dealt_threads, processor, trim
from service.metrics import Metrics
from service.model import checkpoint, fidelity
from service.model.checkpoint import Checkpoint
from service.model.tokenizer import Tokenizer
from service.routing import Told, tell
from service.switch import LastServed, Switch, parse
from service.threads import in_passing_thread

if TYPE_CHECKING:
    from service.tracing import Traced

ALONE = Place()


class Replica:
    """One model under one switch. The routes' `Host`.

    Args:
        config: what it is made of.
        name: this replica's name in metrics.
        facts: what `/info` tells of this replica beside its name and process.
        gather: asks all replicas for their metrics; None: this is the only one.
        echoes_request_id: False where a proxy in front answers with the request id itself.
        place: among the replicas that share this machine.
        last_served: keeps the switch that served last for whoever is started in this replica's stead.
        admin: does what an operator asks for over HTTP to all replicas; None: this is the only one.

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
        place: Place = ALONE,
        last_served: LastServed | None = None,
        admin: Admin | None = None,
    ) -> None:
        for logger in LOGGERS:
            logging.getLogger(logger).setLevel(config.log_level.upper())
        torch.set_num_threads(config.threads or dealt_threads(place))
        torch.set_float32_matmul_precision(config.float32_matmul_precision)
        self.settings = config
        self.name = name
        self._place = place
        self._last_served = last_served or LastServed()
        self._facts = facts or {}
        self._page = Page(gather or self._only_mine)
        self._loaded = in_passing_thread(lambda: _load(config))
        self._started = time.time()
        self._metrics = Metrics()
        model = self._loaded.model
        self._switch = Switch(
            model.head_shape(),
            model.config.native,
            self._loaded.max_length,
            self._metrics,
            self._last_served,
            model.config.is_causal,
            partial(fidelity.checking, model),
        )
        self._metrics.switching.set_function(lambda: float(self._switch.is_switching))
        self._traced = None if config.traces is None else _traced(self._metrics, config.traces, name)
        self._engine: Engine | None = None
        self._admin = admin
        self._watch: asyncio.Task[None] | None = None
        self._workers = Workers(_directory(config), config.http.workers, config.http.max_waiting_reads, self._metrics.read)
        self._metrics.tokenizer_waiting.set_function(lambda: self._workers.waiting)
        self.reader = Reader(self._loaded.tokenizer, self._workers)
        self.app: ASGIApp = create_app(self, api_keys(config.http), echoes_request_id, admin_keys(config.http))

    async def start(self, user_config: UserConfig | Mapping[str, Any]) -> None:
        """Build and check the backends, then start the engine.

        Where those of `user_config` cannot serve, the ones that served last do: a switch that failed must not keep a restarted
        replica from serving. Where none have served yet it raises what hinders it: ValueError for a backend that cannot serve.
        """
        try:
            await self._start(parse(user_config).attention)
        except Exception as error:
            last = await self._last_served.recall()
            if last is None:
                raise
            await self._start(last)
            self._switch.refuse(str(error) or type(error).__name__)

    async def _start(self, attention: AttentionConfig) -> None:
        backends = await self._switch.build(attention)
        await self._workers.start()
        loaded, settings, observer = self._loaded, self._engine_settings(), self._traced or self._metrics
        profile = Profile(cache_folder(), self._pace_facts())
        engine = Engine(loaded.model, loaded.tokenizer, backends, settings, observer, dealt_cpus(self._place), profile)
        await engine.start()
        await self._switch.put_in_force(attention, backends)
        self._metrics.threads.set(torch.get_num_threads())
        self._metrics.build.labels(version("longserve"), torch.__version__, self._loaded.id).set(1)
        self._metrics.watch(engine.snapshot)
        self._metrics.shadow_bound.set(settings.shadow.bound_nats)
        self._engine = engine
        if (seconds := self.settings.truth_check_seconds) is not None:
            self._watch = asyncio.create_task(self._watch_truth(seconds))
        gc.collect()
        gc.freeze()  # what is loaded stays: looking through it again would stop every thread for 0.1 s, now and then

    def _pace_facts(self) -> dict[str, str | int]:
        """All that the pace of model and backends depends on."""
        model, shape = self._loaded.model, self._loaded.model.head_shape()
        return {
            "machine": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else processor(),
            "cpus": available_cpus(),
            "threads": torch.get_num_threads(),
            "precision": torch.get_float32_matmul_precision(),
            "torch": torch.__version__,
            "longserve": version("longserve"),
            "model": str(model.config),
            "impl": str(model.impl),
            "dtype": str(shape.dtype),
            "weights": self.settings.weights,
            "kv": self.settings.kv,
            "device": str(shape.device),
        }

    def _engine_settings(self) -> EngineConfig:
        """The engine's settings, `memory_share` divided among the replicas that take from the same memory."""
        on_gpu = self.settings.device.startswith("cuda")
        sharing = self._place.replicas_per_gpu if on_gpu else self._place.replicas
        engine = self.settings.engine
        return engine.model_copy(update={"memory_share": engine.memory_share / sharing})

    def retarget(self, user_config: Mapping[str, Any]) -> None:
        """Aim the switch elsewhere. Returns at once, never raises; requests in flight keep their backend."""
        try:
            user = parse(user_config)
        except ValueError as error:
            self._switch.refuse(str(error))
        else:
            self._switch.aim(user.attention, self.engine)

    async def rehearse(self, attention: AttentionConfig) -> None:
        """Build and check what a switch names, beside the requests. Raises ValueError for a backend that cannot serve."""
        await self._switch.rehearse(attention, self.engine)

    async def settled(self) -> None:
        """Return when no switch is under way."""
        await self._switch.settled()

    async def check_truth(self) -> dict[str, Any]:
        """Check what serves against its definition, beside the requests; what is off it is withdrawn."""
        return {"replica": self.name, "checks": await self._switch.check_truth(self.engine)}

    async def _watch_truth(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            await self.engine.when_idle()
            await self.check_truth()

    async def drain(self) -> None:
        """Admit nothing more; finish what runs within `drain_seconds`."""
        if self._engine is not None:
            await self._engine.drain(self.settings.drain_seconds)

    async def stop(self) -> None:
        """End at once. Idempotent."""
        await self._switch.stop()
        if self._watch is not None:
            self._watch.cancel()
        if self._engine is not None:
            await self._engine.stop()
        await self._workers.stop()
        if self._traced is not None:
            await asyncio.to_thread(self._traced.stop)

    @property
    def config(self) -> HttpConfig:
        return self.settings.http

    @property
    def card(self) -> ModelCard:
        model = self._loaded.model.config
        plan = model.pooled
        return ModelCard(
            self._loaded.id,
            int(self._started),
            self._loaded.max_length,
            plan.width(model.hidden_size),
            model.tasks,
            plan.labels,
            plan.is_normalized,
            dict(plan.prompts),
            plan.default_prompt,
        )

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

    def lossy(self, backend: str) -> str | None:
        return self._loaded.model.config.lossy(backend)

    def fault(self) -> str | None:
        """No step has ended for `stall_seconds` although work waits: nothing but a new replica helps."""
        if self._engine is None:
            return None
        now = self._engine.snapshot()
        stalled = time.monotonic() - now.last_progress
        if stalled < self.settings.stall_seconds:  # an idle engine makes progress; one whose loop died never does
            return None
        return f"no step has ended for {stalled:.0f} s while {now.running} requests run and {now.waiting} wait"

    def work(self) -> Told:
        """What there is to do; empty before the start."""
        engine = self._engine
        return {} if engine is None else tell(engine.ahead(), engine.token_seconds(), engine.keeps_prefixes)

    @property
    def holds_pins(self) -> bool:
        """Whether callers have pinned prefixes here: with this replica they would be gone."""
        return self._engine is not None and self._engine.has_pins

    def readiness(self) -> Mapping[str, Any]:
        engine = self._engine
        withdrawn = {} if engine is None else engine.withdrawn
        serves = engine is not None and engine.backends.default not in withdrawn and len(withdrawn) < len(engine.backends.names)
        is_ready = serves and engine is not None and not engine.snapshot().draining
        return {"ready": is_ready, "replica": self.name, **self._switch.state(), "withdrawn": withdrawn}

    def admin_state(self) -> dict[str, Any]:
        """The switch, and its changes of late."""
        return {**self.readiness(), "history": self._switch.history}

    @property
    def admin(self) -> Admin:
        return self._admin or Alone(self)

    def info(self) -> Mapping[str, Any]:
        engine, model = self.engine, self._loaded.model
        return {
            "model": self._loaded.id,
            "tasks": list(model.config.tasks),
            "labels": list(model.config.pooled.labels),
            "prompts": [name for name, _ in model.config.pooled.prompts],
            "max_model_len": self._loaded.max_length,
            "parameters": model.num_weights,
            "dtype": str(model.head_shape().dtype).removeprefix("torch."),
            "dtype_reason": self._loaded.dtype_reason,
            "weights": self.settings.weights,
            "weights_bytes": model.weight_bytes,
            "kv": self.settings.kv,
            "impl": model.impl,
            "device": self.settings.device,
            "threads": torch.get_num_threads(),
            "attention": {
                "default": engine.backends.default,
                "backends": [each.describe() | {"lossy": self.lossy(each.name)} for each in engine.backends.by_name.values()],
            },
            "memory_budget_bytes": engine.snapshot().budget_bytes,
            "laws": {"cpus": available_cpus(), "vocabulary": model.config.vocab_size, **engine.laws()},
            "limits": self.config.model_dump(exclude={"api_keys_env", "api_keys_file"}),
            "engine": self.settings.engine.model_dump(),
            "versions": {"longserve": version("longserve"), "torch": torch.__version__},
            "replica": {"name": self.name, "pid": os.getpid(), "started": int(self._started), **self._facts},
        }

    async def metrics(self, format: Format, is_fresh: bool) -> bytes:
        return await self._page.text(format, is_fresh)

    async def export(self, format: Format) -> Families:
        """This replica's metrics: some 10 ms of text, made off the event loop."""
        return await asyncio.to_thread(exposition.families, self._metrics.registry, self.name, format)

    def responded(self, route: str, method: str, status: int) -> None:
        self._metrics.responded(route, method, status)

    async def _only_mine(self, format: Format) -> Gathered:
        return Gathered([await self.export(format)])


class Alone:
    """The `Admin` of a replica that is the only one."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    async def states(self) -> list[Mapping[str, Any]]:
        return [self._replica.admin_state()]

    async def switch(self, attention: AttentionConfig) -> list[Mapping[str, Any]]:
        await self._replica.rehearse(attention)
        self._replica.retarget({"attention": attention.model_dump()})
        await self._replica.settled()
        return await self.states()

    async def check_truth(self) -> list[Mapping[str, Any]]:
        return [await self._replica.check_truth()]


def _traced(metrics: Metrics, endpoint: str, name: str) -> Traced:
    from service import tracing  # a tenth of a second of imports that only traces need

    return tracing.Traced(metrics, tracing.exporter(endpoint), name)


def _load(config: ServiceConfig) -> Checkpoint:
    kept = {"weights": config.weights, "kv": config.kv}
    loaded = checkpoint.load(_directory(config), config.dtype, config.device, config.name, config.max_length, **kept)
    trim()  # what loading took for a while is no weight: the budget is drawn from what is left
    return loaded


def _directory(config: ServiceConfig) -> str:
    return str(checkpoint.EMBEDDED) if config.model == "embedded" else config.model
