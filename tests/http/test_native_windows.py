"""A checkpoint with windows of its own, served: they are its default, other backends say that they are lossy, text is whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from service.config import AttentionConfig, ServiceConfig, UserConfig
from service.plain import listening_in_thread
from tests.http.client import Client
from tests.model.checkpoints import draw, their_answer, write


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("windowed") / "tiny-mistral", "mistral", sliding_window=32)


@pytest.fixture(scope="module")
def service(directory: Path) -> Iterator[Client]:
    user = UserConfig(attention=AttentionConfig(backends={"dense": {}, "performer": {"features": 32}}))
    with listening_in_thread(ServiceConfig(model=str(directory), dtype="float32", threads=1), user) as (url, replica):
        yield Client(url, replica)


def test_a_request_without_a_wish_is_answered_under_the_checkpoints_windows(service: Client, directory: Path) -> None:
    prompt = draw(100).tolist()
    body = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    answer = service.post("/v1/completions", body).json
    assert answer["longserve"]["backend"] == "native"
    expected = their_answer(directory, torch.tensor(prompt), 24)
    assert answer["choices"][0]["text"] == service.replica.tokenizer.bytes_of(expected, False).decode(errors="replace")
    other = service.post("/v1/completions", {**body, "attention": "dense"}).json
    assert other["longserve"]["backend"] == "dense"
    assert other["choices"][0]["text"] != answer["choices"][0]["text"]


def test_every_place_that_names_backends_says_which_are_lossy(service: Client) -> None:
    info = service.get("/info").json
    told = {each["name"]: each["lossy"] for each in info["attention"]["backends"]}
    assert (info["model"], info["attention"]["default"], list(told)) == (
        "tiny-mistral",
        "native",
        ["native", "dense", "performer"],
    )
    assert told["native"] is None and "windows of its own" in told["dense"] and "performer" in told["performer"]
    models = {each["id"]: each["lossy"] for each in service.get("/v1/models").json["data"]}
    assert models == {"tiny-mistral": None, **{f"tiny-mistral@{name}": why for name, why in told.items()}}
    (native,) = (each for each in info["attention"]["backends"] if each["name"] == "native")
    assert native["options"]["windows"] == [31, 31]


def test_its_plan_is_the_sum_of_its_layers(service: Client) -> None:
    route = service.replica.engine._admission.lanes["native"]
    plan = service.post("/v1/plan", {"prompt": "import os\n" * 20, "max_tokens": 8}).json["data"][0]
    layers = route.backend.layers
    assert plan["terms"]["state"] == sum(layer.state_bytes(plan["total_tokens"]) for layer in layers)
    seconds = sum(
        route.course.pace.attention[layer](100, layer.cost(100, 300, causal=True).flops) for layer in layers
    ) + route.course.pace.model(100)
    assert route.course.step_seconds(200, 300) == pytest.approx(seconds)


def test_a_switch_keeps_native_whatever_the_target_lists(service: Client) -> None:
    backend = service.replica.engine.backends.by_name["native"]
    state = service.get("/ready").json
    assert state["attention"]["default"] == "native" and state["asked"]["default"] is None and state["degraded"] is None
    assert service.replica.backends[0] == "native"
    assert service.replica.engine.backends.by_name["native"] is backend
