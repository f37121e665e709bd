"""Good bodies with something broken in them: whatever the break, the service answers in OpenAI's shape and never with a 5xx."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.http.client import Client, eventually

BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "import os", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 1}),
    (
        "/v1/completions",
        {
            "prompt": "a",
            "logit_bias": {"5": 1},
            "stop_token_ids": [7],
            "min_tokens": 1,
            "min_p": 0.1,
            "presence_penalty": 1,
            "max_tokens": 2,
        },
    ),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "max_tokens": 2, "n": 2, "stop": ["\n"], "logprobs": 2, "echo": True}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}),
    (
        "/v1/completions",
        {"prompt": "a", "attention": "performer", "model": "longserve-stdlib-5m", "user": "me", "max_tokens": 1},
    ),
    (
        "/v1/embeddings",
        {"input": ["import os", "def f("], "encoding_format": "base64", "attention": "dense", "truncate": "left"},
    ),
    ("/v1/plan", {"prompt": "import os", "max_tokens": 100, "n": 3}),
    ("/v1/plan", {"input": [1, 2, 3]}),
    ("/v1/plan", {"messages": [{"role": "user", "content": "a"}]}),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "logprobs": True, "top_logprobs": 1},
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "system", "content": [{"type": "text", "text": "a"}]}], "max_tokens": 2, "stream": True},
    ),
    ("/tokenize", {"prompt": "import os", "add_special_tokens": False}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]

TRAPS = st.sampled_from(
    [2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**300, 1e-320, 1e-46, 1e308, 5e-324, -0.0, "", "\u0000", "\ud800"]
)
TEXT = st.text(st.characters(exclude_categories=()), max_size=8)  # lone surrogates too, which json.dumps escapes
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
FIELDS = sorted({name for _, body in BODIES for name in body} | {"best_of", "ignore_eos", "logit_bias", "suffix"})


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, bytes]:
    """A route, and a good body of it or of another with one to three fields broken and, at times, some of its bytes."""
    path, good = draw(st.sampled_from(BODIES))
    body = dict(good)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):  # of several, all but one hide behind the first that is found
        name = draw(st.sampled_from(sorted(good)) | st.sampled_from(FIELDS) | TEXT)
        body[name] = draw(TRAPS | VALUES)
        if not draw(st.integers(0, 9)):
            del body[name]
    raw = bytearray(json.dumps(body).encode())
    if not draw(st.integers(0, 9)):
        start, width = draw(st.integers(0, len(raw))), draw(st.integers(0, 4))
        raw[start : start + width] = draw(st.binary(max_size=4))
    return path, bytes(raw)


@settings(max_examples=800, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(calls())
def test_no_broken_body_is_a_fault_of_ours(impatient: Client, call: tuple[str, bytes]) -> None:
    path, raw = call
    reply = impatient.post(path, raw)
    assert reply.status < 500, reply.text
    assert reply.status < 300 or reply.error["message"]
    for event in reply.events[:-1] if reply.headers["content-type"].startswith("text/event-stream") else []:
        assert event.get("error", {}).get("type") != "server_error", event


def test_after_all_of_them_the_service_answers_and_holds_nothing(impatient: Client) -> None:
    assert eventually(lambda: impatient.replica.engine.snapshot().bytes_in_use == 0)
    assert impatient.complete("import os", max_tokens=1).status == 200
