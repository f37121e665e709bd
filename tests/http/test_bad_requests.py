"""Every wrong call of the table is refused with its status, code and param; the service answers a good call after each."""

from __future__ import annotations

import re

import pytest

from tests.http.bad_requests import ROWS, Bad
from tests.http.client import Client, eventually

WORDS_OF_OTHERS = re.compile(r"[Dd]ictionary|List |String |validation|discriminator|NoneType|NoExtension|verbose|[a-z]Error\b")
"""Of Python, pydantic and parsers: no caller need know these."""

LONGEST_MESSAGE = 700  # characters: ours, the caller's 200, the model's ids
KINDS = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}


def sent(service: Client, bad: Bad) -> bytes | None:
    return None if bad.body is None else bad.body.replace(b"{id}", service.replica.card.id.encode())


@pytest.mark.parametrize("kind", ROWS)
def test_a_wrong_call_is_refused_as_the_table_says(service: Client, kind: str) -> None:
    wrong = []
    for bad in ROWS[kind]:
        reply = service.send(bad.method, bad.path, sent(service, bad), bad.headers)
        found = (reply.status, reply.error["code"], reply.error["param"], reply.error["type"])
        if found != (bad.status, bad.code, bad.param, KINDS.get(bad.status, "invalid_request_error")):
            wrong.append((bad.name, found, reply.error["message"]))
        assert 10 < len(reply.error["message"]) < LONGEST_MESSAGE, bad.name
        ours = reply.error["message"].partition("received")[0]
        assert not WORDS_OF_OTHERS.search(ours), ours
        assert service.complete("import os", max_tokens=1).status == 200, f"the service fell over {bad.name}"
    assert wrong == []
    assert eventually(lambda: service.replica.engine.snapshot().bytes_in_use == 0)


def test_the_table_is_long_and_has_no_row_twice() -> None:
    rows = [(bad.method, bad.path, bad.body, tuple(bad.headers.items())) for rows in ROWS.values() for bad in rows]
    assert len(rows) >= 200
    assert [row for row in set(rows) if rows.count(row) > 1] == []
