"""Completions over a real socket: shapes, streams, receipts."""

from __future__ import annotations

import pytest

import attention
from service.engine.lookup import Lookup
from service.model.checkpoint import load
from service.training.evaluate import BEGINNINGS, Subject, complete
from tests.http.client import Client, eventually
from tests.http.conftest import BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_field_and_the_model_id_choose_the_same_backend(service: Client, backend: str) -> None:
    by_field = service.complete("import os", attention=backend, temperature=0)
    by_id = service.complete("import os", model=f"{service.replica.card.id}@{backend}", temperature=0)
    assert by_field.status == by_id.status == 200
    for reply in (by_field, by_id):
        assert reply.json["longserve"]["backend"] == backend
        assert reply.headers["x-longserve-backend"] == backend
    assert by_field.json["choices"] == by_id.json["choices"]


def test_the_default_backend_serves_who_names_none(service: Client) -> None:
    assert service.complete("import os").json["longserve"]["backend"] == "sliding_window"


def test_an_answer_has_openais_shape_and_counts_its_tokens(service: Client) -> None:
    answer = service.complete("import os", max_tokens=5, ignore_eos=True).json
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    prompt = service.post("/tokenize", {"prompt": "import os"}).json["count"]
    details = {"prompt_tokens_details": {"cached_tokens": 0}}
    details |= {"completion_tokens_details": {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}}
    assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": 5, "total_tokens": prompt + 5} | details


def test_left_out_max_tokens_means_sixteen(service: Client) -> None:
    answer = service.post("/v1/completions", {"prompt": "import os", "ignore_eos": True}).json
    assert answer["usage"]["completion_tokens"] == 16


def test_max_completion_tokens_says_the_same_as_max_tokens(service: Client) -> None:
    body = {"prompt": "import os", "max_completion_tokens": 3, "ignore_eos": True}
    assert service.post("/v1/completions", body).json["usage"]["completion_tokens"] == 3


def test_token_ids_answer_as_their_text_does(service: Client) -> None:
    tokens = service.post("/tokenize", {"prompt": "def f(x):"}).json["tokens"]
    assert (
        service.complete(tokens, temperature=0).json["choices"] == service.complete("def f(x):", temperature=0).json["choices"]
    )


def test_prompts_and_samples_answer_in_the_order_asked(service: Client) -> None:
    texts = ["import os", "def f(", "class A"]
    alone = [service.complete(text, temperature=0).json["choices"][0]["text"] for text in texts]
    together = service.complete(texts, temperature=0, n=2).json["choices"]
    assert [choice["index"] for choice in together] == list(range(6))
    assert [choice["text"] for choice in together] == [text for text in alone for _ in range(2)]


def test_a_seed_repeats_its_sample(service: Client) -> None:
    def sample(seed: int) -> str:
        return str(service.complete("x = ", seed=seed, max_tokens=12).json["choices"][0]["text"])

    assert sample(7) == sample(7)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_a_stream_says_what_the_whole_answer_says(service: Client) -> None:
    fields = {"temperature": 0, "max_tokens": 12, "logprobs": 2}
    whole = service.complete("for i in", **fields).json["choices"][0]
    events = service.complete("for i in", stream=True, **fields).events
    assert events[-1] == "[DONE]"
    chunks = [event["choices"][0] for event in events[:-1]]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + [whole["finish_reason"]]
    for key, values in whole["logprobs"].items():
        assert [value for chunk in chunks if chunk["logprobs"] for value in chunk["logprobs"][key]] == values


def test_a_stream_ends_with_usage_and_receipt_when_asked(service: Client) -> None:
    reply = service.complete("import os", stream=True, stream_options={"include_usage": True}, ignore_eos=True)
    *chunks, last, done = reply.events
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    assert last["longserve"]["backend"] == "sliding_window"
    assert last["longserve"]["decode_seconds"] >= 0
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-longserve-backend"] == "sliding_window"


def test_continuous_usage_counts_up_in_every_chunk(service: Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = service.complete("import os", stream=True, stream_options=options, ignore_eos=True).events
    counts = [event["usage"]["completion_tokens"] for event in events[:-1]]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] == 4


