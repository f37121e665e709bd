"""The served OpenAPI: what every route takes and every status it answers, true for this replica's model, limits and switch.

FastAPI writes paths and answers from the routes; what it cannot know stands here: bodies (read in `body.py`), errors (from the
table in `errors.py`), headers, and the bounds that come from config and model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.engine.request import AUTO
from service.http.answer_schemas import ChatChunk, CompletionChunk, Error
from service.http.auth import OPEN_PATHS
from service.http.drawn_schemas import ChatBody, CompletionBody, DrawnBody
from service.http.errors import ETA_HEADER, NotReady, codes
from service.http.face import Host, ModelCard
from service.http.fields import MOST_BIAS, MOST_BIASES
from service.http.plan_schemas import PLANS, DetokenizeBody, PlanBody, PrefixBody, TokenizeBody
from service.http.read_schemas import ClassifyBody, EmbeddingBody, RerankBody, ScoreBody
from service.http.schemas import MOST_FIELDS, MOST_PREFERRED, AutoWish

Json = dict[str, Any]

REFERENCE = "#/components/schemas/{model}"
BODIES = (
    *(CompletionBody, ChatBody, EmbeddingBody, ClassifyBody, ScoreBody, RerankBody),
    *(PrefixBody, TokenizeBody, DetokenizeBody),
)

ALWAYS = (400, 401, 408, 413, 415, 429, 500, 502, 503)
"""Statuses of every route: a body is read, and bounded, wherever one is sent. 401 only where keys are asked for."""

TIMEOUT_HEADER = "x-longserve-timeout-seconds"
"""Not Ray Serve's own `x-request-timeout-seconds`: its proxy would answer that one first, and not in OpenAI's shape."""

REQUEST_ID: Json = {
    "name": "x-request-id",
    "in": "header",
    "required": False,
    "description": "Names the call in answer and log where it is 1 to 128 visible ASCII characters; else a new one does.",
    "schema": {"type": "string"},
}
TIMEOUT: Json = {
    "name": TIMEOUT_HEADER,
    "in": "header",
    "required": False,
    "description": "Seconds after which nobody waits for the answer: 408. At most the service's own limit.",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}


EVENT: Json = {
    "type": "object",
    "required": ["data"],
    "description": "Comments between events (lines that begin with a colon) say how far a long prompt has been read.",
    "properties": {
        "data": {
            "type": "string",
            "description": "A CompletionChunk or ChatChunk as JSON. Last: [DONE], or an Error as JSON after a failure.",
        }
    },
}
"""One server-sent event, with `stream: true`."""


def _header(description: str, kind: str = "string") -> Json:
    return {"description": description, "required": False, "schema": {"type": kind}}


ANSWERED = {"x-request-id": _header("The id of the call; absent where a proxy in front answers with one itself.")}
RECEIPT = {
    "server-timing": _header("Phases that have ended: tokenize, queue, prefill, decode, in milliseconds."),
    "x-longserve-backend": _header("The attention backend that serves."),
    "x-longserve-why": _header("Why this one."),
    **{f"x-longserve-{name}-seconds": _header(f"Seconds of {name}.", "number") for name in ("tokenize", "queue")},
    **{f"x-longserve-{name}-seconds": _header("Seconds, once known.", "number") for name in ("prefill", "decode")},
    "x-longserve-prefill-chunks": _header("Chunks so far.", "integer"),
    "x-longserve-cached-tokens": _header("Tokens of the input whose state was kept from an earlier request.", "integer"),
    "x-longserve-dropped-tokens": _header("Tokens of the input that truncate left out.", "integer"),
    "x-longserve-seen-tokens": _header("Tokens of the input that its last one sees in one layer, once known.", "integer"),
    "x-longserve-reserved-bytes": _header("Bytes reserved by the cost law.", "integer"),
    "x-longserve-measured-bytes": _header("Bytes as measured; absent where the widest step was not, or not yet.", "integer"),
    "x-longserve-batch-mates": _header("Most sequences a step was shared with so far.", "integer"),
}
EXPOSED = (*ANSWERED, *RECEIPT, "retry-after", ETA_HEADER)
"""Headers of answers that a page of another origin may read, where it may call."""

OPENMETRICS = "application/openmetrics-text"
ERROR_HEADERS = {
    401: {"www-authenticate": _header("Bearer")},
    429: {
        "retry-after": _header("Seconds until the work in front is done.", "integer"),
        ETA_HEADER: _header("The same, as predicted, with its decimals.", "number"),
    },
    503: {"retry-after": _header("Seconds.", "integer")},
}


def operation(
    answer: type[BaseModel] | None,
    body: type[BaseModel] | None = None,
    *,
    statuses: Sequence[int] = (),
    has_receipt: bool = False,
    **others: Any,
) -> Json:
    """Keyword arguments of a FastAPI route.

    Args:
        answer: the record of its 200; None: metrics.
        body: the record it takes; None: none.
        statuses: what it may answer beside ALWAYS.
        has_receipt: whether answers carry one in their headers.
        others: passed on to FastAPI.
    """
    wanted = {*ALWAYS, *statuses, *([404] if body else [])}  # a body names a model
    responses: dict[int, Json] = {status: _refusals(status) for status in sorted(wanted)}
    responses[200] = {"description": "The answer.", "headers": ANSWERED | (RECEIPT if has_receipt else {})}
    if answer is None:
        responses[200]["content"] = {kind: {"schema": {"type": "string"}} for kind in ("text/plain", OPENMETRICS)}
    else:
        responses[200]["model"] = answer
    if body is not None and issubclass(body, DrawnBody):
        responses[200]["content"] = {"text/event-stream": {"schema": EVENT}}
    extra: Json = {"parameters": [REQUEST_ID, *([TIMEOUT] if body else [])]}
    if body is not None:
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": _reference(body)}}}
    return {"response_model": None, "responses": responses, "openapi_extra": extra, **others}


def _refusals(status: int) -> Json:
    """A refusal's response: its codes, from the table of errors."""
    told = "; ".join(f"{code}: {meaning}" for code, meaning in codes(status).items())
    return {
        "model": Error,
        "description": told or HTTPStatus(status).phrase,
        "headers": ANSWERED | ERROR_HEADERS.get(status, {}),
    }


