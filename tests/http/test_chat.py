"""Conversations over a real socket: the same engine as completions under OpenAI's other shape."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.config import AttentionConfig, HttpConfig, ServiceConfig, UserConfig
from service.model.checkpoint import EMBEDDED
from service.plain import listening_in_thread
from tests.http.client import Client, eventually
from tests.http.conftest import BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_conversation_is_answered_as_its_text_is_continued(service: Client, backend: str) -> None:
    text = "import os\n\ndef f(\n\n    return "
    chat = service.chat("import os", "def f(", "    return ", max_tokens=12, temperature=0, attention=backend)
    plain = service.complete(text, max_tokens=12, temperature=0, attention=backend)
    (choice,) = chat.json["choices"]
    assert choice["message"] == {"role": "assistant", "content": plain.json["choices"][0]["text"], "refusal": None}
    assert choice["finish_reason"] == plain.json["choices"][0]["finish_reason"]
    assert chat.json["usage"] == plain.json["usage"]
    assert chat.json["object"] == "chat.completion"
    assert chat.json["longserve"]["backend"] == chat.headers["x-longserve-backend"] == backend


def test_the_model_id_chooses_the_backend_of_a_conversation(service: Client) -> None:
    reply = service.chat("import os", model=f"{service.replica.card.id}@performer")
    assert reply.json["longserve"]["backend"] == "performer"
    assert reply.json["longserve"]["why"] == "request"


def test_text_parts_are_joined_by_line_breaks(service: Client) -> None:
    parts = [{"type": "text", "text": each} for each in ("import os", "import sys")]
    asked = {"messages": [{"role": "user", "content": parts}], "max_tokens": 8, "temperature": 0}
    answer = service.post("/v1/chat/completions", asked).json
    assert answer["choices"] == service.chat("import os\nimport sys", max_tokens=8, temperature=0).json["choices"]


def test_the_chunks_of_a_stream_make_the_whole_answer(service: Client) -> None:
    asked: dict[str, Any] = {"max_tokens": 10, "seed": 3, "n": 2, "logprobs": True, "top_logprobs": 2, "ignore_eos": True}
    whole = service.chat("import os", **asked).json
    *chunks, last, done = service.chat("import os", **asked, stream=True, stream_options={"include_usage": True}).events
    assert done == "[DONE]"
    assert last["usage"] == whole["usage"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for index, choice in enumerate(whole["choices"]):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [each["delta"].get("role") for each in mine] == ["assistant", *[None] * (len(mine) - 1)]
        assert "".join(each["delta"]["content"] for each in mine) == choice["message"]["content"]
        assert [item for each in mine for item in each["logprobs"]["content"]] == choice["logprobs"]["content"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]


def test_log_probabilities_are_those_of_a_completion(service: Client) -> None:
    chat = service.chat("import os", temperature=0, logprobs=True, top_logprobs=3, max_tokens=6).json["choices"][0]
    plain = service.complete("import os", temperature=0, logprobs=3, max_tokens=6).json["choices"][0]["logprobs"]
    told = chat["logprobs"]["content"]
    assert [each["logprob"] for each in told] == plain["token_logprobs"]
    assert [{top["token"]: top["logprob"] for top in each["top_logprobs"]} for each in told] == plain["top_logprobs"]
    assert b"".join(bytes(each["bytes"]) for each in told).decode() == chat["message"]["content"]
    assert service.chat("import os", temperature=0).json["choices"][0]["logprobs"] is None


def test_continuous_usage_counts_up_in_every_chunk_of_a_conversation(service: Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = service.chat("import os", stream=True, stream_options=options, ignore_eos=True).events
    counts = [event["usage"]["completion_tokens"] for event in events[:-1]]
    assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] == 4


def test_max_tokens_left_out_means_1024_or_what_the_context_leaves(service: Client) -> None:
    def planned(text: str) -> Any:
        (plan,) = service.post("/v1/plan", {"messages": [{"role": "user", "content": text}]}).json["data"]
        return plan

    short, context = planned("import os"), service.replica.card.max_length
    assert short["total_tokens"] - short["prompt_tokens"] == 1024
    long = planned("x" + " a" * 32_000)
    assert 32_000 < long["prompt_tokens"] < context == long["total_tokens"]


def test_a_conversation_has_a_plan_that_is_its_completions(service: Client) -> None:
    asked = {"max_tokens": 9, "n": 2, "attention": "dense"}
    chat = {"messages": [{"role": "user", "content": "import os"}], **asked}
    plans = [service.post("/v1/plan", body).json["data"][0] for body in (chat, {"prompt": "import os", **asked})]
    assert all(plan.pop("predicted_seconds") for plan in plans)
    assert plans[0] == plans[1]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/responses/resp_1"])
def test_who_looks_for_responses_is_shown_the_way(service: Client, path: str) -> None:
    reply = service.post(path, {"input": "hello"})
    assert (reply.status, reply.error["code"]) == (404, "not_found")
    assert "/v1/chat/completions" in reply.error["message"]


def test_a_caller_who_hangs_up_on_a_conversation_gives_its_bytes_back(service: Client) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 20_000, "ignore_eos": True}
    with service.uploaded("/v1/chat/completions", json.dumps(body).encode()):
        assert eventually(lambda: service.replica.engine.snapshot().running == 1)
    assert eventually(lambda: service.replica.engine.snapshot().bytes_in_use == 0)


@contextmanager
def speaking(folder: Path, template: str | None) -> Iterator[Client]:
    """A service whose model has another chat template, or none."""
    shutil.copytree(EMBEDDED, folder / "model", ignore=shutil.ignore_patterns("*.jinja", "*.md"))
    if template is not None:
        (folder / "model" / "chat_template.jinja").write_text(template)
    config = ServiceConfig(model=str(folder / "model"), threads=1, http=HttpConfig(workers=1))
    with listening_in_thread(config, UserConfig(attention=AttentionConfig())) as (url, replica):
        yield Client(url, replica)


def test_a_model_without_a_template_offers_no_chat_and_says_so(tmp_path: Path) -> None:
    with speaking(tmp_path, None) as client:
        reply = client.chat("hello")
        assert (reply.status, reply.error["code"]) == (400, "chat_not_offered")
        assert "no chat template" in reply.error["message"] and "/v1/completions" in reply.error["message"]
        assert client.complete("import os").status == 200


ENDLESS = """{% macro go(n) %}{% for i in range(1000) %}{% if n %}{{ go(n - 1) }}{% endif %}{% endfor %}{% endmacro %}
{%- if messages[0].content == 'long' %}{{ go(9) }}{% endif %}
{%- if messages[0].content == 'large' %}{% set a = 'a' * 4000000000 %}{{ a | length }}{% endif %}
{%- if messages[0].content == 'wide' %}{% for i in range(10000) %}{{ 'a' * 1000 }}{% endfor %}{% endif %}
{%- if messages[0].content == 'no' %}{{ raise_exception('nobody says no to me') }}{% endif %}
{{- messages[0].content }}"""


def test_a_template_may_take_neither_time_nor_memory_without_end(tmp_path: Path) -> None:
    with speaking(tmp_path, ENDLESS) as client:
        for text, word in (
            ("no", "nobody says no"),
            ("large", "does not take"),
            ("wide", "more than"),
            ("long", "more than 5 s"),
        ):
            reply = client.chat(text)
            assert (reply.status, reply.error["code"], reply.error["param"]) == (400, "chat_template_refused", "messages"), text
            assert word in reply.error["message"]
            assert client.chat("import os").status == 200, f"the worker did not outlive {text}"


def test_openais_client_holds_a_conversation(service: Client) -> None:
    import openai

    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        model = client.models.list().data[0].id
        said: list[Any] = [{"role": "developer", "content": "import os"}, {"role": "user", "content": "def f("}]
        whole = client.chat.completions.create(model=model, messages=said, max_tokens=8, temperature=0, logprobs=True)
        parts = client.chat.completions.create(model=model, messages=said, max_tokens=8, temperature=0, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
        assert whole.choices[0].logprobs is not None and whole.choices[0].logprobs.content is not None
        again = [*said, whole.choices[0].message.model_dump(), {"role": "user", "content": "x"}]
        assert client.chat.completions.create(model=model, messages=again, max_tokens=2).usage is not None
        with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
            client.responses.create(model=model, input="hello")
        with pytest.raises(openai.BadRequestError, match="image_url"):
            picture = [{"type": "image_url", "image_url": {"url": "data:,"}}]
            client.chat.completions.create(model=model, messages=[{"role": "user", "content": picture}])  # type: ignore[list-item,misc]
