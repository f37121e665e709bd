"""Embeddings, models, tokens, plans, state, keys, metrics, and OpenAI's own client."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

import attention
from service.config import AttentionConfig, HttpConfig, ServiceConfig, UserConfig
from service.model.checkpoint import load
from service.plain import listening_in_thread
from tests.http.client import Client
from tests.http.conftest import BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
def test_embeddings_have_length_one_and_the_models_width(service: Client, backend: str) -> None:
    answer = service.post("/v1/embeddings", {"input": ["import os", "def f("], "attention": backend}).json
    assert answer["longserve"]["backend"] == backend
    assert [each["index"] for each in answer["data"]] == [0, 1]
    for each in answer["data"]:
        assert len(each["embedding"]) == service.replica.card.width
        assert math.isclose(math.hypot(*each["embedding"]), 1, rel_tol=1e-5)  # float32 has 7 digits


def test_fewer_dimensions_are_the_first_ones_at_length_one(service: Client) -> None:
    whole, cut = (
        service.post("/v1/embeddings", {"input": "import os", **wanted}).json["data"][0]["embedding"]
        for wanted in ({}, {"dimensions": 8})
    )
    length = math.hypot(*whole[:8])
    assert cut == pytest.approx([each / length for each in whole[:8]], rel=1e-9)


@pytest.mark.parametrize("count", [1, 3, 600])  # 600 tokens are two chunks
def test_last_is_the_hidden_state_of_the_last_token_and_mean_that_of_all(service: Client, count: int) -> None:
    tokens = [7 + place % 90 for place in range(count)]
    core = load()
    with torch.inference_mode():
        ids, backend = torch.tensor(tokens), attention.build("dense", {}, core.model.head_shape())
        attend = lambda layer, q, k, v: backend.attend(q, k, v, attention.Segments((count,)), causal=True)  # noqa: E731
        hidden = core.model.hidden(ids, torch.arange(count), attend).float()
    for pooling, wanted in (("last", hidden[-1]), ("mean", hidden.mean(0))):
        asked = {"input": tokens, "pooling": pooling, "attention": "dense"}
        found = torch.tensor(service.post("/v1/embeddings", asked).json["data"][0]["embedding"])
        assert torch.cosine_similarity(found, wanted, dim=0) > 0.999  # bfloat16 in chunks


def test_base64_carries_the_same_numbers(service: Client) -> None:
    body = {"input": "import os"}
    plain = service.post("/v1/embeddings", body).json["data"][0]["embedding"]
    packed = base64.b64decode(service.post("/v1/embeddings", body | {"encoding_format": "base64"}).json["data"][0]["embedding"])
    assert struct.unpack(f"<{len(plain)}f", packed) == pytest.approx(plain, rel=1e-6)  # the one has been through float32


def test_an_input_alone_embeds_as_it_does_among_others(service: Client) -> None:
    alone = service.post("/v1/embeddings", {"input": "import os"}).json["data"][0]["embedding"]
    among = service.post("/v1/embeddings", {"input": ["def f(x): return", "import os"]}).json["data"][1]["embedding"]
    assert among == pytest.approx(alone, abs=5e-3)  # bfloat16 products of another shape round otherwise


@pytest.mark.parametrize(
    ("body", "word"), [({}, "input"), ({"input": ""}, "empty"), ({"input": "a", "dimensions": 800}, "dimensions")]
)
def test_a_wrong_embedding_body_is_refused_by_name(service: Client, body: dict[str, object], word: str) -> None:
    reply = service.post("/v1/embeddings", body)
    assert reply.status == 400
    assert word in reply.error["message"]


def test_the_models_are_the_model_and_one_id_per_backend(service: Client) -> None:
    answer, name = service.get("/v1/models").json, service.replica.card.id
    assert [each["id"] for each in answer["data"]] == [name, *(f"{name}@{backend}" for backend in BACKENDS)]
    assert service.get(f"/v1/models/{name}@dense").json == answer["data"][1]
    assert service.get("/v1/models/other").error["code"] == "model_not_found"


def test_tokens_come_back_as_their_text(service: Client) -> None:
    text = "def f(x):\n\treturn 'ä€🙂'"
    found = service.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json
    assert found["count"] == len(found["tokens"])
    assert service.post("/detokenize", {"tokens": found["tokens"]}).json == {"prompt": text}
    assert service.post("/detokenize", {"tokens": [10**6]}).status == 400


def test_a_plan_computes_nothing_and_names_backend_bytes_and_verdict(service: Client) -> None:
    before = service.replica.engine.snapshot().last_progress
    for key in ("prompt", "input"):
        (plan,) = service.post("/v1/plan", {key: "import os", "attention": "dense"}).json["data"]
        assert plan["backend"] == "dense"
        assert plan["needed_bytes"] == sum(plan["terms"].values()) > 0
        assert plan["verdict"] == "runs"
    assert service.replica.engine.snapshot().running == 0
    assert before <= service.replica.engine.snapshot().last_progress
    assert service.post("/v1/plan", {"prompt": "a", "input": "a"}).status == 400
    assert service.post("/v1/plan", {}).status == 400


def test_who_leaves_the_backend_to_auto_may_say_what_matters_and_is_told_why(service: Client) -> None:
    for backend in BACKENDS:
        wish = {"auto": {"prefer": [backend], "max_seconds": 100}}
        reply = service.complete("import os", attention=wish, max_tokens=1)
        assert reply.json["longserve"]["backend"] == reply.headers["x-longserve-backend"] == backend
        assert reply.json["longserve"]["why"].startswith(f"auto: preferred within 100 s, predicted {backend} ")
        (plan,) = service.post("/v1/plan", {"input": "import os", "attention": wish}).json["data"]
        assert (plan["backend"], plan["why"].split(",")[0]) == (backend, "auto: preferred within 100 s")


def test_health_readiness_and_facts_are_told(service: Client) -> None:
    assert service.get("/health").json == {"status": "ok"}
    ready = service.get("/ready").json
    assert ready["ready"] is True
    assert ready["degraded"] is None
    info = service.get("/info").json
    assert info["attention"]["default"] == "sliding_window"
    assert [each["name"] for each in info["attention"]["backends"]] == list(BACKENDS)
    assert info["threads"] == 1
    assert service.get("/docs").status == 200


def test_a_stuck_engine_is_a_fault(service: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    now = service.replica.engine.snapshot()
    stuck = dataclasses.replace(now, running=1, last_progress=now.last_progress - 1000)
    monkeypatch.setattr(service.replica.engine, "snapshot", lambda: stuck)
    reply = service.get("/health")
    assert reply.status == 503
    assert "1 requests run" in reply.json["status"]


def test_metrics_count_what_was_asked(service: Client) -> None:
    def value(name: str, **labels: str) -> float:
        families = text_string_to_metric_families(service.metrics())
        found = [s.value for f in families for s in f.samples if s.name == name and labels.items() <= s.labels.items()]
        return sum(found)

    ok = {"backend": "performer", "kind": "completion", "outcome": "ok"}
    before, tokens = value("longserve_requests_total", **ok), value("longserve_output_tokens_sum", backend="performer")
    service.complete("import os", attention="performer", max_tokens=7, ignore_eos=True)
    assert value("longserve_requests_total", **ok) == before + 1
    assert value("longserve_output_tokens_sum", backend="performer") == tokens + 7
    refused = value("longserve_rejected_total", reason="context_length_exceeded")
    service.complete([7] * 40_000)
    assert value("longserve_rejected_total", reason="context_length_exceeded") == refused + 1
    assert value("longserve_requests_running") == 0
    assert value("longserve_memory_reserved_bytes") == 0
    assert value("longserve_backend_active", backend="sliding_window", is_default="true") == 1
    assert 0 <= value("longserve_truth_error", backend="dense") <= value("longserve_truth_bound", backend="dense")


def test_no_label_of_a_metric_is_a_callers_word(service: Client) -> None:
    service.get("/a-callers-path")
    service.complete("import os", attention="a-callers-backend")
    service.send("BREW", "/v1/completions")
    text = service.metrics()
    assert "a-callers" not in text
    assert "BREW" not in text
    assert 'replica="0"' in text


@pytest.fixture(scope="module")
def guarded() -> Iterator[Client]:
    patch = pytest.MonkeyPatch()
    patch.setenv("TEST_KEYS", "first, second")
    config = ServiceConfig(threads=1, http=HttpConfig(api_keys_env="TEST_KEYS"))
    with listening_in_thread(config, UserConfig(attention=AttentionConfig())) as (url, replica):
        yield Client(url, replica)
    patch.undo()


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/info", "/docs", "/openapi.json", "/nowhere"])
def test_without_a_key_nothing_but_health_is_told(guarded: Client, path: str) -> None:
    reply = guarded.get(path)
    assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
    assert reply.headers["www-authenticate"] == "Bearer"
    assert guarded.get("/health").status == guarded.get("/ready").status == 200


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/embeddings", "/v1/plan", "/tokenize", "/detokenize", "/nowhere", "/info"]
)
def test_without_a_key_no_body_is_looked_at(guarded: Client, path: str) -> None:
    reply = guarded.post(path, b"no JSON")
    assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize(
    "shown",
    [
        *(
            "Bearer third",
            "Bearer ",
            "Bearer",
            "",
            "Bearer first, second",
            "Basic first",
            "first",
            "Bearer firs",
            "Bearer firstt",
        ),
        *("Bearer f\xefrst", "Bearer FIRST", "Bearer first second", "Bearer " + "x" * 10_000, "Token first", "Bearer=first"),
    ],
)
def test_a_wrong_key_lets_nobody_in(guarded: Client, shown: str) -> None:
    reply = guarded.get("/v1/models", authorization=shown)
    assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
    assert "x" * 10 not in reply.error["message"]


@pytest.mark.parametrize("key", ["first", "second"])
def test_every_key_lets_its_owner_in(guarded: Client, key: str) -> None:
    assert guarded.get("/v1/models", authorization=f"Bearer {key}").status == 200
