"""The operator's routes: for the operator's keys only, and nothing that cannot serve comes in force through them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from attention import AttentionBackend, truth
from service.config import EngineConfig, HttpConfig, ServiceConfig, UserConfig
from service.model.quantized import Quantized
from service.plain import listening
from service.replica import Replica
from tests.http.client import Client, Reply, eventually

OPERATOR = {"authorization": "Bearer operator"}
CALLER = {"authorization": "Bearer caller"}
BOTH = {"default": "dense", "backends": {"dense": {}, "performer": {"features": 64}}}


@pytest.fixture
async def service(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Client]:
    monkeypatch.setenv("OPERATORS", "operator")
    monkeypatch.setenv("CALLERS", "caller")
    http = HttpConfig(admin_keys_env="OPERATORS", api_keys_env="CALLERS")
    replica = Replica(ServiceConfig(threads=1, http=http, engine=EngineConfig(memory_budget_bytes=2**26)))
    async with listening(replica, UserConfig.model_validate({"attention": BOTH})) as url:
        yield Client(url, replica)


async def get(service: Client, path: str, headers: dict[str, str] = OPERATOR) -> Reply:
    return await asyncio.to_thread(service.get, path, **headers)


async def post(service: Client, path: str, body: Any, headers: dict[str, str] = OPERATOR) -> Reply:
    return await asyncio.to_thread(service.post, path, body, headers)


async def ask(service: Client, **fields: Any) -> Reply:
    return await post(service, "/v1/completions", {"prompt": "import os", "max_tokens": 1, **fields}, CALLER)


def lying(name: str) -> Any:
    """A truth check that finds one backend off its definition."""
    honest = truth.checking

    def checking(backend: AttentionBackend, **rest: Any) -> truth.Checking:
        if backend.name == name:
            yield
            return truth.Truth(float("nan"), bound=0.1)
        return (yield from honest(backend, **rest))

    return checking


async def test_a_switch_over_http_serves_when_it_is_answered_and_is_told(service: Client) -> None:
    wanted = {"default": "sliding_window", "backends": {"sliding_window": {"window": 64}}}
    reply = await post(service, "/admin/attention", wanted)
    assert reply.status == 200, reply.text
    assert (await ask(service)).json["longserve"]["backend"] == "sliding_window"
    (state,) = (await get(service, "/admin/attention")).json["replicas"]
    assert state["attention"]["backends"] == {"sliding_window": {"window": 64}}
    assert [(each["attention"]["default"], each["failure"]) for each in state["history"]] == [("sliding_window", None)]


@pytest.mark.parametrize(
    ("wanted", "word"),
    [
        ({"default": "nowhere"}, "default"),
        ({"defalt": "dense"}, "defalt"),
        ({"backends": {"dense": {"window": 1}}}, "window"),
        ({"default": "longformer", "backends": {"longformer": {}}}, "no causal form"),
        ({"default": "native", "backends": {"dense": {}}}, "native"),
        ({"default": "performer", "backends": {"performer": {"features": 65536}}}, "for a request of one token"),
    ],
)
async def test_what_cannot_serve_is_refused_and_leaves_all_as_it_was(service: Client, wanted: Any, word: str) -> None:
    before = (await get(service, "/admin/attention")).json
    reply = await post(service, "/admin/attention", wanted)
    assert (reply.status, reply.error["code"]) == (400, "invalid_request")
    assert word in reply.error["message"]
    assert (await get(service, "/admin/attention")).json == before


async def test_callers_are_no_operators_and_operators_no_callers(service: Client) -> None:
    for path in ("/admin/attention", "/admin/truth-check"):
        for headers in ({}, CALLER, {"authorization": "Bearer x"}):
            assert (await post(service, path, BOTH, headers)).status == 401
    assert (await get(service, "/admin/attention", CALLER)).status == 401
    assert (await get(service, "/info", OPERATOR)).status == 401


async def test_without_operators_keys_there_is_no_such_route() -> None:
    async with listening(Replica(ServiceConfig(threads=1)), UserConfig()) as url:
        client = Client(url, None)
        assert (await get(client, "/admin/attention")).status == 404
        assert (await post(client, "/admin/attention", BOTH)).status == 404


async def test_a_backend_that_is_off_its_definition_is_withdrawn_until_it_is_right_again(
    service: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = await post(service, "/admin/truth-check", {})
    assert [(each["backend"], each["passed"]) for each in reply.json["replicas"][0]["checks"]] == [
        ("dense", True),
        ("performer", True),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(truth, "checking", lying("performer"))
        reply = await post(service, "/admin/truth-check", {})
    assert reply.json["replicas"][0]["checks"][1] == {"backend": "performer", "error": None, "bound": 0.1, "passed": False}
    refused = await ask(service, attention="performer")
    assert (refused.status, refused.error["code"]) == (503, "backend_withdrawn")
    assert "off its definition by nan, allowed: 0.1" in refused.error["message"]
    assert int(refused.headers["retry-after"]) > 0
    assert (await ask(service)).status == 200
    assert (await ask(service, attention="auto")).json["longserve"]["backend"] == "dense"
    ready = (await get(service, "/ready")).json
    assert ready["ready"] is True and "performer" in ready["withdrawn"]
    assert 'longserve_truth_passed{backend="performer",replica="0"} 0.0' in (await get(service, "/metrics", CALLER)).text
    await post(service, "/admin/truth-check", {})
    assert (await ask(service, attention="performer")).status == 200


async def test_a_replica_whose_default_is_withdrawn_is_not_ready(service: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "checking", lying("dense"))
    await post(service, "/admin/truth-check", {})
    assert (await get(service, "/ready")).status == 503
    assert (await ask(service)).error["code"] == "backend_withdrawn"


async def test_what_runs_under_a_backend_that_is_withdrawn_ends_with_the_reason(
    service: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = asyncio.create_task(ask(service, max_tokens=2000, ignore_eos=True))
    while service.replica.engine.snapshot().running == 0:
        await asyncio.sleep(0.001)
    monkeypatch.setattr(truth, "checking", lying("dense"))
    await post(service, "/admin/truth-check", {})
    assert (await task).error["code"] == "backend_withdrawn"
    assert service.replica.engine.snapshot().bytes_in_use == 0


async def test_what_serves_is_checked_again_when_the_replica_has_been_idle() -> None:
    replica = Replica(ServiceConfig(threads=1, truth_check_seconds=0.2))
    async with listening(replica, UserConfig()) as url:
        client = Client(url, None)

        def checked() -> float:
            (line,) = [
                each for each in client.metrics().splitlines() if each.startswith("longserve_truth_check_timestamp_seconds{")
            ]
            return float(line.split()[-1])

        first = await asyncio.to_thread(checked)
        assert await asyncio.to_thread(eventually, lambda: checked() > first)


async def test_products_that_are_wrong_withdraw_every_backend_and_start_no_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServiceConfig(threads=1, weights="int8", dtype="float32", engine=EngineConfig(memory_budget_bytes=2**26))
    replica, honest = Replica(config), Quantized.product
    await replica.start(UserConfig.model_validate({"attention": BOTH}))
    assert [each["passed"] for each in (await replica.check_truth())["checks"]] == [True, True]
    monkeypatch.setattr(Quantized, "product", lambda self, x, bias=None: honest(self, x, bias) * 1.01)
    assert [each["passed"] for each in (await replica.check_truth())["checks"]] == [False, False]
    assert "off the numbers its weights tell" in str(replica.readiness()["withdrawn"])
    await replica.stop()
    with pytest.raises(ValueError, match="attention backend dense is off the numbers its weights tell"):
        await Replica(config).start(UserConfig())
