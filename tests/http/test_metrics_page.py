"""/metrics whatever the replica is doing: starting, under load, switching, draining; and in the format that is asked for."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from attention import truth
from service.config import AttentionConfig, EngineConfig, ServiceConfig, UserConfig
from service.plain import listening
from service.replica import Replica
from tests.http.client import Client

USER = UserConfig(attention=AttentionConfig(backends={"dense": {}}))


def test_openmetrics_is_answered_to_who_accepts_it_with_the_request_in_an_exemplar(service: Client) -> None:
    service.post("/v1/completions", {"prompt": "import os", "max_tokens": 1}, {"x-request-id": "exemplary"})
    plain = service.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    reply = service.get("/metrics", accept="application/openmetrics-text; version=1.0.0", **{"cache-control": "no-cache"})
    assert reply.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    found = [s.exemplar for family in text_string_to_metric_families(reply.text) for s in family.samples if s.exemplar]
    assert {"request_id": "exemplary-0"} in [each.labels for each in found]


async def test_the_receipt_tells_reserved_and_measured_bytes_apart() -> None:
    replica = Replica(ServiceConfig(threads=1, engine=EngineConfig(memory_sample_share=1)))  # every step is measured
    windowed = UserConfig(attention=AttentionConfig(default="sliding_window", backends={"sliding_window": {}}))
    async with listening(replica, windowed) as url:
        reply = await asyncio.to_thread(Client(url, replica).complete, list(range(1, 3000)), max_tokens=1)
    receipt = reply.json["longserve"]
    assert 0 < receipt["measured_bytes"] <= 1.1 * receipt["reserved_bytes"]
    assert reply.headers["x-longserve-measured-bytes"] == str(receipt["measured_bytes"])
    assert receipt["seen_tokens"] == reply.json["usage"]["prompt_tokens"] - 2999 + 1029  # window 1024, sinks 4, itself


async def test_metrics_answer_before_the_backends_are_built() -> None:
    replica = Replica(ServiceConfig(threads=1))
    text = (await replica.metrics("text", False)).decode()
    assert 'longserve_backend_switching{replica="0"} 0.0' in text
    await replica.stop()


async def test_metrics_answer_while_the_queue_is_full_and_while_it_drains() -> None:
    engine = EngineConfig(max_waiting_requests=3, max_sequences=1)
    replica = Replica(ServiceConfig(threads=1, engine=engine, drain_seconds=0.5))
    async with listening(replica, USER) as url:
        client = Client(url, replica)
        body = {"prompt": [7] * 8000, "max_tokens": 20_000, "ignore_eos": True}
        asked = [asyncio.create_task(asyncio.to_thread(client.post, "/v1/completions", body))]
        while replica.engine.snapshot().running != 1:  # the queue is empty again: three of the next five find room in it
            await asyncio.sleep(0.01)
        asked += [asyncio.create_task(asyncio.to_thread(client.post, "/v1/completions", body)) for _ in range(5)]
        while replica.engine.snapshot().waiting != 3:
            await asyncio.sleep(0.01)
        text = await asyncio.to_thread(client.metrics)
        assert 'longserve_requests_waiting{replica="0"} 3.0' in text
        assert 'longserve_promised_tokens{replica="0"} 28000.0' in text
        ages = [float(line.split()[-1]) for line in text.splitlines() if line.startswith("longserve_queue_oldest_seconds")]
        assert 0 < ages[0] < 60
        draining = asyncio.create_task(replica.drain())
        await asyncio.sleep(0.1)
        assert 'longserve_draining{replica="0"} 1.0' in await asyncio.to_thread(client.metrics)
        await draining
        assert sorted({(await each).status for each in asked}) == [429, 503]


async def test_metrics_answer_and_say_so_while_a_switch_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    honest, checking, checked = truth.checking, threading.Event(), threading.Event()

    def slow(backend: Any, **kwargs: Any) -> truth.Checking:
        checking.set()
        while not checked.is_set():
            yield
        return (yield from honest(backend, **kwargs))

    replica = Replica(ServiceConfig(threads=1))
    async with listening(replica, USER) as url:
        client = Client(url, replica)
        monkeypatch.setattr(truth, "checking", slow)
        with contextlib.ExitStack() as stack:
            stack.callback(checked.set)
            replica.retarget({"attention": {"default": "linear", "backends": {"linear": {}}}})
            await asyncio.to_thread(checking.wait, 30)
            text = await asyncio.to_thread(client.metrics)
        assert 'longserve_backend_switching{replica="0"} 1.0' in text
        while replica.readiness()["switching"]:
            await asyncio.sleep(0.01)
        text = await asyncio.to_thread(client.metrics)
    assert 'longserve_backend_active{backend="linear",is_default="true",replica="0"} 1.0' in text
    assert 'longserve_truth_passed{backend="linear",replica="0"} 1.0' in text