def test_echo_gives_the_prompt_back_with_its_logprobs(service: Client) -> None:
    choice = service.complete("import os", echo=True, logprobs=1, max_tokens=2, ignore_eos=True).json["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"].startswith("import os")
    assert all(value <= 0 for value in logprobs["token_logprobs"])
    assert logprobs["text_offset"][0] == 0
    assert "".join(logprobs["tokens"][:2]) == "import os"[: logprobs["text_offset"][2]]


def test_a_text_begins_with_the_models_begin_token_unless_told_otherwise(service: Client) -> None:
    with_it, without = (
        service.post("/tokenize", {"prompt": "import os", "add_special_tokens": wanted}).json["tokens"]
        for wanted in (None, False)
    )
    assert with_it == [service.replica.tokenizer.eos_id, *without]
    scored = {"echo": True, "logprobs": 0, "max_tokens": 0, "temperature": 0}
    asked = [service.complete("import os", **scored), service.complete("import os", add_special_tokens=False, **scored)]
    assert [each.json["usage"]["prompt_tokens"] for each in asked] == [len(with_it), len(without)]
    first, second = (each.json["choices"][0] for each in asked)
    assert first["text"] == second["text"] == "import os"
    assert first["logprobs"]["tokens"] == second["logprobs"]["tokens"]
    assert first["logprobs"]["text_offset"] == second["logprobs"]["text_offset"]
    assert first["logprobs"]["token_logprobs"][0] < 0, "the first token of the text stands behind the begin token"
    assert second["logprobs"]["token_logprobs"][0] is None
    ids = service.complete(with_it, **scored).json["choices"][0]["logprobs"]
    assert ids["token_logprobs"] == [None, *first["logprobs"]["token_logprobs"]]


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_a_beginning_is_continued_as_the_models_card_shows(service: Client, beginning: str) -> None:
    core = load()
    shown = complete(Subject(core, {"dense": attention.build("dense", {}, core.model.head_shape())}), "dense", beginning, 40)
    tokens = 40 - len(core.tokenizer.encode(beginning))
    answer = service.complete(beginning, attention="dense", temperature=0, max_tokens=tokens, echo=True)
    assert answer.json["choices"][0]["text"] == shown


def test_echo_alone_scores_a_prompt(service: Client) -> None:
    answer = service.complete("import os", echo=True, logprobs=0, max_tokens=0).json
    assert answer["choices"][0]["text"] == "import os"
    assert answer["usage"]["completion_tokens"] == 0