def _reference(kind: type[BaseModel]) -> Json:
    return {"$ref": REFERENCE.format(model=kind.__name__)}


def document(app: FastAPI, host: Host) -> Json:
    """The whole document, with the bounds in force now."""
    made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, bodies = models_json_schema(
        [(kind, "validation") for kind in (*BODIES, PlanBody, CompletionChunk, ChatChunk)], ref_template=REFERENCE
    )
    schemas = made["components"]["schemas"] = made["components"]["schemas"] | bodies["$defs"]
    made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in made["paths"].items():
        for each in operations.values():
            each["responses"].pop("422", None)  # FastAPI's own, which nothing here sends
            each["security"] = [{}] if path in OPEN_PATHS else [{}, {"key": []}]
    for kind in BODIES:
        _bound(schemas[kind.__name__], kind.neutral, host)
    schemas["AutoHints"]["properties"]["prefer"] |= {"anyOf": [_preferred(host), {"type": "null"}]}
    _relate(schemas)
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    return made


def _bound(schema: Json, neutral: Mapping[str, Sequence[Any]], host: Host) -> None:
    """Write the bounds of this replica into a body's schema."""
    properties, limits = schema["properties"], host.config
    schema["maxProperties"] = MOST_FIELDS
    token = {"type": "integer", "minimum": 0, "maximum": host.tokenizer.vocab_size - 1}
    bounds: dict[str, Json] = {
        "prompt": {"TokenizeBody": {"minLength": 0}, "PrefixBody": _prompt(token, host)}.get(
            schema["title"], _prompts(token, host)
        ),
        "input": _prompts(token, host),
        "text_1": _texts(host),
        "text_2": _texts(host),
        "documents": {"type": "array", "minItems": 1, "maxItems": host.config.max_prompts, "items": _document()},
        "prompt_name": {"enum": [None, *host.card.prompts]},
        "tokens": {"items": token},
        "max_tokens": {"maximum": host.card.max_length},
        "max_completion_tokens": {"maximum": host.card.max_length},
        "dimensions": {"maximum": host.card.width},
        "stop_token_ids": {"anyOf": [{"type": "array", "maxItems": MOST_BIASES, "items": token}, {"type": "null"}]},
        "logit_bias": {"anyOf": [_biases(), {"type": "null"}]},
        "n": {"maximum": limits.max_samples},
        "best_of": {"maximum": limits.max_samples},
        "model": {"enum": [None, *model_ids(host.card, _backends(host))]},
        "attention": {"anyOf": [{"enum": [None, *_backends(host), AUTO]}, _reference(AutoWish)]},
    }
    for name, bound in bounds.items():
        if name in properties:
            properties[name] |= bound
    for name, values in neutral.items():
        if name in properties:
            continue
        told = " or ".join(json.dumps(each) for each in values)
        properties[name] = {"enum": list(values), "description": f"Not offered: leave it out or send {told}."}


