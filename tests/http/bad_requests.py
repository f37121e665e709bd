"""Calls that are wrong, each with the status, the code and the param of its refusal. Data only; the limits are conftest's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

COMPLETIONS, EMBEDDINGS, PLAN, CHAT = "/v1/completions", "/v1/embeddings", "/v1/plan", "/v1/chat/completions"
TOKENIZE, DETOKENIZE, MODELS, PREFIXES = "/tokenize", "/detokenize", "/v1/models", "/v1/prefixes"
POSTS = {COMPLETIONS: {"prompt": "a"}, EMBEDDINGS: {"input": "a"}, PLAN: {"prompt": "a"}}
CLASSIFY, SCORE, RERANK = "/v1/classify", "/v1/score", "/v1/rerank"
POSTS |= {CLASSIFY: {"input": "a"}, SCORE: {"text_1": "a", "text_2": "b"}, RERANK: {"query": "a", "documents": ["b"]}}
POSTS |= {TOKENIZE: {"prompt": "a"}, DETOKENIZE: {"tokens": [1]}, CHAT: {"messages": [{"role": "user", "content": "a"}]}}
POSTS |= {PREFIXES: {"prompt": [1] * 512}}
"""Every route that takes a body, with the smallest good one."""

GETS = (MODELS, "/v1/models/x", "/health", "/ready", "/info", "/metrics")
JSON = {"content-type": "application/json"}

VOCABULARY, CONTEXT, WIDTH = 4096, 32_768, 256  # the embedded model's
MOST_BODY_BYTES, MOST_PROMPTS, MOST_SAMPLES = 200_000, 4, 3
INT64 = 2**63 - 1


@dataclass(frozen=True)
class Bad:
    """One wrong call and its refusal."""

    path: str
    body: bytes | None
    status: int = 400
    code: str = "invalid_request"
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=lambda: JSON)
    method: str = "POST"

    @property
    def name(self) -> str:
        """For the test's id."""
        return f"{self.method} {self.path} {(self.body or b'')[:60]!r} {dict(self.headers) if self.headers != JSON else ''}"


def wrong(
    path: str, param: str | None, *bodies: Mapping[str, Any], status: int = 400, code: str = "invalid_request"
) -> list[Bad]:
    """Rows of one refusal: each body's fields are laid over the route's good body."""
    return [Bad(path, json.dumps({**POSTS[path], **body}).encode(), status, code, param) for body in bodies]


def raw(param: str | None, *bodies: bytes, path: str = COMPLETIONS) -> list[Bad]:
    """Rows of bodies as they are."""
    return [Bad(path, body, param=param) for body in bodies]


def values(param: str, *given: Any, paths: tuple[str, ...] = (COMPLETIONS,)) -> list[Bad]:
    """Rows of one field with values it does not take."""
    return [row for path in paths for row in wrong(path, param, *({param: value} for value in given))]