def test_a_stop_string_is_never_shown(service: Client) -> None:
    free = service.complete("import os", temperature=0, max_tokens=12).json["choices"][0]["text"]
    stop = free[3:6]
    choice = service.complete("import os", temperature=0, max_tokens=12, stop=[stop]).json["choices"][0]
    assert choice["text"] == free[: free.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_the_receipts_phases_stand_in_server_timing(service: Client) -> None:
    reply = service.complete("import os")
    names = [part.split(";")[0] for part in reply.headers["server-timing"].split(", ")]
    assert names == ["tokenize", "queue", "prefill", "decode"]
    assert int(reply.headers["x-longserve-reserved-bytes"]) == reply.json["longserve"]["reserved_bytes"] > 0


def test_a_caller_who_hangs_up_mid_stream_gives_its_bytes_back(service: Client) -> None:
    body = {"prompt": "import os", "max_tokens": 20_000, "stream": True, "ignore_eos": True}
    with service.half_read(body, read=2000):
        assert service.replica.engine.snapshot().running == 1
    assert eventually(lambda: service.replica.engine.snapshot().bytes_in_use == 0)


def test_a_caller_who_hangs_up_before_the_answer_gives_its_bytes_back(service: Client) -> None:
    with service.half_read({"prompt": "import os", "max_tokens": 20_000, "ignore_eos": True}, read=0):
        assert eventually(lambda: service.replica.engine.snapshot().running == 1)
    assert eventually(lambda: service.replica.engine.snapshot().bytes_in_use == 0)


def test_a_bias_decides_what_is_drawn(service: Client) -> None:
    (wanted,) = service.post("/tokenize", {"prompt": "q", "add_special_tokens": False}).json["tokens"]
    answer = service.complete("import os", logit_bias={str(wanted): 100}, max_tokens=5, temperature=0).json
    assert answer["choices"][0]["text"] == "qqqqq"
    free = service.complete("import os", max_tokens=5, temperature=0, logprobs=0).json["choices"][0]["logprobs"]["tokens"]
    (first,) = service.post("/tokenize", {"prompt": free[0], "add_special_tokens": False}).json["tokens"]
    banned = service.complete("import os", max_tokens=5, temperature=0, logprobs=0, logit_bias={str(first): -100}).json
    assert free[0] not in banned["choices"][0]["logprobs"]["tokens"]


def test_penalties_end_a_repetition(service: Client) -> None:
    def answer(**fields: float) -> list[str]:
        choice = service.complete("a = [1, 1, 1, 1,", temperature=0, max_tokens=60, ignore_eos=True, logprobs=0, **fields)
        return list(choice.json["choices"][0]["logprobs"]["tokens"])

    free = len(set(answer()))
    for name in ("presence_penalty", "frequency_penalty"):
        assert len(set(answer(**{name: 2.0}))) > free
    assert len(set(answer(repetition_penalty=1.5))) > free


def test_a_stop_token_ends_the_answer_and_is_not_shown(service: Client) -> None:
    asked = {"temperature": 0, "max_tokens": 12}
    free = service.complete("import os", **asked, logprobs=0).json["choices"][0]["logprobs"]["tokens"]
    (stop,) = service.post("/tokenize", {"prompt": free[4], "add_special_tokens": False}).json["tokens"]
    choice = service.complete("import os", **asked, stop_token_ids=[stop]).json["choices"][0]
    assert choice["text"] == "".join(free[: free.index(free[4])])
    assert choice["finish_reason"] == "stop"


def test_min_tokens_puts_the_end_off(service: Client) -> None:
    eos = service.replica.tokenizer.eos_id
    asked = {"logit_bias": {str(eos): 100}, "temperature": 0, "max_tokens": 20}
    assert service.complete("import os", **asked).json["usage"]["completion_tokens"] == 1
    assert service.complete("import os", **asked, min_tokens=7).json["usage"]["completion_tokens"] == 8
    chat = service.chat("import os", **asked, min_tokens=7).json
    assert chat["usage"]["completion_tokens"] == 8


def test_min_p_of_one_leaves_the_likeliest_alone(service: Client) -> None:
    choice = service.complete("import os", temperature=2, min_p=1, max_tokens=8, logprobs=1).json["choices"][0]
    drawn, best = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
    assert drawn == [max(each.values()) for each in best], "or one of them, where two are equally likely"


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_answer_about_repeated_lines_is_the_same_with_guesses_and_without(service: Client, backend: str) -> None:
    lines = "".join(f"2026-11-26 08:{minute:02d}:17 INFO request ended id=r{minute} tokens=512\n" for minute in range(40))
    for more in ({"temperature": 0}, {"temperature": 0.7, "seed": 5, "logprobs": 2}):
        body = {"prompt": lines, "max_tokens": 90, "ignore_eos": True, "attention": backend, **more}
        plain, fast = (service.post("/v1/completions", {**body, "prompt_lookup_num_tokens": n}).json for n in (0, 4))
        assert fast["choices"] == plain["choices"]
        assert plain["longserve"]["guessed_tokens"] == 0


def test_a_guessed_token_is_told_in_the_usage_and_the_receipt_and_no_guess_is_made_where_none_is_wanted(
    service: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"prompt": [7, 8] * 40, "max_tokens": 60, "temperature": 0, "ignore_eos": True, "logit_bias": {"7": 100}}
    monkeypatch.setattr(Lookup, "_worth", lambda *_: 4)  # on a busy machine it may for a while not seem to pay
    plain, fast = (service.post("/v1/completions", {**body, **more}) for more in ({"prompt_lookup_num_tokens": 0}, {}))
    assert fast.json["choices"] == plain.json["choices"]
    for reply, is_guessing in ((plain, False), (fast, True)):
        details, receipt = reply.json["usage"]["completion_tokens_details"], reply.json["longserve"]
        accepted, rejected = details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]
        assert (accepted > 0) == is_guessing and receipt["accepted_tokens"] == accepted
        assert receipt["guessed_tokens"] == accepted + rejected
    refused = service.post("/v1/completions", {**body, "prompt_lookup_num_tokens": -1})
    assert refused.status == 400 and refused.json["error"]["param"] == "prompt_lookup_num_tokens"
