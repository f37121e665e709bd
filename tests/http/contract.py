"""Schemathesis' hooks: the checks of the contract that it does not bring itself. `schemathesis.toml` names this file."""

from __future__ import annotations

import json
from typing import Any

import schemathesis
from schemathesis import Case, GenerationMode

from service.http.answer_schemas import ChatChunk, CompletionChunk, Error

BEYOND_THE_SCHEMA = {
    *("context_length_exceeded", "memory_budget_exceeded", "prefix_not_kept"),
    *("deadline_exceeded", "chat_template_refused", "task_not_offered"),
}
"""Codes with which a call may be refused although its body is all that the schema asks for."""

RELATED = {
    *("attention", "best_of", "chat_template_kwargs", "logit_bias", "max_tokens", "min_tokens", "stop_token_ids"),
    *("stream_options", "text_1", "top_logprobs"),
}
"""Fields that stand in a relation to others which the document tells in words."""


@schemathesis.check
def a_valid_call_is_answered(ctx: Any, response: Any, case: Case) -> None:
    """What the schema lets in is answered, or refused for what the document tells in words."""
    if case.meta is None or case.meta.generation.mode is not GenerationMode.POSITIVE or response.status_code < 400:
        return
    if case.operation.path.startswith(("/v1/models/", "/v1/prefixes/")):
        assert response.status_code == 404
        return
    error = response.json()["error"]
    is_short = case.operation.path == "/v1/prefixes" and error["param"] in ("prompt", "messages")  # no whole chunk
    is_misspelt = "is no field, did you mean" in error["message"]  # as the document's first lines tell
    is_related = error["code"] == "invalid_request" and (error["param"] in RELATED or is_short or is_misspelt)
    assert error["code"] in BEYOND_THE_SCHEMA or is_related or has_whole_float(case.body), f"refused although valid: {error}"


def has_whole_float(value: Any) -> bool:
    """Whether 1.0 or its like stands somewhere: an integer in JSON Schema's eyes, and none here, as the document says."""
    if isinstance(value, dict | list):
        return any(has_whole_float(each) for each in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and value.is_integer()


@schemathesis.check
def an_event_is_a_chunk_or_an_error(ctx: Any, response: Any, case: Case) -> None:
    """Every event of a stream is a chunk, the last an error or [DONE]."""
    if not response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        return
    *chunks, last = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    for chunk in chunks:
        (ChatChunk if "/chat/" in case.operation.path else CompletionChunk).model_validate_json(chunk)
    if last != "[DONE]":
        Error.model_validate(json.loads(last))
