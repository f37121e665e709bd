"""The attention switch of a running replica: no request fails, and nothing that cannot serve comes in force."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from attention import AttentionBackend, truth
from service.config import AttentionConfig, ServiceConfig, UserConfig
from service.machine import Place
from service.plain import listening
from service.replica import Replica
from service.switch import LastServed
from tests.http.client import PATIENCE_SECONDS, Client


@pytest.fixture
async def service() -> AsyncIterator[Client]:
    replica = Replica(ServiceConfig(threads=1))
    async with listening(replica, UserConfig()) as url:
        yield Client(url, replica)


def to(default: str, **backends: dict[str, Any]) -> dict[str, Any]:
    return {"attention": {"default": default, "backends": backends or {default: {}}}}


def failing(error: float) -> Callable[..., truth.Checking]:
    """A truth check that finds every backend off by so much."""

    def checking(backend: AttentionBackend, **_: Any) -> truth.Checking:
        yield
        return truth.Truth(error, bound=0.1)

    return checking


async def served_by(service: Client, **fields: Any) -> str:
    reply = await asyncio.to_thread(service.complete, "import os", max_tokens=1, **fields)
    assert reply.status == 200, reply.text
    return str(reply.json["longserve"]["backend"])


async def settled(service: Client) -> dict[str, Any]:
    """The switch's state once nothing is being built."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while service.replica.readiness()["switching"]:
            await asyncio.sleep(0.01)
    return dict(service.replica.readiness())


async def test_new_requests_get_the_new_backends_and_only_those(service: Client) -> None:
    assert await served_by(service) == "dense"
    service.replica.retarget(to("performer", performer={"features": 64}))
    assert (await settled(service))["degraded"] is None
    assert await served_by(service) == "performer"
    refused = await asyncio.to_thread(service.complete, "import os", attention="dense")
    assert (refused.status, refused.error["code"]) == (400, "unknown_backend")
    assert service.replica.engine.backends.by_name["performer"].options.model_dump()["features"] == 64


async def test_a_request_keeps_the_backend_it_was_admitted_with(service: Client) -> None:
    task = asyncio.create_task(asyncio.to_thread(service.complete, "import os", max_tokens=400, ignore_eos=True))
    while service.replica.engine.snapshot().running == 0:
        await asyncio.sleep(0.001)
    service.replica.retarget(to("performer"))
    await settled(service)
    assert await served_by(service) == "performer"
    reply = await task
    assert (reply.status, reply.json["longserve"]["backend"]) == (200, "dense")


async def test_an_old_request_and_a_new_one_answer_side_by_side_bit_for_bit_as_alone(service: Client) -> None:
    """Log-probabilities are told in full, so that they differ where a bit does."""
    long = {"max_tokens": 1500, "ignore_eos": True, "temperature": 0, "logprobs": 1}
    new = {"max_tokens": 40, "ignore_eos": True, "temperature": 0, "logprobs": 1}

    async def ask(fields: dict[str, Any]) -> Any:
        reply = await asyncio.to_thread(service.complete, "import os", **fields)
        assert reply.status == 200, reply.text
        return reply.json["longserve"]["backend"], reply.json["choices"]

    before = await ask(long)
    task = asyncio.create_task(ask(long))
    while service.replica.engine.snapshot().running == 0:
        await asyncio.sleep(0.001)
    service.replica.retarget(to("performer"))
    await settled(service)
    beside = await ask(new)
    assert not task.done(), "it ended before the new one"
    assert await task == before
    assert await ask(new) == beside
    assert (before[0], beside[0]) == ("dense", "performer")


async def test_of_several_targets_the_newest_comes_in_force(service: Client) -> None:
    for default in ("performer", "sliding_window", "dense", "sliding_window"):
        service.replica.retarget(to(default))
    assert (await settled(service))["attention"]["default"] == "sliding_window"
    assert await served_by(service) == "sliding_window"


@pytest.mark.parametrize(
    ("target", "word"),
    [
        (to("nowhere"), "nowhere"),
        (to("dense", dense={}, sliding_window={"window": 0}), "window"),
        ({"attention": {"defalt": "dense"}}, "defalt"),
        ([], "object"),
    ],
)
async def test_a_target_that_is_no_config_leaves_the_old_in_force(service: Client, target: Any, word: str) -> None:
    service.replica.retarget(target)
    state = await settled(service)
    assert word in state["degraded"]
    assert state["ready"] is True
    assert await served_by(service) == "dense"


