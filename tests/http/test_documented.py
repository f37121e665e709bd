"""The API's page says what the code does: every error of the table, row by row over the wire, and every field."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from service.engine.request import QueueFull, RequestError, UnknownBackend
from service.http import errors
from service.http.drawn_schemas import ChatBody, CompletionBody
from service.http.read_schemas import ClassifyBody, EmbeddingBody, RerankBody, ScoreBody
from service.http.schemas import Body
from tests.http.client import Client

PAGE = Path(errors.__file__).with_name("README.md").read_text()
ROW = re.compile(r"^\| (\d{3}) \| `(\w+)` \| `(\w+)` \| (.+) \|$", re.M)
ROWS = {(int(status), code): kind for status, code, kind, _ in ROW.findall(PAGE)}
TYPED: dict[tuple[int, str], type[RequestError]] = {
    (errors._status_of_class(cls)[0], cls.code): cls for cls in errors._descendants(RequestError)
}
UNTYPED = {(404, "not_found"), (405, "method_not_allowed"), (431, "invalid_request"), (503, "unavailable")}
"""Of the router and the connection: tested in test_errors.py and test_line.py."""

BODIES = (CompletionBody, ChatBody, EmbeddingBody, ClassifyBody, ScoreBody, RerankBody)


def test_the_page_has_every_error_and_no_other() -> None:
    assert ROWS.keys() == TYPED.keys() | UNTYPED


def made(kind: type[RequestError]) -> RequestError:
    """An error of a kind."""
    if not issubclass(kind, QueueFull | UnknownBackend):
        return kind("a fault of a kind", param="a_param")
    return UnknownBackend("a fault", ["b"]) if kind is UnknownBackend else kind("a fault of a kind", 1.5)


@pytest.mark.parametrize(("status", "code"), TYPED)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"])
def test_each_error_is_answered_as_its_row_says(
    service: Client, monkeypatch: pytest.MonkeyPatch, path: str, status: int, code: str
) -> None:
    def refused(*_: object) -> Any:
        raise made(TYPED[status, code])

    monkeypatch.setattr(service.replica.engine, "submit", refused)
    good = {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": "a", "input": "a"}
    reply = service.post(path, good)
    assert (reply.status, reply.error["code"], reply.error["type"]) == (status, code, ROWS[status, code])
    assert reply.error["message"]
    assert ("retry-after" in reply.headers) == (status in (429, 503))
    assert ("x-longserve-eta-seconds" in reply.headers) == (status == 429)
    assert ("www-authenticate" in reply.headers) == (status == 401)


@pytest.mark.parametrize("kind", BODIES)
def test_every_field_that_is_taken_stands_on_the_page(kind: type[Body]) -> None:
    offered = PAGE.partition("## Fields")[2].partition("Refused by name")[0]
    known = {"model", "prompt", "messages", "input"}
    assert [name for name in kind.model_fields if f"`{name}`" not in offered and name not in known] == []


def test_the_fields_that_are_refused_are_those_on_the_page() -> None:
    told = set(re.findall(r"`(\w+)(?:: false)?`", PAGE.partition("<!-- refused -->")[2].partition("<!-- end -->")[0]))
    told -= {"logprobs", "truncate"}  # what to ask for instead
    assert told == {name for kind in BODIES for name in kind.neutral}


def test_the_fields_that_are_ignored_are_known_to_no_schema() -> None:
    told = PAGE.partition("Ignored,")[2].partition("; and so is")[0]
    for name in re.findall(r"`(\w+)`", told):
        assert name == "user" or not any(name in kind.model_fields or name in kind.neutral for kind in BODIES), name


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_is_ignored_changes_no_answer(service: Client, path: str) -> None:
    told = PAGE.partition("Ignored,")[2].partition("; and so is")[0]
    asked = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4, "seed": 1}
    plain = service.post(path, asked).json["choices"]
    ignored = dict.fromkeys(re.findall(r"`(\w+)`", told), "auto")
    assert len(ignored) > 6
    assert service.post(path, asked | ignored).json["choices"] == plain
