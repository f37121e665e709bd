"""OpenAI's own client and LangChain's work unchanged: every route, streams, typed errors, and the client's own retries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from service.engine.request import Draining, QueueFull, RequestError
from tests.http.client import Client

WORD = "def fibonacci(n):"


@pytest.fixture
def client(service: Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def model(service: Client) -> str:
    return str(service.replica.card.id)


def test_models(client: openai.OpenAI, model: str) -> None:
    assert next(iter(client.models.list())).id == model
    assert client.models.retrieve(f"{model}@dense").id == f"{model}@dense"


def test_completions_with_every_field_that_is_offered(client: openai.OpenAI, model: str) -> None:
    made = client.completions.create(
        model=model,
        prompt=[WORD, "import os"],
        max_tokens=6,
        n=2,
        seed=5,
        temperature=0.7,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logit_bias={"5": -1},
        logprobs=2,
        stop=["\n\n\n"],
        user="me",
        extra_body={"attention": "performer", "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 2, "truncate": "left"},
    )
    assert len(made.choices) == 4 and made.usage is not None
    assert made.choices[0].logprobs is not None and made.choices[0].logprobs.tokens
    assert made.model_extra is not None and made.model_extra["longserve"]["backend"] == "performer"


def test_a_stream_of_a_completion_with_its_usage(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "prompt": WORD, "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**asked)
    *parts, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert last.usage == whole.usage


def test_chat_and_its_stream(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": WORD}],
        "max_completion_tokens": 8,
        "seed": 1,
    }
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, store=False, metadata={"a": "b"})
    assert whole.choices[0].logprobs is not None and len(whole.choices[0].logprobs.content or ()) > 0
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        for _ in stream:
            pass
        final = stream.current_completion_snapshot
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.usage is not None and whole.usage is not None and final.usage.total_tokens == whole.usage.total_tokens


def test_embeddings_of_texts_and_tokens(client: openai.OpenAI, model: str) -> None:
    made = client.embeddings.create(model=model, input=[WORD, "import os"], dimensions=16)  # in base64, as the client asks
    assert [len(each.embedding) for each in made.data] == [16, 16]
    assert made.usage.prompt_tokens > 2
    assert client.embeddings.create(model=model, input=[[1, 2], [3]], encoding_format="float").data[1].index == 1


def test_the_receipt_is_in_the_raw_answers_headers(client: openai.OpenAI, model: str) -> None:
    raw = client.completions.with_raw_response.create(model=model, prompt=WORD, max_tokens=2)
    assert raw.headers["x-longserve-backend"] == "sliding_window"
    assert raw.headers["x-request-id"]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda c, m: c.completions.create(model=m, prompt="a", extra_body={"attention": "sparse"}), openai.BadRequestError),
        (lambda c, m: c.completions.create(model="gpt-4", prompt="a"), openai.NotFoundError),
        (lambda c, m: c.completions.create(model=m, prompt=[7] * 40_000), openai.BadRequestError),
        (lambda c, m: c.responses.create(model=m, input="a"), openai.NotFoundError),
        (lambda c, m: c.chat.completions.create(model=m, messages=[]), openai.BadRequestError),
        (lambda c, m: c.moderations.create(input="a"), openai.NotFoundError),
    ],
)
def test_a_refusal_is_the_clients_typed_error_with_our_words(client: openai.OpenAI, model: str, call: Any, error: Any) -> None:
    with pytest.raises(error) as refusal:
        call(client, model)
    assert refusal.value.body["message"] and refusal.value.body["code"]


@pytest.mark.parametrize("refusal", [QueueFull("the queue is full", 0.01), Draining("the service is stopping")])
@pytest.mark.parametrize("route", ["completions", "chat", "embeddings", "stream"])
def test_what_may_succeed_later_is_tried_again_by_the_client(
    service: Client, model: str, monkeypatch: pytest.MonkeyPatch, route: str, refusal: RequestError
) -> None:
    submit, refused = service.replica.engine.submit, iter([refusal])

    def at_first_full(request: Any) -> Any:
        for error in refused:
            raise error
        return submit(request)

    monkeypatch.setattr(service.replica.engine, "submit", at_first_full)
    monkeypatch.setattr("service.http.errors.RETRY_AFTER_SECONDS", {Draining: 0.5})
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=1) as client:
        if route == "chat":
            assert client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "a"}], max_tokens=1
            ).choices
        elif route == "embeddings":
            assert client.embeddings.create(model=model, input="a").data
        else:
            made: Any = client.completions.create(model=model, prompt="a", max_tokens=1, stream=route == "stream")
            assert list(made) if route == "stream" else made.choices
    assert next(refused, None) is None


def test_without_retries_a_full_queue_is_a_rate_limit_error(
    service: Client, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(request: Any) -> Any:
        raise QueueFull("the queue is full", 3.2)

    monkeypatch.setattr(service.replica.engine, "submit", full)
    with (
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.RateLimitError) as refusal,
    ):
        client.completions.create(model=model, prompt="a")
    assert refusal.value.response.headers["retry-after"] == "4"


async def test_the_asynchronous_client_works_alike(service: Client, model: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": WORD}], max_tokens=4, stream=True
        )
        assert [part async for part in stream]


def test_langchain_talks_streams_and_embeds(service: Client, model: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    where: dict[str, Any] = {"base_url": f"{service.url}/v1", "api_key": "none", "model": model}
    chat = langchain.ChatOpenAI(**where, max_tokens=8, temperature=0)
    whole = chat.invoke([("system", "import os"), ("human", WORD)])
    assert whole.usage_metadata["output_tokens"] > 0
    assert "".join(part.content for part in chat.stream([("system", "import os"), ("human", WORD)])) == whole.content
    texts = ["import os", "def f("]
    embedded = langchain.OpenAIEmbeddings(**where, check_embedding_ctx_length=False).embed_documents(texts)
    assert [len(each) for each in embedded] == [service.replica.card.width] * 2