NO_JSON = [
    *raw(None, b"", b" ", b"\n\n", b"{", b"}", b'{"prompt"', b'{"prompt":', b'{"prompt": "a"', b'{"prompt": "a"} x'),
    *raw(None, b'{"prompt": "a"}{"prompt": "a"}', b'{"prompt": "a",}', b"{'prompt': 'a'}", b'{prompt: "a"}', b"prompt=a"),
    *raw(None, b'{"prompt": "a" "n": 1}', b'{"prompt": "a"}\x00', b'\x00{"prompt": "a"}', b'{"prompt": "a\nb"}'),
    *raw(None, b'{"prompt": "\\x41"}', b'{"prompt": "\\u00"}', b'{"prompt": "a", "n": 01}', b'{"prompt": "a", "n": +1}'),
    *raw(
        None, b'{"prompt": "a", "n": 1.}', b'{"prompt": "a", "n": .5}', b'{"prompt": "a", "n": 0x1}', b'{"prompt": undefined}'
    ),
    *raw(None, b'{"prompt": "a", "echo": True}', b'{"prompt": "a", "stop": None}', b'{"prompt": "a"} // why', b"<xml/>"),
    *raw(None, b'{"prompt": ' + b"[" * 1000 + b"]" * 1000 + b"}", b'{"a":' * 300 + b"1" + b"}" * 300, b"[" * 100_000),
]
NAN = [
    *raw(None, b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": Infinity}'),
    *raw(None, b'{"prompt": "a", "temperature": -Infinity}', b'{"prompt": "a", "tomorrow": NaN}', b'{"prompt": [NaN]}'),
    *raw("temperature", b'{"prompt": "a", "temperature": 1e400}', b'{"prompt": "a", "temperature": -1e400}'),
    *raw("n", b'{"prompt": "a", "n": 1e400}', b'{"prompt": "a", "n": 1e2}', b'{"prompt": "a", "n": 1E0}'),
    *raw(None, b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", b'{"prompt": [' + b"9" * 5000 + b"]}"),
]
TWICE = [
    *raw(None, b'{"prompt": "a", "prompt": "b"}', b'{"prompt": "a", "n": 1, "n": 1}', b'{"prompt": "a", "\\u006e": 1, "n": 2}'),
    *raw(None, b'{"prompt": "a", "stream": true, "stream_options": {"include_usage": true, "include_usage": false}}'),
    *raw(None, b'{"input": "a", "input": "a"}', path=EMBEDDINGS),
    *raw(None, b'{"tokens": [1], "tokens": [2]}', path=DETOKENIZE),
    *raw(None, b'{"prompt": "a", "x": 1, "x": 1}', path=TOKENIZE),
]
UNICODE = [
    *raw(None, b'\xef\xbb\xbf{"prompt": "a"}', '{"prompt": "a"}'.encode("utf-16"), '{"prompt": "a"}'.encode("utf-16-le")),
    *raw(None, '{"prompt": "a"}'.encode("utf-32"), b'{"prompt": "\xff"}', b'{"prompt": "\xc3"}', b'{"prompt": "\xc0\xaf"}'),
    *raw(
        None,
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": "\xf4\x90\x80\x80"}',
        b'{"prompt\xff": "a"}',
        b'\xff\xfe{"prompt": "a"}',
    ),
    *raw(
        None,
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\udc00"}',
        b'{"prompt": "\\ud800\\u0041"}',
        b'{"prompt": "\\udc00\\ud800"}',
    ),
    *raw(None, b'{"prompt": ["a", "\\ud800"]}', b'{"prompt": "a", "stop": "\\ud800"}', b'{"prompt": "a", "stop": ["\\udfff"]}'),
    *raw(
        None,
        b'{"prompt": "a", "user": "\\ud800"}',
        b'{"prompt": "a", "model": "\\ud800"}',
        b'{"prompt": "a", "attention": "\\ud800"}',
    ),
    *raw(
        None,
        b'{"prompt": "a", "\\ud800": 1}',
        b'{"prompt": "a", "tomorrow": {"\\udc00": 1}}',
        b'{"prompt": "a", "suffix": "\\ud800"}',
    ),
    *raw(None, b'{"input": "\\ud800"}', b'{"input": "a", "encoding_format": "\\ud800"}', path=EMBEDDINGS),
    *raw(None, b'{"prompt": "\\ud800"}', path=TOKENIZE),
    *raw(None, b'{"prompt": "\\ud800"}', b'{"input": ["\\ud800"]}', path=PLAN),
    *wrong(COMPLETIONS, "model", {"model": "\u0000"}, {"model": "🙂"}, {"model": "‮"}, status=404, code="model_not_found"),
    *wrong(COMPLETIONS, "attention", {"attention": "\u0000"}, {"attention": "dense\u0000"}, code="unknown_backend"),
    *wrong(
        COMPLETIONS,
        "attention",
        {"attention": "\uff44ense"},
        {"attention": "Dense"},
        {"attention": "dense "},
        code="unknown_backend",
    ),
]
NO_OBJECT = [row for path in POSTS for row in raw(None, b"[]", b'"a"', b"1", b"null", b"true", path=path)]
MISSING = [
    *raw("prompt", b"{}", b'{"max_tokens": 1}', b'{"input": "a"}'),
    *raw("prompt", b"{}", path=TOKENIZE),
    *raw("input", b"{}", b'{"prompt": "a"}', path=EMBEDDINGS),
    *raw("tokens", b"{}", b'{"prompt": "a"}', path=DETOKENIZE),
    *raw(None, b"{}", b'{"max_tokens": 1}', b'{"prompt": "a", "input": "a"}', b'{"prompt": null, "input": "a"}', path=PLAN),
]
PROMPTS = [
    *values("prompt", None, True, 1, 1.5, {}, {"text": "a"}, "", [], [[]], [""], ["a", ""], paths=(COMPLETIONS, PLAN)),
    *values(
        "prompt", [None], [True], [1, True], [1, "a"], ["a", 1], [["a"]], [["a"], "b"], [[1], []], [[[1]]], [{}], [1.0], [1.5]
    ),
    *values("prompt", [-1], [VOCABULARY], [1, 2, 2**31], [2**63], [2**64], [10**30], [-(2**63)], [[1], [VOCABULARY]]),
    *values("prompt", ["a"] * (MOST_PROMPTS + 1), [[1]] * (MOST_PROMPTS + 1), paths=(COMPLETIONS, PLAN)),
    *values(
        "input", None, False, 1, {}, "", [], [[]], [""], [None], [1, "a"], [VOCABULARY], [-1], ["a"] * 5, paths=(EMBEDDINGS,)
    ),
    *values("prompt", None, True, 1, [], ["a"], {}, paths=(TOKENIZE,)),
    *values("tokens", None, "a", 1, {}, [VOCABULARY], [-1], [2**63], [10**30], paths=(DETOKENIZE,)),
    *wrong(
        DETOKENIZE, "tokens", {"tokens": [True]}, {"tokens": ["1"]}, {"tokens": [1.0]}, {"tokens": [None]}, {"tokens": [[1]]}
    ),
    *wrong(DETOKENIZE, "tokens", {"tokens": [1, "a", "b"]}),
]
INTEGERS = [
    row
    for name in ("max_tokens", "max_completion_tokens", "n", "best_of", "top_k", "seed", "logprobs")
    for row in values(name, True, False, "1", "", 1.0, 1.5, [], {}, [1], -2, 2**63, 2**64, 10**40, paths=(COMPLETIONS, PLAN))
]