def _preferred(host: Host) -> Json:
    return {"type": "array", "minItems": 1, "maxItems": MOST_PREFERRED, "items": {"enum": list(_backends(host))}}


def _biases() -> Json:
    bias = {"type": "number", "minimum": -MOST_BIAS, "maximum": MOST_BIAS}
    ids = {"type": "string", "pattern": "^(0|[1-9][0-9]{0,8})$"}  # of tokens that there are, as 400 tells
    return {"type": "object", "maxProperties": MOST_BIASES, "additionalProperties": bias, "propertyNames": ids}


def _prompt(token: Json, host: Host) -> Json:
    text = {"type": "string", "minLength": 1}
    return {"anyOf": [text, {"type": "array", "minItems": 1, "maxItems": host.card.max_length, "items": token}]}


def _prompts(token: Json, host: Host) -> Json:
    one = _prompt(token, host)["anyOf"]
    several = {"type": "array", "minItems": 1, "maxItems": host.config.max_prompts}
    return {"anyOf": [*one, *(several | {"items": each} for each in one)]}


def _texts(host: Host) -> Json:
    text = {"type": "string"}
    return {"anyOf": [text, {"type": "array", "minItems": 1, "maxItems": host.config.max_prompts, "items": text}]}


def _document() -> Json:
    text = {"type": "string"}
    told = {"type": "object", "properties": {"text": text}, "required": ["text"], "additionalProperties": False}
    return {"anyOf": [text, told]}


def _relate(schemas: Json) -> None:
    """What JSON Schema can say of fields that depend on each other, and examples."""
    asks = {"properties": {"stream_options": {"type": "object"}}, "required": ["stream_options"]}
    streams = {"properties": {"stream": {"const": True}}, "required": ["stream"]}
    schemas["ChatBody"] |= {
        "if": asks,
        "then": streams,
        "examples": [
            {"messages": [{"role": "user", "content": "def fibonacci(n):"}], "max_tokens": 8, "temperature": 0},
            {
                "messages": [{"role": "user", "content": [{"type": "text", "text": "import os"}]}],
                "stream": True,
                "max_tokens": 4,
            },
        ],
    }
    schemas["CompletionBody"] |= {
        "if": asks,
        "then": streams,
        "examples": [
            {"prompt": "import os", "max_tokens": 8, "temperature": 0},
            {"prompt": [1, 2, 3], "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}},
        ],
    }
    schemas["PrefixBody"] |= {
        "oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}],
        "examples": [{"prompt": "import os\n" * 400, "ttl_seconds": 600}],
    }
    schemas["EmbeddingBody"]["examples"] = [{"input": ["import os", "def f("], "encoding_format": "base64"}]
    schemas["ClassifyBody"]["examples"] = [{"input": ["import os", "def f("]}]
    schemas["ScoreBody"]["examples"] = [{"text_1": "How to list a folder?", "text_2": ["os.listdir(path)", "os.getpid()"]}]
    schemas["RerankBody"]["examples"] = [
        {"query": "How to list a folder?", "documents": ["os.getpid()", {"text": "os.listdir(path)"}], "top_n": 1}
    ]
    schemas["TokenizeBody"]["examples"] = [{"prompt": "import os"}]
    schemas["DetokenizeBody"]["examples"] = [{"tokens": [1, 2, 3]}]
    schemas["PlanBody"] = {
        "title": "PlanBody",
        "description": PlanBody.__doc__,
        "oneOf": [
            {"allOf": [_reference(kind)], "not": {"anyOf": [{"required": [each]} for each in others]}}
            for kind, others in _plans()
        ],
        "examples": [{"prompt": "import os", "max_tokens": 8}, {"input": "import os"}],
    }


def _plans() -> Iterator[tuple[type[BaseModel], list[str]]]:
    """The bodies that may be planned, each with the fields that tell the others."""
    for kind in (CompletionBody, ChatBody, EmbeddingBody, ScoreBody, RerankBody):
        yield kind, [name for name in PLANS if name not in kind.model_fields]


def model_ids(card: ModelCard, backends: Sequence[str]) -> list[str]:
    """The model's id, and the model's under each backend."""
    return [card.id, *(f"{card.id}@{backend}" for backend in backends)]


def _backends(host: Host) -> Sequence[str]:
    """The allow-list; none before the replica has been warmed up."""
    try:
        return host.backends
    except NotReady:
        return ()
