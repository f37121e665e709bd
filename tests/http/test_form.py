"""Answers of a given form: whatever the model would rather say, the text is what was asked for."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

import pytest

from service.engine import grammar
from tests.http.client import Client, Reply

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "bb", 'c"c\né']},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
MESSAGES = [{"role": "user", "content": "Who?"}]
SCHEMA_FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}


def completed(service: Client, **fields: Any) -> Reply:
    return service.post("/v1/completions", {"prompt": "def f(", "max_tokens": 200, "temperature": 1, **fields})


def check_person(text: str) -> None:
    person = json.loads(text)
    assert person.keys() == PERSON["properties"].keys()
    assert len(person["name"]) <= 12 and 0 <= person["age"] <= 150 and person["kind"] in ("a", "bb", 'c"c\né')
    assert isinstance(person["age"], int) and all(isinstance(each, bool) for each in person["tags"])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("form", [{"response_format": SCHEMA_FORMAT}, {"guided_json": PERSON}])
def test_an_answer_keeps_to_its_schema(service: Client, seed: int, form: dict[str, Any]) -> None:
    reply = completed(service, seed=seed, temperature=2, n=2, **form)
    assert reply.status == 200, reply.text
    for choice in reply.json["choices"]:
        assert choice["finish_reason"] == "stop"
        check_person(choice["text"])


def test_a_conversations_answer_and_a_stream_keep_to_their_schema(service: Client) -> None:
    body = {"messages": MESSAGES, "max_tokens": 200, "seed": 3, "response_format": SCHEMA_FORMAT}
    whole = service.post("/v1/chat/completions", body).json["choices"][0]["message"]["content"]
    events = service.post("/v1/chat/completions", body | {"stream": True}).events
    assert "".join(each["choices"][0]["delta"]["content"] for each in events[:-1]) == whole
    check_person(whole)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("pattern", [r"[a-z]{3,8}@[a-z]+\.(com|org)", r"(yes|no)", r"\d{4}-\d\d-\d\d", "ab*c", "é+Ω"])
def test_an_answer_is_matched_by_its_pattern_as_a_whole(service: Client, pattern: str, temperature: float) -> None:
    choice = completed(service, guided_regex=pattern, seed=1, temperature=temperature, max_tokens=300).json["choices"][0]
    if choice["finish_reason"] == "stop":
        assert re.fullmatch(pattern, choice["text"])
    else:
        assert (choice["finish_reason"] == "length" and "*" in pattern) or "+" in pattern


def test_an_answer_is_one_of_its_choices_and_the_likeliest_first(service: Client) -> None:
    choices = ['return "x"\n', "zebra", "x, y):"]
    texts = {completed(service, guided_choice=choices, seed=seed).json["choices"][0]["text"] for seed in range(6)}
    assert texts <= set(choices)
    one = completed(service, guided_choice=["zebra"], temperature=0).json
    assert one["choices"][0]["text"] == "zebra" and one["usage"]["completion_tokens"] <= 6


@pytest.mark.parametrize("multiple", [0.01, 0.25, 2.5, 60, 997, 1_000_000])
def test_a_number_is_a_multiple_of_what_the_schema_says(service: Client, multiple: float) -> None:
    form = {"type": "object", "properties": {"x": {"type": "number", "multipleOf": multiple}}, "required": ["x"]}
    for seed in range(3):
        choice = completed(service, guided_json=form, seed=seed, max_tokens=60).json["choices"][0]
        if choice["finish_reason"] == "stop":
            assert Decimal(str(json.loads(choice["text"], parse_float=Decimal)["x"])) % Decimal(str(multiple)) == 0


def test_any_object_is_asked_for_by_its_type(service: Client) -> None:
    for seed in range(3):
        choice = completed(service, response_format={"type": "json_object"}, seed=seed, max_tokens=400).json["choices"][0]
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["text"]), dict)
        else:
            assert choice["text"].lstrip().startswith("{")


def test_text_is_any_text_and_log_probabilities_are_the_models_own(service: Client) -> None:
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 1, "logprobs": 3}
    plain, text = completed(service, **asked), completed(service, response_format={"type": "text"}, **asked)
    assert plain.json["choices"] == text.json["choices"]
    held = completed(service, guided_choice=["zebra"], **asked).json["choices"][0]["logprobs"]
    assert held["top_logprobs"][0].items() >= plain.json["choices"][0]["logprobs"]["top_logprobs"][0].items()
    assert held["token_logprobs"][0] < min(plain.json["choices"][0]["logprobs"]["top_logprobs"][0].values())


def test_an_answer_that_max_tokens_cuts_says_so(service: Client) -> None:
    choice = completed(service, guided_json=PERSON, max_tokens=3).json["choices"][0]
    assert choice["finish_reason"] == "length" and choice["text"].startswith("{")


@pytest.mark.parametrize(
    "form",
    [
        {"guided_regex": "a{4096}b?"},
        {"guided_json": {"anyOf": [{"type": "array", "items": {"type": "integer"}}] * 128}},
        {"guided_json": {"properties": {f"f{n}": {"anyOf": [{"type": "string"}, {"type": "null"}]} for n in range(200)}}},
    ],
)
def test_a_form_at_its_bounds_is_kept_to(service: Client, form: dict[str, Any]) -> None:
    assert completed(service, **form, max_tokens=4).status == 200


def test_a_sample_whose_form_takes_long_is_ended_and_no_other(service: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(grammar, "TOKEN_SECONDS", 0.0)
    reply = completed(service, guided_regex="[a-z]{1,100}")
    assert (reply.status, reply.error["param"]) == (400, "guided_regex") and "takes too long" in reply.error["message"]
    assert completed(service).status == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "https://e.org/x"}}}},
            "response_format",
        ),
        ({"guided_json": {"type": "integer", "minimum": 2, "maximum": 1}}, "guided_json"),
        ({"guided_json": {"x": "y" * 70_000}}, "guided_json"),
        ({"guided_json": {"type": "integer", "multipleOf": 1_234_567}}, "guided_json"),
        ({"guided_json": {"type": "number", "multipleOf": 199_970_000}}, "guided_json"),
        ({"guided_json": {"allOf": [{"type": "integer", "multipleOf": 997}, {"multipleOf": 1009}]}}, "guided_json"),
        ({"guided_json": {"type": "object", "properties": {"a": {"type": "number", "multipleOf": -98765.4}}}}, "guided_json"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": r"(?=a)b"}, "guided_regex"),
        ({"guided_regex": "((a{99,999}){99,999}){99,999}"}, "guided_regex"),
        ({"guided_regex": "(((a{1000}){1000}){1000})"}, "guided_regex"),
        ({"guided_regex": "a{4097}b?"}, "guided_regex"),
        ({"guided_regex": r"[^\s\S]"}, "guided_regex"),
        ({"guided_choice": ["a" * 4097]}, "guided_choice"),
        ({"guided_json": {"anyOf": [{"type": "array", "items": {"$ref": "#"}}] * 129}}, "guided_json"),
        ({"guided_json": {"anyOf": [{"type": ["null", "array"], "items": {"$ref": "#"}}, {"$ref": "#"}] * 43}}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, None),
        ({"guided_choice": ["a"], "ignore_eos": True}, "ignore_eos"),
        ({"guided_choice": ["a"], "min_tokens": 1}, "min_tokens"),
        ({"guided_grammar": "start: x"}, "guided_grammar"),
    ],
)
def test_a_form_that_cannot_be_kept_to_is_refused_by_name(service: Client, fields: dict[str, Any], param: str | None) -> None:
    reply = completed(service, **fields)
    assert (reply.status, reply.error["code"]) == (400, "invalid_request")
    assert param is None or str(reply.error["param"]).startswith(param)
    assert completed(service, guided_choice=["a"]).json["choices"][0]["text"] == "a"
