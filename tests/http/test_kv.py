"""Keys and values in 8 bits, served: the answers of the numbers kept, their bytes wherever bytes are told, and who cannot."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

import attention
from service.config import AttentionConfig, ServiceConfig, UserConfig
from service.model.checkpoint import load
from service.model.continuation import Continuation
from service.plain import listening_in_thread
from tests.http.client import Client

BACKENDS = {"dense": {}, "sliding_window": {"window": 200}, "topk": {"blocks": 8, "window": 64}}
PROMPT = random.Random(0).choices(range(300, 4000), k=1300)  # two whole chunks, and a third that is not


@pytest.fixture(scope="module")
def service() -> Iterator[Client]:
    user = UserConfig(attention=AttentionConfig(backends=BACKENDS))
    with listening_in_thread(ServiceConfig(kv="int8", threads=1), user) as (url, replica):
        yield Client(url, replica)


@pytest.mark.parametrize("name", BACKENDS)
def test_an_answer_is_the_same_read_in_chunks_from_a_kept_prefix_and_bare(service: Client, name: str) -> None:
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "attention": name}
    first, second = (service.post("/v1/completions", body).json for _ in range(2))
    assert [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in (first, second)] == [0, 1024]
    model = load(kv="int8").model
    text = Continuation(model, attention.build(name, BACKENDS[name], model.head_shape()), len(PROMPT) + 12)
    with torch.inference_mode():
        for start in range(0, len(PROMPT), 512):  # as the engine cuts it: bfloat16 may round a near tie otherwise
            logits = text.read(torch.tensor(PROMPT[start : start + 512]))
        tokens = [int(logits.argmax())]
        while len(tokens) < 12:
            tokens.append(int(text.read(torch.tensor(tokens[-1:])).argmax()))
    assert first["choices"][0]["text"] == second["choices"][0]["text"] == service.replica.tokenizer.decode(tokens)


def test_plan_receipt_and_metrics_tell_the_bytes_of_8_bits(service: Client) -> None:
    shape = service.replica.engine._admission.lanes["dense"].backend.shape
    assert shape.kv == torch.int8 and service.get("/info").json["kv"] == "int8"
    plan = service.post("/v1/plan", {"prompt": PROMPT, "max_tokens": 236, "attention": "dense"}).json["data"][0]
    layers = service.replica._loaded.model.config.num_hidden_layers
    assert plan["terms"]["state"] == 2 * layers * 1536 * shape.key_value_heads * (shape.head_width + 4)


async def test_a_switch_to_who_cannot_keep_them_is_refused_by_name_and_serves_on(service: Client) -> None:
    service.replica.retarget({"attention": {"default": "performer", "backends": {"performer": {}}}})
    await service.replica.settled()
    assert "performer cannot keep keys and values in 8 bits" in service.replica.readiness()["degraded"]
    assert service.complete("import os", max_tokens=1).json["longserve"]["backend"] == "dense"
