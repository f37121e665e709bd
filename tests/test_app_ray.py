"""The service as its users have it: `longserve serve` with two replicas on a real Ray Serve, asked over HTTP.

One service for the whole module, started and ended by its own command line. The long text is a module of the standard
library.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import inspect
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.http.client import eventually
from tests.serving import Service, are_gone, descendants, free_port, serving, switch_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BACKENDS = ("dense", "sliding_window", "performer")
LONG_TEXT = inspect.getsource(argparse)
LONG_TOKENS = 20_000  # at least
ONE_SCORE_MATRIX = LONG_TOKENS**2 * 2  # bytes of the scores of one head of one layer in bfloat16; the model has four


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    def two_replicas(data: Any) -> None:
        data["applications"][0]["args"]["threads"] = 1
        data["applications"][0]["deployments"][0]["num_replicas"] = 2

    with serving(tmp_path_factory.mktemp("serve") / "two.yaml", two_replicas) as service:
        yield service


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_text_is_answered_under_every_backend_without_a_square_of_memory(service: Service, backend: str) -> None:
    assert service.post("/tokenize", {"prompt": LONG_TEXT}).json["count"] >= LONG_TOKENS
    before = max(service.metric("longserve_process_resident_memory_bytes"))
    completion = service.complete(LONG_TEXT, attention=backend, max_tokens=8)
    embedding = service.post("/v1/embeddings", {"input": LONG_TEXT, "attention": backend})
    for reply in (completion, embedding):
        assert reply.status == 200, reply.text
        assert reply.json["longserve"]["backend"] == reply.headers["x-longserve-backend"] == backend
        assert reply.json["usage"]["prompt_tokens"] >= LONG_TOKENS
    assert math.isclose(math.hypot(*embedding.json["data"][0]["embedding"]), 1, rel_tol=1e-5)  # float32 has 7 digits
    assert max(service.metric("longserve_process_peak_resident_memory_bytes")) - before < ONE_SCORE_MATRIX


def test_a_callers_fault_is_a_4xx_through_the_proxy_too(service: Service) -> None:
    name = service.get("/v1/models").json["data"][0]["id"]
    for body, status, word in (
        (b"{", 400, "not JSON"),
        ({"prompt": ""}, 400, "empty"),
        ({"prompt": "a", "attention": "sparse"}, 400, "dense, sliding_window, performer"),
        ({"prompt": "a", "model": "gpt-4"}, 404, name),
        ({"prompt": [7] * 40_000}, 400, "40000"),
    ):
        reply = service.post("/v1/completions", body)
        assert reply.status == status
        assert word in reply.error["message"]
    assert service.complete("import os").status == 200


def test_a_request_id_comes_back_once(service: Service) -> None:
    with service._open() as connection:
        connection.request("GET", "/health", headers={"x-request-id": "mine"})
        ids = [value for name, value in connection.getresponse().getheaders() if name.lower() == "x-request-id"]
    assert ids == ["mine"]


def test_a_scrape_merges_both_replicas(service: Service) -> None:
    for _ in range(20):
        assert service.complete("import os", max_tokens=1).status == 200
    started = service.metric("longserve_process_start_time_seconds")
    assert len(started) == 2
    served = [sum(service.metric("longserve_requests_total", outcome="ok")) for _ in range(5)]
    assert served == [served[0]] * 5  # whichever replica answers the scrape
    assert served[0] >= 20


def test_who_hangs_up_frees_bytes_behind_the_proxy(service: Service) -> None:
    body = {"prompt": "import os", "max_tokens": 30_000, "stream": True, "ignore_eos": True}
    with service.half_read(body, read=2000):
        assert sum(service.metric("longserve_requests_running")) == 1
    assert eventually(lambda: sum(service.metric("longserve_memory_reserved_bytes")) == 0)


def test_a_switch_under_load_fails_no_request_and_keeps_the_processes(service: Service) -> None:
    pids, stopped = service.pids(), threading.Event()
    assert len(pids) == 2

    def ask() -> list[tuple[int, str]]:
        seen = []
        while not stopped.is_set():
            reply = service.complete("import os", max_tokens=4)
            seen.append((reply.status, reply.json.get("longserve", {}).get("backend", reply.text)))
            time.sleep(0.02)  # leaves the command below some of the two cores
        return seen

    with concurrent.futures.ThreadPoolExecutor(3) as callers:
        asked = [callers.submit(ask) for _ in range(3)]
        try:
            for default in ("performer", "sliding_window"):
                service.rewrite(lambda data, default=default: switch_of(data).update(default=default))
                applied = service.apply()
                assert applied.returncode == 0, applied.stderr
                time.sleep(0.5)  # some answers under each
        finally:
            stopped.set()
    seen = [each for future in asked for each in future.result()]
    assert {status for status, _ in seen} == {200}
    assert {backend for _, backend in seen} == {"dense", "performer", "sliding_window"}
    assert service.complete("import os").json["longserve"]["backend"] == "sliding_window"
    assert service.pids() == pids


@pytest.mark.parametrize(
    ("switch", "says"),
    [
        ({"defalt": "dense"}, "user_config.attention.defalt: unknown key, allowed here: default, backends, auto, weights"),
        ({"backends": {"sparse": {}}}, "unknown attention backend 'sparse'"),
        ({"backends": {"dense": {}, "sliding_window": {"window": 0}}}, "sliding_window.window"),
        ({"backends": {"dense": {}, "performer": {"features": 10**9}}}, "performer.features"),
        ({"default": "dense", "backends": {"dense": {}, "longformer": {}}}, "longformer has no causal form"),
    ],
)
def test_a_switch_that_cannot_serve_never_reaches_a_replica(
    service: Service, tmp_path: Path, switch: dict[str, Any], says: str
) -> None:
    before = service.get("/ready").json["asked"]
    wrong = service.rewrite(lambda data: switch_of(data).update(switch), tmp_path / "wrong.yaml")
    refused = service.apply(wrong)
    assert refused.returncode == 2
    assert says in refused.stderr and "Traceback" not in refused.stderr
    assert service.get("/ready").json["asked"] == before


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda application: application["args"].update(threads=2), "args.threads"),
        (
            lambda application: application["deployments"][0].update(ray_actor_options={"num_cpus": 0.5}),
            "deployments.0.ray_actor_options.num_cpus",
        ),
    ],
)
def test_what_would_restart_replicas_is_told_and_refused(service: Service, tmp_path: Path, change: Any, key: str) -> None:
    pids = service.pids()
    refused = service.apply(service.rewrite(lambda data: change(data["applications"][0]), tmp_path / "restart.yaml"))
    assert refused.returncode == 1
    assert f"applications.0.{key}: " in refused.stdout and "(restarts the replicas)" in refused.stdout
    assert f"applications.0.{key} would restart the replicas; with --restart they are" in refused.stderr
    assert service.pids() == pids


def test_a_plan_is_told_on_the_command_line(service: Service, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("import os\n" * 100)
    told = service.cli("plan", str(text), str(service.file))
    assert told.returncode == 0, told.stderr
    *table, default, auto = told.stdout.splitlines()[1:]
    assert [line.split()[0] for line in table] == list(BACKENDS)
    assert default == "no wish: sliding_window (default)"
    assert auto.startswith("auto: ") and all(f"{name} 0" in auto for name in BACKENDS)


def test_a_model_that_cannot_be_served_is_told_as_the_reason(service: Service, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))

    def change(data: Any) -> None:
        data["http_options"]["port"] = free_port()
        data["applications"][0]["args"]["model"] = str(tmp_path)

    refused = service.cli("serve", str(service.rewrite(change, tmp_path / "wrong.yaml")))
    assert refused.returncode == 1
    assert f"the service did not start: ValueError: {tmp_path / 'config.json'}: model_type must be one of" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_port_in_use_is_told_before_anything_starts(service: Service) -> None:
    refused = service.cli("serve", str(service.file))
    assert refused.returncode == 1
    assert "Address already in use" in refused.stderr


def test_openais_client_works_through_the_proxy(service: Service) -> None:
    import openai

    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        model = client.models.list().data[0].id
        parts = client.completions.create(
            model=f"{model}@dense", prompt="import os", max_tokens=8, stream=True, stream_options={"include_usage": True}
        )
        *_, last = list(parts)
        assert last.usage is not None and last.usage.completion_tokens <= 8
        assert len(client.embeddings.create(model=model, input=["a", "b"]).data) == 2


def test_a_command_without_a_service_says_what_is_missing(service: Service, tmp_path: Path) -> None:
    lonely = service.rewrite(lambda data: data["http_options"].update(port=free_port()), tmp_path / "lonely.yaml")
    for command in ("apply", "status"):
        refused = service.cli(command, str(lonely))
        assert refused.returncode == 1
        assert "longserve serve starts the service" in refused.stderr


def test_an_interrupt_drains_and_leaves_nothing_behind(service: Service) -> None:
    """The last test of the module: it ends the service."""
    below = descendants(service.process.pid)
    assert len(below) >= 4  # proxy, controller, two replicas
    body = {"prompt": "import os", "max_tokens": 600, "stream": True, "ignore_eos": True}
    with concurrent.futures.ThreadPoolExecutor(1) as callers:
        stream = callers.submit(service.post, "/v1/completions", body)
        assert eventually(lambda: sum(service.metric("longserve_requests_running")) == 1)
        service.process.send_signal(signal.SIGINT)
        assert stream.result().events[-1] == "[DONE]"
    assert service.process.wait(60) == 0
    assert eventually(lambda: are_gone(below))
