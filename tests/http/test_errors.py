"""What a caller does wrong is a 4xx in OpenAI's shape that says what is wrong and what is allowed; the service goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from service.config import AttentionConfig, EngineConfig, ServiceConfig, UserConfig
from service.plain import listening_in_thread
from tests.http.client import Client, eventually

MANY = 40_000  # tokens: more than the model's 32,768


@pytest.fixture(autouse=True)
def _the_service_goes_on(service: Client) -> Iterator[None]:
    yield
    assert service.complete("import os", max_tokens=1).status == 200
    assert eventually(lambda: service.replica.engine.snapshot().bytes_in_use == 0)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"prompt": ', ("not JSON", "line 1 column 11")),
        (b"[]", ("JSON object",)),
        (b'"prompt"', ("JSON object",)),
        ({}, ("prompt is required",)),
        ({"prompt": None}, ("prompt", "a list of strings")),
        ({"prompt": ""}, ("prompt is empty",)),
        ({"prompt": []}, ("prompt", "at least one")),
        ({"prompt": ["a", ""]}, ("prompt is empty",)),
        ({"prompt": [[1], []]}, ("entry 1", "at least one")),
        ({"prompt": [1, "a"]}, ("prompt", "only strings")),
        ({"prompt": [True]}, ("prompt", "only strings")),
        ({"prompt": [1, 4096]}, ("0 to 4095", "4096", "place 1")),
        ({"prompt": [-1]}, ("0 to 4095", "-1")),
        ({"prompt": ["a"] * 5}, ("prompt may hold 4", "5")),
        ({"prompt": "a", "n": 4}, ("n may be at most 3", "4")),
        ({"prompt": "a", "n": 0}, ("n:", "1", "0")),
        ({"prompt": "a", "max_tokens": -1}, ("max_tokens", "-1")),
        ({"prompt": "a", "max_tokens": 0}, ("max_tokens", "at least 1")),
        ({"prompt": "a", "max_tokens": "5"}, ("max_tokens", "integer", "'5'")),
        ({"prompt": "a", "max_tokens": 1.5}, ("max_tokens", "integer", "1.5")),
        ({"prompt": "a", "temperature": 2.5}, ("temperature", "2", "2.5")),
        (b'{"prompt": "a", "temperature": NaN}', ("not JSON", "line 1 column 32")),
        ({"prompt": "a", "top_p": 0}, ("top_p", "0")),
        ({"prompt": "a", "stop": [""]}, ("stop", "none of them empty")),
        ({"prompt": "a", "stop": 3}, ("stop", "a list of strings")),
        ({"prompt": "a", "logprobs": 21}, ("logprobs", "20", "21")),
        ({"prompt": "a", "stream_options": {}}, ("stream_options", "stream")),
        ({"prompt": "a", "best_of": 2}, ("best_of", "n (1)")),
        ({"prompt": "a", "presence_penalty": 2.5}, ("presence_penalty", "2", "2.5")),
        ({"prompt": "a", "logit_bias": {"x": 1}}, ("logit_bias", "token ids", "'x'")),
        ({"prompt": "a", "typical_p": 0.5}, ("typical_p", "send 1", "0.5")),
        ({"prompt": "a", "suffix": "b"}, ("suffix",)),
        ({"prompt": "a", "response_format": {"type": "xml"}}, ("response_format",)),
    ],
)
def test_a_wrong_body_is_refused_by_name(service: Client, body: Any, words: tuple[str, ...]) -> None:
    reply = service.post("/v1/completions", body)
    assert reply.status == 400
    assert reply.error["type"] == "invalid_request_error"
    assert [word for word in words if word not in reply.error["message"]] == []


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": None, "suffix": None, "best_of": 1, "min_p": 0},
        {"stop": None, "user": "me", "seed": None, "n": None, "stream": False, "stream_options": None},
        {"a_field_of_tomorrow": {"deep": [1]}, "skip_special_tokens": True, "store": False, "metadata": None, "priority": 1},
        {"max_tokens": 2, "max_completion_tokens": 2},
        {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": False}},
    ],
)
def test_fields_that_change_nothing_are_let_in(service: Client, fields: dict[str, Any]) -> None:
    assert service.complete("import os", **fields).status == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings", "/v1/plan"])
def test_an_unknown_backend_is_refused_with_those_allowed(service: Client, path: str) -> None:
    key = "input" if path == "/v1/embeddings" else "prompt"
    for fields in ({"attention": "sparse"}, {"model": f"{service.replica.card.id}@sparse"}):
        reply = service.post(path, {key: "a", **fields})
        assert (reply.status, reply.error["code"]) == (400, "unknown_backend")
        assert "'sparse'" in reply.error["message"]
        assert "dense, sliding_window, performer" in reply.error["message"]


@pytest.mark.parametrize("model", ["gpt-4", "gpt-4@dense", ""])
def test_an_unknown_model_is_a_404_with_the_one_there_is(service: Client, model: str) -> None:
    reply = service.complete("a", model=model)
    assert (reply.status, reply.error["code"], reply.error["param"]) == (404, "model_not_found", "model")
    assert service.replica.card.id in reply.error["message"]


def test_two_backends_in_one_request_are_refused(service: Client) -> None:
    reply = service.complete("a", model=f"{service.replica.card.id}@dense", attention="performer")
    assert reply.status == 400
    assert "dense" in reply.error["message"]
    assert "performer" in reply.error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_too_long_input_is_refused_with_both_numbers(service: Client, stream: bool) -> None:
    reply = service.complete([7] * MANY, stream=stream)
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert str(MANY) in reply.error["message"]
    assert str(service.replica.card.max_length) in reply.error["message"]


def test_one_bad_prompt_of_several_refuses_all(service: Client) -> None:
    reply = service.complete([[1, 2], [7] * MANY])
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")


GOOD = {
    "/v1/completions": {"prompt": "a"},
    "/v1/embeddings": {"input": "a"},
    "/v1/plan": {"prompt": "a"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
}
SKULL = "\u2620"


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize(
    "field",
    [
        *(
            "model",
            "attention",
            "prompt",
            "input",
            "tokens",
            "user",
            "n",
            "stream_options",
            "suffix",
            "stop",
            "messages",
            "tools",
        ),
        *("logit_bias", "stop_token_ids", "truncate", "chat_template_kwargs", "pooling"),
    ],
)
def test_a_message_shows_at_most_two_hundred_characters_of_the_callers(service: Client, path: str, field: str) -> None:
    many = SKULL * 1000
    for value in (many, [many], {many: many}, [[many]]):
        reply = service.post(path, {**GOOD[path], field: value, **({"stream": True} if field == "stream_options" else {})})
        assert reply.status < 500
        assert reply.status == 200 or reply.error["message"].count(SKULL) <= 200


@pytest.mark.parametrize(
    "wrong",
    [
        {SKULL * 1000: 1, "prompt": None},
        {"prompt": None, "model": [SKULL * 300], **dict.fromkeys(("n", "temperature", "top_p", "top_k", "seed"), SKULL * 300)},
        {"prompt": "a", "stream": True, "stream_options": {SKULL * 1000: SKULL * 1000, SKULL * 999: 1}},
    ],
)
def test_many_faults_together_show_no_more(service: Client, wrong: dict[str, Any]) -> None:
    message = service.post("/v1/completions", wrong).error["message"]
    assert message.count(SKULL) <= 200


def test_a_key_given_twice_is_shown_no_longer(service: Client) -> None:
    key = json.dumps(SKULL * 1000, ensure_ascii=False).encode()
    message = service.post("/v1/completions", b"{" + key + b":1," + key + b":2}").error["message"]
    assert message.count(SKULL) <= 200
    assert "line 1 column" in message


@pytest.mark.parametrize(
    "path", [f"/{'x' * 3000}", f"/v1/models/{'x' * 3000}", f"/v1/completions/{'x' * 3000}"], ids=["route", "model", "below"]
)
def test_a_long_path_is_shown_no_longer(service: Client, path: str) -> None:
    assert service.get(path).error["message"].count("x") <= 210  # "max" and the like are ours


@pytest.mark.parametrize(
    ("slip", "meant"),
    [
        ("attentoin", "attention"),
        ("temprature", "temperature"),
        ("max_token", "max_tokens"),
        ("topP", "top_p"),
        ("sotp", "stop"),
    ],
)
def test_a_slip_in_a_fields_name_is_refused_with_the_field_meant(service: Client, slip: str, meant: str) -> None:
    reply = service.complete("a", **{slip: 1})
    assert (reply.status, reply.error["param"]) == (400, slip)
    assert f"did you mean {meant}?" in reply.error["message"]


@pytest.mark.parametrize("top_k", [4097, 2**31, 2**53, 2**63 - 1])
def test_more_top_tokens_than_there_are_mean_all_of_them(service: Client, top_k: int) -> None:
    text = [service.complete("x = ", seed=3, top_k=k, max_tokens=8).json["choices"][0]["text"] for k in (4096, top_k)]
    assert text[0] == text[1]


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-40])
def test_the_smallest_temperatures_draw_as_none_does(service: Client, temperature: float) -> None:
    text = [service.complete("x = ", temperature=t, max_tokens=8).json["choices"][0]["text"] for t in (0, temperature)]
    assert text[0] == text[1]


@pytest.mark.parametrize(
    "fields",
    [{"n": 4}, {"temperature": 3}, {"stop": [""]}, {"best_of": 2}, {"max_tokens": 0}, {"max_tokens": "5"}, {"suffix": "b"}, {}],
)
def test_a_plan_takes_what_the_completion_takes(service: Client, fields: dict[str, Any]) -> None:
    body = {"prompt": "a", "max_tokens": 2, **fields}
    plan, completion = service.post("/v1/plan", body), service.post("/v1/completions", body)
    assert plan.status == completion.status
    assert plan.status == 200 or plan.error == completion.error


def test_a_form_is_no_json_body(service: Client) -> None:
    reply = service.post("/v1/completions", b'{"prompt": "a"}', {"content-type": "application/x-www-form-urlencoded"})
    assert reply.status == 415
    assert "application/json" in reply.error["message"]


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_past_the_limit_is_refused_while_it_is_read(service: Client, declared: bool) -> None:
    body = b'{"prompt": "' + b"a" * 300_000 + b'"}'
    if declared:
        reply = service.post("/v1/completions", body)
    else:
        with service._open() as connection:
            chunks = (body[i : i + 50_000] for i in range(0, len(body), 50_000))
            connection.request("POST", "/v1/completions", chunks, {"content-type": "application/json"}, encode_chunked=True)
            answer = connection.getresponse()
            assert answer.status == 413
            return
    assert (reply.status, reply.error["code"]) == (413, "body_too_large")
    assert "200000" in reply.error["message"]


def test_an_unknown_route_is_a_404_and_a_wrong_method_a_405(service: Client) -> None:
    assert (service.get("/v2/completions").status, service.get("/v2/completions").error["code"]) == (404, "not_found")
    reply = service.get("/v1/completions")
    assert (reply.status, reply.error["code"]) == (405, "method_not_allowed")
    assert "POST" in reply.error["message"]


@pytest.mark.parametrize("given", ["-1", "0", "soon", "nan", "1_0", "inf", ""])
def test_a_timeout_that_is_none_is_refused(service: Client, given: str) -> None:
    reply = service.post("/v1/completions", {"prompt": "a"}, {"x-longserve-timeout-seconds": given})
    assert reply.status == 400
    assert "x-longserve-timeout-seconds" in reply.error["message"]


def test_a_deadline_that_passes_is_a_408(service: Client) -> None:
    body = {"prompt": "import os", "max_tokens": 20_000, "ignore_eos": True}
    reply = service.post("/v1/completions", body, {"x-longserve-timeout-seconds": "0.2"})
    assert (reply.status, reply.error["code"]) == (408, "deadline_exceeded")


def test_a_deadline_that_passes_mid_stream_is_an_event_and_no_done(service: Client) -> None:
    body = {"prompt": "import os", "max_tokens": 20_000, "ignore_eos": True, "stream": True}
    reply = service.post("/v1/completions", body, {"x-longserve-timeout-seconds": "0.3"})
    assert reply.status == 200
    assert reply.events[-1]["error"]["code"] == "deadline_exceeded"


def test_an_error_of_ours_is_a_500_that_tells_nothing_but_where_to_look(
    service: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a secret of the implementation")

    monkeypatch.setattr(service.replica.engine, "plan", broken)
    reply = service.post("/v1/plan", {"prompt": "a"}, {"x-request-id": "look-here"})
    assert (reply.status, reply.error["code"]) == (500, "internal_error")
    assert "look-here" in reply.error["message"]
    assert "secret" not in reply.text


@pytest.mark.parametrize("given", ["a-name", "x" * 128])
def test_a_request_id_comes_back(service: Client, given: str) -> None:
    assert service.get("/health", **{"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "with space"])
def test_a_request_id_that_no_log_wants_is_replaced(service: Client, given: str) -> None:
    found = service.get("/health", **{"x-request-id": given}).headers["x-request-id"]
    assert found != given
    assert len(found) == 32


@contextmanager
def crowded(engine: EngineConfig, prompt: Any) -> Iterator[Client]:
    """A service where one call runs and the same call waits, both until the block ends."""
    body = {"prompt": prompt, "max_tokens": 20_000, "ignore_eos": True}
    with listening_in_thread(ServiceConfig(threads=1, engine=engine), UserConfig()) as (url, replica), ExitStack() as stack:
        client = Client(url, replica)
        for counts in ((1, 0), (1, 1)):  # one by one: side by side they might meet in the queue, where one has room
            stack.enter_context(client.half_read(body, read=0))
            assert eventually(lambda: (replica.engine.snapshot().running, replica.engine.snapshot().waiting) == counts)  # noqa: B023
        yield client


@pytest.mark.parametrize(
    ("bound", "words"),
    [
        ({"max_waiting_requests": 1}, "1 requests wait and at most 1 may"),
        ({"max_waiting_tokens": 100}, "60 tokens wait, at most 100 may, and this prompt has 50"),
    ],
)
def test_a_full_queue_is_a_429_that_names_the_bound_and_when_to_come_back(bound: dict[str, int], words: str) -> None:
    with crowded(EngineConfig(max_sequences=1, **bound), [7] * 60) as client:
        refused = client.complete([7] * 50)
        assert (refused.status, refused.error["code"], refused.error["type"]) == (429, "queue_full", "rate_limit_error")
        assert int(refused.headers["retry-after"]) >= 1
        assert words in refused.error["message"]
        assert client.post("/v1/plan", {"prompt": [7] * 50}).json["data"][0]["reason"] == "queue_full"


@pytest.mark.parametrize(
    ("bound", "words"),
    [
        ({"max_waiting_requests": 2}, "3 prompts of a call wait together and at most 2 requests may"),
        ({"max_waiting_tokens": 100}, "the prompts of a call have 120 tokens and at most 100 may wait"),
    ],
)
def test_prompts_that_no_queue_takes_together_are_a_400_and_not_a_429_for_ever(bound: dict[str, int], words: str) -> None:
    engine = EngineConfig(max_sequences=1, **bound)
    with listening_in_thread(ServiceConfig(threads=1, engine=engine), UserConfig()) as (url, replica):
        client = Client(url, replica)
        for stream in (False, True):
            refused = client.complete([[7] * 40] * 3, stream=stream, max_tokens=1)
            assert (refused.status, refused.error["code"], refused.error["param"]) == (400, "invalid_request", "prompt")
            assert words in refused.error["message"]
        assert client.post("/v1/embeddings", {"input": [[7] * 40] * 3}).error["param"] == "input"
        assert client.complete([[7] * 40] * 2, max_tokens=1).status == 200
        assert client.complete([7] * 400, max_tokens=1).status == 200


def test_what_can_never_fit_is_refused_with_the_bytes_and_what_would_fit() -> None:
    config = ServiceConfig(threads=1, engine=EngineConfig(memory_budget_bytes=20 * 2**20))
    user = UserConfig(attention=AttentionConfig(backends={"dense": {}, "performer": {}}))
    with listening_in_thread(config, user) as (url, replica):
        reply = Client(url, replica).complete([7] * 30_000)
        assert (reply.status, reply.error["code"]) == (400, "memory_budget_exceeded")
        details = reply.error["details"]
        assert details["needed_bytes"] > details["budget_bytes"] == 20 * 2**20
        assert 0 < details["longest_tokens"] < 30_000
        assert details["backends_that_fit"] == ["performer"]
        assert Client(url, replica).complete([7] * 30_000, attention="performer", max_tokens=1).status == 200


def test_a_wrong_method_is_told_every_method_of_the_path(service: Client) -> None:
    for path, methods in (("/v1/prefixes", "GET, HEAD, POST, OPTIONS"), ("/v1/prefixes/x", "DELETE, GET, HEAD, OPTIONS")):
        for method in ("PUT", "OPTIONS"):
            assert service.send(method, path).headers["allow"] == methods
