"""The attention switch: from a config to checked backends, at the start and beside the requests of a running replica.

A change is a target. One background task works towards the newest target: it builds the backends beside those in force,
checks each against its reference between the steps of requests, and swaps one immutable object. When that fails the old ones
stay in force, and the state and a gauge say so. The old go when the last request that runs under them ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

from pydantic import ValidationError

import attention
from attention import AttentionBackend, HeadShape, result, truth
from service.config import AttentionConfig, UserConfig, explain
from service.engine.engine import Backends
from service.metrics import Metrics
from service.threads import in_passing_thread

T = TypeVar("T")
Products = Callable[[], Generator[None, None, truth.Truth]]
HISTORY = 20  # changes that are remembered

logger = logging.getLogger("longserve.switch")


def parse(user_config: Any) -> UserConfig:
    """A deployment's `user_config` as Serve hands it over. Raises ValueError naming key, value and what is allowed."""
    try:
        return UserConfig.model_validate(user_config)
    except ValidationError as error:
        raise ValueError("; ".join(explain(error, UserConfig))) from None


class Slices(Protocol):
    """Where a computation in parts is run."""

    async def beside(self, parts: Generator[None, None, T]) -> T:
        """What it returns, its parts run between whatever is more urgent."""

    async def check_served(self, backend: AttentionBackend) -> truth.Truth | None:
        """Whether a backend answers as it is defined on what was served last; None where nothing was served yet."""


class Swappable(Slices, Protocol):
    """Where a switch is at work, and what it gives the backends to: the engine."""

    async def swap(self, backends: Backends) -> None:
        """Put other backends in force."""

    def withdraw(self, name: str, reason: str | None) -> None:
        """Answer nothing more under a backend; None: it serves again."""

    def check_room(self, backend: AttentionBackend) -> None:
        """Raise ValueError for a backend under which not even the shortest request fits."""


class Startup:
    """The slices before there is an engine: nothing is more urgent."""

    async def beside(self, parts: Generator[None, None, T]) -> T:
        """What they return, from a passing thread."""
        return await asyncio.to_thread(in_passing_thread, partial(result, parts))

    async def check_served(self, backend: AttentionBackend) -> truth.Truth | None:
        """Nothing was served yet."""
        return None


class LastServed:
    """The switch that served last. This one forgets; one that outlives the process serves a replica that is restarted."""

    async def recall(self) -> AttentionConfig | None:
        """What was kept last; None before that. Never raises."""
        return None

    async def keep(self, config: AttentionConfig) -> None:
        """Keep what serves now. Never raises."""