def message(param: str, *given: Mapping[str, Any]) -> list[Bad]:
    """Rows of a conversation's second message that is wrong."""
    first = {"role": "user", "content": "a"}
    return wrong(CHAT, param, *({"messages": [first, {**first, **each}]} for each in given))


MESSAGES = [
    *values("messages", None, True, 1, "a", {}, [], paths=(CHAT,)),
    *wrong(CHAT, "messages.0", {"messages": ["a"]}, {"messages": [None]}, {"messages": [[]]}),
    *wrong(CHAT, "messages.0.role", {"messages": [{"content": "a"}]}),
    *wrong(CHAT, "messages.0.content", {"messages": [{"role": "user"}]}),
    *message("messages.1.role", *({"role": each} for each in (None, 1, "", "User", "function", "critic", ["user"]))),
    *message("messages.1.content", *({"content": each} for each in (None, 1, True, {}, [], ["a"], [None], [{}], [[]]))),
    *message("messages.1.content", {"content": [{"type": "text"}]}, {"content": [{"type": "text", "text": 1}]}),
    *message("messages.1.content", {"content": [{"type": "text", "text": "a", "more": 1}]}, {"content": [{"text": "a"}]}),
    *message(
        "messages.1.content",
        *(
            {"content": [{"type": "text", "text": "a"}, {"type": kind, kind: {"url": "data:,"}}]}
            for kind in ("image_url", "input_audio", "file", "video_url", "refusal")
        ),
    ),
    *message("messages.1.name", {"name": 1}, {"name": []}),
    *message("messages.1.contents", {"contents": "a"}),
    *message("tool_calls", {"tool_calls": [{"id": "a"}]}, {"tool_calls": {}}),
    *message("function_call", {"function_call": {"name": "a"}}),
    *wrong(CHAT, "messages", {"messages": [{"role": "user", "content": "a"}] * 2049}),
    *values("tools", [{"type": "function"}], {}, "auto", paths=(CHAT,)),
    *values("tool_choice", "required", {"type": "function"}, True, paths=(CHAT,)),
    *values("functions", [{"name": "f"}], paths=(CHAT,)),
    *values("modalities", ["text", "audio"], [], paths=(CHAT,)),
    *values("audio", {}, paths=(CHAT,)),
    *values("reasoning_effort", "high", paths=(CHAT,)),
    *values("continue_final_message", True, paths=(CHAT,)),
    *values("chat_template", "{{ 1 }}", paths=(CHAT,)),
    *values("max_tokens", 0, -1, 1.5, "1", paths=(CHAT,)),
    *values("logprobs", 1, 0, "true", [], paths=(CHAT,)),
    *values("top_logprobs", -1, 21, True, "1", 2, paths=(CHAT,)),
    *wrong(CHAT, "top_logprobs", {"logprobs": False, "top_logprobs": 1}),
    *values("chat_template_kwargs", 1, "a", [], {str(i): 1 for i in range(17)}, {"a b": 1}, {"messages": 1}, paths=(CHAT,)),
    *wrong(CHAT, "chat_template_kwargs.a", {"chat_template_kwargs": {"a": []}}, {"chat_template_kwargs": {"a": {}}}),
    *values("stream_options", {}, {"include_usage": True}, paths=(CHAT,)),
    *values("mesages", [], paths=(CHAT,)),
    *values("n", 0, MOST_SAMPLES + 1, paths=(CHAT,)),
    *wrong(CHAT, "max_tokens", {"max_tokens": 1, "max_completion_tokens": 2}),
    *wrong(PLAN, None, {"messages": [{"role": "user", "content": "a"}]}),
    *wrong(CHAT, "messages", {"max_tokens": CONTEXT}, {"max_tokens": INT64}, code="context_length_exceeded"),
    *wrong(
        CHAT,
        "messages",
        *({"messages": [{"role": "user", "content": text}]} for text in ("b " * 60_000, "x = 1\n" * 20_000)),
        code="context_length_exceeded",
    ),
]
RANGES = [
    *values("n", 0, MOST_SAMPLES + 1, INT64, paths=(COMPLETIONS, PLAN)),
    *values("best_of", 0, 2, INT64),
    *values("logprobs", 21, 100),
    *values("seed", -1),
    *wrong(COMPLETIONS, "max_tokens", {"max_tokens": 0}, {"max_completion_tokens": 0}),
    *wrong(PLAN, "max_tokens", {"max_tokens": 0}),
    *wrong(COMPLETIONS, "max_tokens", {"max_tokens": 1, "max_completion_tokens": 2}),
    *wrong(COMPLETIONS, "best_of", {"n": 2, "best_of": 1}, {"n": 2, "best_of": 3}),
]
NUMBERS = [
    row
    for name in ("temperature", "top_p")
    for row in values(name, True, False, "1", "", [], {}, -1, -1e-300, 2.5, 1e300, 10**400)
] + values("top_p", 0, 0.0, 1.0000001)
PENALTIES = [
    *values("presence_penalty", "0", [], False, 2.1, -2.1, 10**400, paths=(COMPLETIONS, CHAT)),
    *values("frequency_penalty", "0", {}, True, 2.1, -3),
    *values("repetition_penalty", 0, -1, "1", True, 101),
    *values("min_p", -0.1, 1.1, True, "0"),
    *values("logit_bias", [], False, "a", 1, {"a": 1}, {"-1": 1}, {"1.0": 1}, {"01": 1}, {" 1": 1}, {"": 1}, {"٣": 1}),
    *values("logit_bias", {"1": True}, {"1": "1"}, {"1": None}, {"1": []}, {"1": 101}, {"1": -100.5}, {"1": 10**400}),
    *values("logit_bias", {"4096": 1}, {"999999999": 1}, {"1000000000": 1}, paths=(COMPLETIONS, PLAN, CHAT)),
    *values("logit_bias", {str(each): 1 for each in range(1025)}),
    *values("stop_token_ids", 1, "a", {}, [True], ["1"], [1.0], [None], [VOCABULARY], [-1], [2**31], [1] * 1025),
    *values("min_tokens", -1, 1.5, True, "1", 17, INT64, paths=(COMPLETIONS, PLAN)),
    *wrong(COMPLETIONS, "min_tokens", {"max_tokens": 3, "min_tokens": 4}),
    *wrong(CHAT, "min_tokens", {"max_tokens": 3, "min_tokens": 4}, {"min_tokens": 1025}),
    *values("dimensions", 0, -1, WIDTH + 1, INT64, 2**63, True, 1.0, "8", [], paths=(EMBEDDINGS,)),
    *values("pooling", "", "sum", "Mean", 1, True, [], paths=(EMBEDDINGS,)),
]
TRUNCATE = [
    *values("normalize", "", "true", 1, [], paths=(EMBEDDINGS,)),
    *values("prompt_name", "", "query", 1, [], paths=(EMBEDDINGS,)),
    *values("use_activation", "", 1, [], paths=(CLASSIFY, SCORE, RERANK)),
    *values("text_1", None, 1, [], [1], ["a", "b"], paths=(SCORE,)),
    *values("text_2", None, 1, [], [None], ["a"] * 2049, paths=(SCORE,)),
    *values("query", None, 1, [], ["a"], paths=(RERANK,)),
    *values("documents", None, "a", [], [1], [{"text": 1}], [{"text": "a", "id": 1}], paths=(RERANK,)),
    *values("top_n", 0, -1, 1.0, True, "1", paths=(RERANK,)),
    *values("return_documents", 1, "true", paths=(RERANK,)),
    *values("max_tokens_per_doc", 1, paths=(RERANK,)),
    *wrong(CLASSIFY, None, {}, code="task_not_offered"),
    *wrong(SCORE, None, {}, code="task_not_offered"),
    *wrong(RERANK, None, {}, code="task_not_offered"),
    *wrong(PLAN, None, {"prompt": None, "text_2": "a"}),
    *values("truncate", "", "Left", "start", True, 1, [], paths=(COMPLETIONS, EMBEDDINGS, CHAT, PLAN)),
    *wrong(
        COMPLETIONS,
        "prompt",
        *({"prompt": [7] * 9, "truncate": "left", "max_tokens": most} for most in (CONTEXT, INT64)),
        code="context_length_exceeded",
    ),
    *wrong(CHAT, "messages", {"truncate": "left", "max_tokens": CONTEXT}, code="context_length_exceeded"),
    *wrong(COMPLETIONS, "truncates", {"truncates": "left"}),
]
FLAGS = [
    row for name in ("echo", "ignore_eos", "stream", "add_special_tokens") for row in values(name, 0, 1, "true", "", [], {})
]
TEXTS = [row for name in ("user", "model") for row in values(name, 1, True, [], {}, ["a"])] + [
    *values("attention", 1, True, [], ["auto"]),
    *wrong(COMPLETIONS, "attention.auto", {"attention": {}}, {"attention": {"auto": None}}, {"attention": {"auto": 2}}),
    *wrong(PLAN, "attention.dense", {"attention": {"auto": {}, "dense": {}}}),
    *wrong(CHAT, "attention.auto.max_second", {"attention": {"auto": {"max_second": 1}}}),
    *wrong(
        EMBEDDINGS, "attention.auto.max_seconds", *({"attention": {"auto": {"max_seconds": x}}} for x in (0, -1, True, "2", []))
    ),
    *wrong(COMPLETIONS, "attention.auto.prefer", *({"attention": {"auto": {"prefer": x}}} for x in ([], "dense", ["a"] * 17))),
    *wrong(COMPLETIONS, "attention.auto.prefer.0", {"attention": {"auto": {"prefer": [1]}}}),
    *wrong(COMPLETIONS, "attention", {"attention": {"auto": {"prefer": ["sparse"]}}}, code="unknown_backend"),
    *wrong(COMPLETIONS, "attention", {"model": "{id}@dense", "attention": {"auto": {}}}),
]
STOPS = values("stop", 1, True, {}, "", [""], ["a", ""], [1], ["a", None], [["a"]], ["a"] * 17)
STREAMS = [
    *values("stream_options", {}, {"include_usage": True}),
    *wrong(COMPLETIONS, "stream_options", *({"stream": True, "stream_options": each} for each in (True, 1, "a", [], [{}]))),
    *wrong(COMPLETIONS, "stream_options", {"stream": False, "stream_options": {}}, {"stream": None, "stream_options": {}}),
    *wrong(
        COMPLETIONS,
        "stream_options.include_usage",
        *({"stream": True, "stream_options": {"include_usage": v}} for v in (1, "true", [])),
    ),
    *wrong(COMPLETIONS, "stream_options.usage", {"stream": True, "stream_options": {"usage": True}}),
    *wrong(
        COMPLETIONS, "stream_options.include_obfuscation", {"stream": True, "stream_options": {"include_obfuscation": True}}
    ),
]
SLIPS = [
    row
    for name in (
        "attentoin",
        "atention",
        "attention_",
        "Attention",
        "temprature",
        "max_token",
        "maxTokens",
        "max-tokens",
        "top-p",
    )
    for row in wrong(COMPLETIONS, name, {name: 1})
] + [
    *wrong(COMPLETIONS, "presence_penality", {"presence_penality": 0}),
    *wrong(COMPLETIONS, "sotp", {"sotp": "a"}),
    *wrong(COMPLETIONS, "steam", {"steam": True}),
    *wrong(COMPLETIONS, "sed", {"sed": 1}),
    *wrong(EMBEDDINGS, "encoding-format", {"encoding-format": "float"}),
    *wrong(EMBEDDINGS, "inputs", {"inputs": "a"}),
    *wrong(PLAN, "attentoin", {"attentoin": "dense"}),
    *wrong(TOKENIZE, "add_special_token", {"add_special_token": True}),
    *wrong(DETOKENIZE, "token", {"token": 1}),
]
FORMS = [
    *values("guided_json", False, [], "a", 1),
    *values("guided_json", {"$ref": "#"}, {"type": "nonsense"}, {"enum": []}, {"not": {}}),
    *values("guided_regex", "", 1, "(", "(?=a)b", "[^\\x00-\\U0010FFFF]"),
    *values("guided_choice", [], "a", {}, ["a"] * 1025),
    *wrong(COMPLETIONS, "guided_choice.0", {"guided_choice": [""]}, {"guided_choice": [1]}),
    *wrong(
        COMPLETIONS,
        "response_format.json_schema.schema",
        *({"response_format": {"type": "json_schema", "json_schema": {"schema": each}}} for each in (True, None, [])),
    ),
    *wrong(CHAT, "response_format.json_schema", {"response_format": {"type": "json_schema", "json_schema": 1}}),
    *wrong(PLAN, "response_format.json_schema", {"response_format": {"type": "json_schema"}}),
]
NOT_OFFERED = [
    *values("suffix", "b", False),
    *values("response_format", {"type": "xml"}, {}, "text"),
    *values("max_new_tokens", 5),
    *values("use_beam_search", True, 0),
    *values("guided_grammar", {}, "root ::= x"),
    *values("dimensions", 8, 192),
    *values("prompt_logprobs", 1),
    *values("guided_grammar", {}, paths=(PLAN,)),
    *values("encoding_format", "", "hex", "Float", 1, True, [], paths=(EMBEDDINGS,)),
]
NAMES = [
    *values("attention", "", paths=(COMPLETIONS, EMBEDDINGS, PLAN)),
    *(
        row
        for path in (COMPLETIONS, EMBEDDINGS, PLAN)
        for row in wrong(path, "attention", {"attention": "sparse"}, {"attention": "longformer"}, code="unknown_backend")
    ),
    *(
        row
        for path in POSTS
        for row in wrong(
            path, "model", {"model": ""}, {"model": "gpt-4"}, {"model": "{id}@"}, status=404, code="model_not_found"
        )
    ),
    *(row for path in POSTS for row in wrong(path, "model", {"model": "{id}@sparse"}, code="unknown_backend")),
    *wrong(
        COMPLETIONS, "model", {"model": "@dense"}, {"model": "@"}, {"model": "{id}@@dense"}, status=404, code="model_not_found"
    ),
    *wrong(COMPLETIONS, "model", {"model": "x" * 100_000}, {"model": " {id}"}, status=404, code="model_not_found"),
    *wrong(COMPLETIONS, "attention", {"model": "{id}@dense", "attention": "performer"}),
    *wrong(EMBEDDINGS, "attention", {"model": "{id}@dense", "attention": "auto"}),
]
LENGTHS = [
    *(
        row
        for path in (COMPLETIONS, PLAN)
        for row in wrong(
            path,
            "prompt",
            {"prompt": [7] * (CONTEXT + 1)},
            {"prompt": [7] * CONTEXT, "max_tokens": 1},
            {"prompt": [7] * 10, "max_tokens": CONTEXT - 9},
            {"prompt": "a", "max_tokens": INT64},
            {"prompt": "a", "max_completion_tokens": INT64},
            {"prompt": [[1], [7] * CONTEXT]},
            {"prompt": "b " * 60_000},
            code="context_length_exceeded",
        )
    ),
    *wrong(
        EMBEDDINGS, "input", {"input": [7] * (CONTEXT + 1)}, {"input": ["a", "b " * 60_000]}, code="context_length_exceeded"
    ),
    *wrong(COMPLETIONS, None, {f"field_{i}": 1 for i in range(200)}),
    *(Bad(path, b'{"a": "' + b"a" * MOST_BODY_BYTES + b'"}', 413, "body_too_large") for path in POSTS),
]
MEDIA = [
    Bad(path, json.dumps(body).encode(), 415, "unsupported_media_type", "content-type", headers)
    for path, body in POSTS.items()
    for headers in ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"})
] + [
    Bad(COMPLETIONS, b'{"prompt": "a"}', 415, "unsupported_media_type", "content-type", {"content-type": given})
    for given in (
        "",
        "json",
        "application/",
        "application/json2",
        "multipart/form-data; boundary=x",
        "application/json; charset=utf-16",
    )
]
HEADERS = [
    Bad(
        path,
        json.dumps(POSTS[path]).encode(),
        param="x-longserve-timeout-seconds",
        headers=JSON | {"x-longserve-timeout-seconds": given},
    )
    for path in (COMPLETIONS, EMBEDDINGS, PLAN)
    for given in ("", "0", "-1", "nan", "inf", "soon", "1_0", "1,5", "0x10", "1e999")
]
ROUTES = [
    *(
        Bad(path, None, 404, "not_found", method="GET")
        for path in ("/", "/v1", "/v2/completions", "/v1/completions/", "/v1//models")
    ),
    *(
        Bad(path, b"{}", 404, "not_found")
        for path in (
            "/completions",
            "/v1/chat",
            "/v1/completions/x",
            "/TOKENIZE",
            "/" + "x" * 2000,
            "/v1/responses",
            "/v1/messages",
        )
    ),
    *(
        Bad(path, None, 405, "method_not_allowed", method=method)
        for path in POSTS
        for method in ("GET", "PUT", "DELETE", "PATCH")
        if (path, method) != (PREFIXES, "GET")
    ),
    *(Bad(path, b"{}", 405, "method_not_allowed", method=method) for path in GETS for method in ("POST", "PUT", "DELETE")),
    *(Bad(COMPLETIONS, b"{}", 405, "method_not_allowed", method=method) for method in ("TRACE", "PROPFIND")),
    *(
        Bad(f"{MODELS}/{id}", None, 404, "model_not_found", "model", method="GET")
        for id in ("x", "a/b", "%00", "%ED%A0%80", "x@dense")
    ),
    Bad(f"{MODELS}/", None, 404, "model_not_found", "model", method="GET"),
    Bad(f"{MODELS}/{'x' * 3000}", None, 404, "model_not_found", "model", method="GET"),
]

ROWS: dict[str, list[Bad]] = {
    "no JSON": NO_JSON,
    "numbers that are none": NAN,
    "keys twice": TWICE,
    "unicode": UNICODE,
    "no object": NO_OBJECT,
    "missing fields": MISSING,
    "prompts and tokens": PROMPTS,
    "integers": INTEGERS,
    "messages": MESSAGES,
    "ranges": RANGES,
    "numbers": NUMBERS,
    "penalties, biases and ends": PENALTIES,
    "truncate": TRUNCATE,
    "flags": FLAGS,
    "texts": TEXTS,
    "stops": STOPS,
    "stream options": STREAMS,
    "slips": SLIPS,
    "forms": FORMS,
    "not offered": NOT_OFFERED,
    "models and backends": NAMES,
    "lengths": LENGTHS,
    "media types": MEDIA,
    "headers": HEADERS,
    "routes and methods": ROUTES,
}