async def test_a_backend_that_answers_wrongly_never_serves(service: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = truth.checking
    monkeypatch.setattr(truth, "checking", failing(1.0))
    service.replica.retarget(to("performer"))
    state = await settled(service)
    assert "performer is off its definition by 1, allowed: 0.1" in state["degraded"]
    assert await served_by(service) == "dense"
    assert 'longserve_backend_degraded{replica="0"} 1.0' in await asyncio.to_thread(service.metrics)
    monkeypatch.setattr(truth, "checking", honest)
    service.replica.retarget(to("performer"))
    assert (await settled(service))["degraded"] is None
    assert await served_by(service) == "performer"


async def test_who_asks_again_for_what_serves_has_the_failure_forgotten(service: Client) -> None:
    service.replica.retarget(to("longformer"))
    assert "no causal form" in (await settled(service))["degraded"]
    service.replica.retarget(to("dense"))
    state = await settled(service)
    assert state["degraded"] is None
    assert state["asked"] == state["attention"]
    assert 'longserve_backend_degraded{replica="0"} 0.0' in (await asyncio.to_thread(service.get, "/metrics")).text


class Kept(LastServed):
    """Outlives a replica of this test."""

    config: AttentionConfig | None = None

    async def recall(self) -> AttentionConfig | None:
        return self.config

    async def keep(self, config: AttentionConfig) -> None:
        self.config = config


@pytest.mark.parametrize("target", [to("longformer"), {"attention": {"defalt": "dense"}}])
async def test_a_successor_of_a_replica_whose_switch_failed_starts_with_the_one_that_served(target: dict[str, Any]) -> None:
    kept = Kept()
    async with listening(Replica(ServiceConfig(threads=1), last_served=kept), UserConfig()) as url:
        client = Client(url, None)
        assert (await asyncio.to_thread(client.get, "/ready")).status == 200
    successor = Replica(ServiceConfig(threads=1), last_served=kept)
    await successor.start(to("performer"))  # the newest target comes first, where it can serve
    assert successor.backends == ("performer",)
    await successor.stop()
    successor = Replica(ServiceConfig(threads=1), last_served=kept)
    await successor.start(target)
    assert successor.backends == ("performer",)
    assert successor.readiness()["ready"] is True
    assert successor.readiness()["degraded"] is not None
    await successor.stop()


async def test_four_replicas_of_a_machine_promise_no_more_memory_than_one() -> None:
    budgets = []
    for place in (Place(), Place(3, 4)):
        replica = Replica(ServiceConfig(threads=1), place=place)
        await replica.start(UserConfig())
        budgets.append(replica.engine.snapshot().budget_bytes)
        await replica.stop()
    assert 4 * budgets[1] == pytest.approx(budgets[0], rel=0.1)  # other processes come and go


async def test_a_replica_with_a_wrong_backend_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "checking", failing(float("nan")))
    replica = Replica(ServiceConfig(threads=1))
    with pytest.raises(ValueError, match="dense is off its definition"):
        await replica.start(UserConfig(attention=AttentionConfig()))


async def test_a_replica_that_has_not_started_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn

    replica = Replica(ServiceConfig(threads=1))
    server = uvicorn.Server(uvicorn.Config(replica.app, port=0, log_level="error"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    client = Client(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", replica)
    for reply in (await asyncio.to_thread(client.complete, "a"), await asyncio.to_thread(client.get, "/v1/models")):
        assert (reply.status, reply.error["code"]) == (503, "not_ready")
        assert int(reply.headers["retry-after"]) >= 1
    assert (await asyncio.to_thread(client.get, "/ready")).status == 503
    assert (await asyncio.to_thread(client.get, "/health")).status == 200
    server.should_exit = True
    await serving


async def test_a_draining_replica_finishes_what_runs_and_admits_nothing_more(service: Client) -> None:
    task = asyncio.create_task(asyncio.to_thread(service.complete, "import os", max_tokens=200, ignore_eos=True))
    while service.replica.engine.snapshot().running == 0:
        await asyncio.sleep(0.001)
    draining = asyncio.create_task(service.replica.drain())
    await asyncio.sleep(0)
    refused = await asyncio.to_thread(service.complete, "a")
    assert (refused.status, refused.error["code"]) == (503, "draining")
    assert "retry-after" in refused.headers
    assert (await task).status == 200
    await draining
    assert (await asyncio.to_thread(service.get, "/ready")).status == 503


async def test_what_a_switch_leaves_as_it_is_is_neither_built_nor_timed_again(
    service: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.replica.retarget(to("dense", dense={}, sliding_window={"window": 100}, performer={}))
    assert (await settled(service))["degraded"] is None
    engine, checked, honest = service.replica.engine, [], truth.checking
    before, routes = dict(engine.backends.by_name), dict(engine._admission.lanes)

    def noted(backend: AttentionBackend, **rest: Any) -> truth.Checking:
        checked.append(backend.name)
        return honest(backend, **rest)

    monkeypatch.setattr(truth, "checking", noted)
    service.replica.retarget(to("performer", performer={}, sliding_window={"sinks": 4, "window": 100}, dense={}))
    assert (await settled(service))["attention"]["default"] == "performer"
    assert engine.backends.default == "performer" and not checked
    assert all(engine.backends.by_name[name] is before[name] for name in before)
    assert all(engine._admission.lanes[name] is routes[name] for name in routes)
    service.replica.retarget(to("dense", dense={}, sliding_window={"window": 101}, performer={}))
    await settled(service)
    assert checked == ["sliding_window"]
    assert engine.backends.by_name["dense"] is before["dense"]
    assert engine.backends.by_name["sliding_window"].options.model_dump()["window"] == 101
    assert await served_by(service, attention="sliding_window") == "sliding_window"


async def test_a_former_backend_goes_with_the_last_request_that_runs_under_it(service: Client) -> None:
    former = weakref.ref(service.replica.engine.backends.by_name["dense"])
    task = asyncio.create_task(asyncio.to_thread(service.complete, "import os", max_tokens=400, ignore_eos=True))
    while service.replica.engine.snapshot().running == 0:
        await asyncio.sleep(0.001)
    service.replica.retarget(to("performer"))
    await settled(service)
    assert former() is not None
    assert (await task).status == 200
    assert await served_by(service) == "performer"
    gc.collect()
    assert former() is None