class Switch:
    """The allow-list in force, the one aimed at, and how the way there went."""

    def __init__(
        self,
        shape: HeadShape,
        native: Mapping[str, Any] | None,
        max_length: int,
        metrics: Metrics,
        last_served: LastServed,
        is_causal: bool,
        products: Products,
    ) -> None:
        """`native`: the options of the checkpoint's own backend, None where that is dense. `is_causal`: it is a decoder.
        `products`: checks the matrices that every backend answers with."""
        self._shape = shape
        self._is_causal = is_causal
        self._products = products
        self._native = native
        self._max_length = max_length
        self._metrics = metrics
        self._last_served = last_served
        self._in_force: AttentionConfig | None = None
        self._serving: Mapping[str, AttentionBackend] = {}  # those in force, by name
        self._target: AttentionConfig | None = None  # waits for the background task
        self._asked: AttentionConfig | None = None  # the last one asked for, in force or not
        self._failure: str | None = None
        self._task: asyncio.Task[None] | None = None
        self._history: deque[Mapping[str, Any]] = deque(maxlen=HISTORY)

    async def build(self, config: AttentionConfig) -> Backends:
        """Build and check the backends to start with. Raises ValueError for one that cannot serve."""
        self._asked = self._asked or config
        return await self._checked(config.for_checkpoint(self._native), Startup())

    async def put_in_force(self, config: AttentionConfig, backends: Backends) -> None:
        """Note that the engine serves `config` with `backends` now."""
        config = config.for_checkpoint(self._native)
        self._in_force, self._serving = config, backends.by_name
        self._forget_failure()
        shape = self._shape
        described = [backend.describe() for backend in backends.by_name.values()]
        dtype, device = str(shape.dtype).removeprefix("torch."), str(shape.device)
        self._metrics.switched_to(described, backends.default, backends.weights, dtype, device)
        await self._last_served.keep(config)

    def aim(self, config: AttentionConfig, engine: Swappable) -> None:
        """Make `config` the target, and see to it that a task works towards it. Returns at once, never raises."""
        self._target = self._asked = config
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work(engine))

    def refuse(self, reason: str) -> None:
        """Note a change that is no config at all."""
        logger.error("the attention switch was refused: %s", reason)
        self._fail(reason)

    def state(self) -> Mapping[str, Any]:
        """What is in force, what was asked for last, whether it is being built, and why the last change failed."""
        return {
            "attention": self._in_force and self._in_force.model_dump(),
            "asked": self._asked and self._asked.model_dump(),
            "switching": self.is_switching,
            "degraded": self._failure,
        }

    @property
    def is_switching(self) -> bool:
        """Whether the background task is at work."""
        return self._task is not None and not self._task.done()

    async def check_truth(self, engine: Swappable) -> list[Mapping[str, Any]]:
        """Check all that serve again, between the steps of requests: one that is off its definition is withdrawn until a later
        check finds it within the bound."""
        found: list[Mapping[str, Any]] = []
        for name, backend in list(self._serving.items()):
            verdict = await self._verdict(backend, engine)
            if self._serving.get(name) is backend:  # else it was switched away meanwhile
                engine.withdraw(name, None if verdict.passed else verdict.told)
            if not verdict.passed:
                logger.error("attention backend %s is withdrawn: %s", name, verdict.told)
            found.append({"backend": name, "error": verdict.error, "bound": verdict.bound, "passed": verdict.passed})
        return found

    async def rehearse(self, config: AttentionConfig, engine: Swappable) -> None:
        """Build and check what a config names, and let go of it. Raises ValueError for a backend that cannot serve."""
        backends = await self._checked(config.for_checkpoint(self._native), engine)
        for backend in backends.by_name.values():
            engine.check_room(backend)

    @property
    def history(self) -> list[Mapping[str, Any]]:
        """The changes of late, the newest last."""
        return list(self._history)

    async def settled(self) -> None:
        """Return when the background task has done its work."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def stop(self) -> None:
        """Give up a switch that is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _work(self, engine: Swappable) -> None:
        """Switch until what is in force is the newest target, or that one has failed."""
        while (target := self._target) is not None:
            self._target = None
            await self._switch_to(target, engine)

    async def _switch_to(self, target: AttentionConfig, engine: Swappable) -> None:
        start = time.monotonic()
        try:
            target = target.for_checkpoint(self._native)
            if target == self._in_force:
                self._forget_failure()  # of another target, which nobody asks for any more
                return
            backends = await self._checked(target, engine)
            await engine.swap(backends)
        except Exception as error:  # whatever it is, the old backends go on serving
            logger.exception("the attention switch failed, the former backends stay in force")
            self._fail(str(error) or type(error).__name__)
        else:
            await self.put_in_force(target, backends)
            self._metrics.switches.labels("ok").inc()
        seconds = time.monotonic() - start
        self._metrics.switch_seconds.observe(seconds)
        self._metrics.last_switch.set(seconds)
        self._history.append(
            {"at": time.time(), "attention": target.model_dump(), "seconds": seconds, "failure": self._failure}
        )

    def _fail(self, reason: str) -> None:
        self._failure = reason
        self._metrics.degraded.set(1)
        self._metrics.switches.labels("failed").inc()

    def _forget_failure(self) -> None:
        self._failure = None
        self._metrics.degraded.set(0)

    async def _checked(self, config: AttentionConfig, host: Slices) -> Backends:
        """The config's backends, built and checked. Raises ValueError for one that answers wrongly."""
        assert config.default is not None, "`for_checkpoint` names it"
        built = {name: await self._built(name, options, host) for name, options in config.backends.items()}
        return Backends(built, config.default, config.auto, config.weights, self._is_causal)

    async def _built(self, name: str, options: Mapping[str, Any] | None, host: Slices) -> AttentionBackend:
        """A checked backend. The one that serves, if its options are these: with it the engine keeps states and pace."""
        serving = self._serving.get(name)
        if serving is not None and serving.options == serving.Options.model_validate(dict(options or {})):
            return serving
        build = partial(attention.build, name, options, self._shape)
        backend = await asyncio.to_thread(in_passing_thread, build)
        if self._is_causal not in backend.directions:
            missing = "causal form, and this model is causal" if self._is_causal else "form both ways, for an encoder"
            raise ValueError(f"attention backend {name} has no {missing}")
        verdict = await self._verdict(backend, host)
        if not verdict.passed:
            raise ValueError(f"attention backend {name} is {verdict.told}")
        if verdict.uncovered:
            logger.warning("the truth check of %s: %s", name, verdict.uncovered)
        return backend

    async def _verdict(self, backend: AttentionBackend, host: Slices) -> truth.Truth:
        """The worst verdict on kinds of layers, the products between them and what was served last, told to the metrics."""
        check = partial(truth.checking, max_length=self._max_length, causal=self._is_causal)
        verdicts = [await host.beside(check(kind)) for kind in attention.shares(backend)]
        verdicts.append(await host.beside(self._products()))
        if (served := await host.check_served(backend)) is not None:
            verdicts.append(served)
        worst = truth.worst(verdicts)
        self._metrics.truth(backend.name, worst.error, worst.bound)
        return replace(worst, uncovered="; ".join(filter(None, (verdict.uncovered for verdict in verdicts))))
