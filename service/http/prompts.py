"""From a body to the engine's requests: which backend, which tokens, until when. What is wrong is told before anything runs."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from service.engine.request import (
    AUTO,
    Constraint,
    InvalidRequest,
    Request,
    Sampling,
    TaskNotOffered,
    UnknownBackend,
    check_task,
    quoted,
)
from service.http.drawn_schemas import MOST_FORM, ChatBody, CompletionBody, DrawnBody, ObjectFormat, SchemaFormat
from service.http.errors import ModelNotFound
from service.http.face import Host
from service.http.fields import Prompt
from service.http.length import Side, check_text, check_tokens, cut
from service.http.plan_schemas import PlanBody, PrefixBody
from service.http.read_schemas import ClassifyBody, EmbeddingBody, RerankBody, ScoreBody, ScoredBody
from service.http.reader import Call
from service.http.schemas import Attended, AutoWish, Body
from service.timing import Timings

DEFAULT_MAX_TOKENS = 16  # OpenAI's
DEFAULT_CHAT_TOKENS = 1024  # or what the context leaves; OpenAI's is the context, whose bytes would be reserved


async def completion_requests(body: CompletionBody, host: Host, call: Call) -> list[Request]:
    """One request per prompt. Raises InvalidRequest."""
    check_task("completion", host.card.tasks)
    asked = await _drawing(body, host, call)
    room = None if body.truncate is None else Room(host.card.max_length - asked.sampling.max_tokens, body.truncate)
    return await _requests(asked, "prompt", body.prompt, body.with_special_tokens, room, host, call)


async def chat_requests(body: ChatBody, host: Host, call: Call) -> list[Request]:
    """The one request of a conversation, as the model's chat template writes it. Raises InvalidRequest."""
    check_task("completion", host.card.tasks)
    asked, start, most = await _drawing(body, host, call), time.monotonic(), host.card.max_length
    messages = [each.plain() for each in body.messages]
    tokens = await host.reader.chat(messages, body.chat_template_kwargs or {}, None if body.truncate else most, call)
    sampling, timings = asked.sampling, Timings()
    if body.truncate is not None:
        answer = min(DEFAULT_CHAT_TOKENS, most // 2) if body.most_tokens is None else sampling.max_tokens
        tokens = Room(most - answer, body.truncate).fit(tokens, 1, timings)
    check_tokens(len(tokens), most, "messages")
    if body.most_tokens is None:
        sampling = replace(sampling, max_tokens=max(1, min(DEFAULT_CHAT_TOKENS, most - len(tokens))))
        _check_least(sampling)
    timings.tokenize_seconds = time.monotonic() - start
    return [replace(asked, id=f"{asked.id}-0", tokens=tokens, sampling=sampling, timings=timings, source="messages")]


async def _drawing(body: DrawnBody, host: Host, call: Call) -> Request:
    """The request of a body that draws tokens, its prompt left out. Raises InvalidRequest."""
    if body.samples > host.config.max_samples:
        raise InvalidRequest(f"n may be at most {host.config.max_samples}, received {body.samples}", param="n")
    asked = call.asks("completion", n=body.samples, owner=call.owner)
    asked, sampling = _attended(asked, body, host, call), sampling_of(body)
    check_ids([token for token, _ in sampling.logit_bias], host, "logit_bias")
    check_ids(sampling.stop_token_ids, host, "stop_token_ids")
    if body.most_tokens is not None or isinstance(body, CompletionBody):
        _check_least(sampling)
    if (form := constraint_of(body)) is not None:
        sampling = replace(sampling, grammar=await asyncio.to_thread(host.engine.grammar, form))
    return replace(asked, sampling=sampling)


async def prefix_request(body: PrefixBody, host: Host, call: Call) -> Request:
    """The request of a prompt, or of a conversation as far as its own messages go. Raises InvalidRequest."""
    asked = _attended(call.asks("completion", owner=call.owner), body, host, call)
    check_task("completion", host.card.tasks)
    if body.prompt is not None:
        return (await _requests(asked, "prompt", [body.prompt], body.with_special_tokens, None, host, call))[0]
    messages, options = [each.plain() for each in body.messages or ()], body.chat_template_kwargs or {}
    start, most = time.monotonic(), host.card.max_length
    tokens = await host.reader.chat(messages, {**options, "add_generation_prompt": False}, most, call)
    check_tokens(len(tokens), most, "messages")
    timings = Timings(tokenize_seconds=time.monotonic() - start)
    return replace(asked, tokens=tokens, timings=timings, source="messages")


async def embedding_requests(body: EmbeddingBody, host: Host, call: Call) -> list[Request]:
    """One request per input. Raises InvalidRequest."""
    check_task("embedding", host.card.tasks)
    if (body.dimensions or 0) > host.card.width:
        message = f"an embedding has {host.card.width} dimensions, received {body.dimensions}"
        raise InvalidRequest(message, param="dimensions")
    asked = _attended(call.asks("embedding", pooling=body.pooling), body, host, call)
    asked = replace(asked, is_ended=body.normalize, late_chunks=body.late_chunks)
    room = None if body.truncate is None else Room(host.card.max_length, body.truncate)
    return await _requests(asked, "input", _prompted(body, host), body.with_special_tokens, room, host, call)


async def chunk_places(body: EmbeddingBody, requests: Sequence[Request], host: Host, call: Call) -> list[dict[str, int]]:
    """Where each late chunk of each input stands: in characters of a text, in tokens of token ids."""
    assert body.late_chunks is not None, "asked for chunks only"
    places = []
    for index, (given, read, request) in enumerate(zip(body.input, _prompted(body, host), requests, strict=True)):
        count, size = len(request.tokens), body.late_chunks
        starts = range(0, count, size)
        spans: Sequence[tuple[int, int]] = [(start, min(start + size, count)) for start in starts]
        if isinstance(given, str) and isinstance(read, str):
            before = len(read) - len(given)  # the checkpoint's prompt
            told = await host.reader.spans(read, body.with_special_tokens, size, call)
            spans = [(max(0, start - before), max(0, end - before)) for start, end in told]
        for start, (first, last) in zip(starts, spans, strict=True):
            places.append({"input": index, "start": first, "end": last, "tokens": min(size, count - start)})
    return places


def _prompted(body: EmbeddingBody, host: Host) -> Sequence[Prompt]:
    """The inputs with the prompt in front that is asked for, or that the checkpoint has for all. Raises InvalidRequest."""
    prompts, name = host.card.prompts, body.prompt_name or host.card.default_prompt
    if name is None:
        return body.input
    if name not in prompts:
        told = ", ".join(prompts) or "none"
        raise InvalidRequest(f"no prompt {quoted(name)}, the checkpoint has {told}", param="prompt_name")
    if body.prompt_name is not None and not all(isinstance(each, str) for each in body.input):
        raise InvalidRequest("prompt_name stands before texts, and the input has token ids", param="prompt_name")
    return [prompts[name] + each if isinstance(each, str) else each for each in body.input]


async def classified_requests(body: ClassifyBody | EmbeddingBody, host: Host, call: Call) -> list[Request]:
    """One request per input, which may be the body of a plan that an embedding has, too. Raises InvalidRequest."""
    asked, room = _scoring(body, host, call)
    return await _requests(asked, "input", body.input, body.with_special_tokens, room, host, call)


async def paired_requests(body: ScoreBody | RerankBody, host: Host, call: Call) -> list[Request]:
    """One request per pair of texts. Raises InvalidRequest."""
    (asked, room), param = _scoring(body, host, call), "text_2" if isinstance(body, ScoreBody) else "documents"
    if body.truncate not in (None, "right"):
        raise InvalidRequest(f"a pair can be cut at its end only: right, received {body.truncate}", param="truncate")
    _check_one_label(host)
    _check_count(len(body.pairs), param, host)
    return [
        await _paired(replace(asked, id=f"{asked.id}-{index}", source=param), pair, room, host, call)
        for index, pair in enumerate(body.pairs)
    ]


async def _paired(asked: Request, pair: tuple[str, str], room: Room | None, host: Host, call: Call) -> Request:
    start, param, most = time.monotonic(), asked.param, host.card.max_length
    if room is None:
        for text in pair:
            check_text(text, host.tokenizer.longest_token_bytes, most, param)
    tokens, begin, second = await host.reader.encode_pair(*pair, call)
    timings = Timings(tokenize_seconds=time.monotonic() - start)
    if room is not None and begin + host.tokenizer.trailing < most:  # else nothing would be left of the second text
        tokens = room.fit(tokens, host.tokenizer.leading, timings, host.tokenizer.trailing)
    check_tokens(len(tokens), most, param)
    return replace(asked, tokens=tokens, second=second, timings=timings)


def _scoring(body: ScoredBody | EmbeddingBody, host: Host, call: Call) -> tuple[Request, Room | None]:
    """The request of a body that a classifier answers, its text left out, and the room for one."""
    asked = _attended(call.asks("classification"), body, host, call)
    check_task("classification", host.card.tasks)
    asked.is_ended = body.use_activation if isinstance(body, ScoredBody) else None
    return asked, None if body.truncate is None else Room(host.card.max_length, body.truncate)


def _check_one_label(host: Host) -> None:
    """Raise TaskNotOffered for a classifier of several labels: none of them is the score of a pair."""
    if len(labels := host.card.labels) != 1:
        raise TaskNotOffered(f"this model tells {len(labels)} labels apart: ask /v1/classify; a score is that of one label")


async def planned_requests(body: PlanBody, host: Host, call: Call) -> list[Request]:
    """The requests a plan is asked about: those of the call itself. Raises InvalidRequest."""
    asked = body.root
    if isinstance(asked, CompletionBody):
        return await completion_requests(asked, host, call)
    if isinstance(asked, ChatBody):
        return await chat_requests(asked, host, call)
    if isinstance(asked, ScoreBody | RerankBody):
        return await paired_requests(asked, host, call)
    if "classification" in host.card.tasks:
        return await classified_requests(asked, host, call)
    return await embedding_requests(asked, host, call)


def check_model(body: Body, host: Host) -> str | None:
    """The backend that the model id names behind its @, if it names one. Raises ModelNotFound, UnknownBackend."""
    if body.model in (None, host.card.id):
        return None
    name, _, backend = body.model.rpartition("@")
    if name != host.card.id or not backend:
        allowed = f"{host.card.id}, or {host.card.id}@ and one of {', '.join(host.backends)}"
        raise ModelNotFound(f"no model {quoted(body.model)} here, allowed: {allowed}", param="model")
    if backend not in (*host.backends, AUTO):
        raise UnknownBackend(backend, (*host.backends, AUTO), param="model")
    return backend


def _attended(asked: Request, body: Attended, host: Host, call: Call) -> Request:
    """The request under the backend asked for, by field or by model id; the engine knows which are allowed.

    Raises:
        ModelNotFound, UnknownBackend, InvalidRequest: by the model id, or by two answers to one question.
    """
    named, wish = check_model(body, host), body.attention
    if named is not None and wish not in (None, named):
        told = quoted(wish) if isinstance(wish, str) else AUTO
        raise InvalidRequest(f"model asks for {named} and attention for {told}: ask for one", param="attention")
    if isinstance(wish, AutoWish):
        return replace(asked, backend=AUTO, max_seconds=wish.auto.max_seconds, prefer=tuple(wish.auto.prefer or ()))
    return replace(asked, backend=named or wish, caller=call.stays)


def sampling_of(body: DrawnBody) -> Sampling:
    """The body's wishes in the engine's terms, with OpenAI's defaults."""
    return Sampling(
        max_tokens=DEFAULT_MAX_TOKENS if body.most_tokens is None else body.most_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        logit_bias=body.logit_bias,
        stop=body.stop,
        stop_token_ids=body.stop_token_ids,
        min_tokens=body.min_tokens or 0,
        seed=body.seed,
        logprobs=body.alternatives,
        echo=isinstance(body, CompletionBody) and bool(body.echo),
        ignore_eos=bool(body.ignore_eos),
        lookup_tokens=body.prompt_lookup_num_tokens,
    )


def constraint_of(body: DrawnBody) -> Constraint | None:
    """What the answer's text must be; None: it may be any. Raises InvalidRequest for what is too long."""
    asked = body.response_format
    if isinstance(asked, ObjectFormat):
        return Constraint("json", '{"type": "object"}', "response_format")
    if isinstance(asked, SchemaFormat):
        form = Constraint("json", json.dumps(asked.json_schema.definition), "response_format")
    elif body.guided_json is not None:
        form = Constraint("json", json.dumps(body.guided_json), "guided_json")
    elif body.guided_choice is not None:
        form = Constraint("choice", json.dumps(body.guided_choice), "guided_choice")
    elif body.guided_regex is not None:
        form = Constraint("regex", body.guided_regex, "guided_regex")
    else:
        return None
    if len(form.text) > MOST_FORM:
        message = f"{form.source} may have {MOST_FORM} characters, received {len(form.text)}"
        raise InvalidRequest(message, param=form.source)
    return form


def _check_least(sampling: Sampling) -> None:
    if sampling.min_tokens > sampling.max_tokens:
        message = f"min_tokens may be at most max_tokens ({sampling.max_tokens}), received {sampling.min_tokens}"
        raise InvalidRequest(message, param="min_tokens")


@dataclass(frozen=True)
class Room:
    """What a caller who asks for it has an input cut to."""

    tokens: int
    side: Side

    def fit(self, tokens: Sequence[int], leading: int, timings: Timings, trailing: int = 0) -> Sequence[int]:
        """The tokens that stay; writes down how many do not. Where an answer alone fills the context nothing is cut."""
        if self.tokens < 1:
            return tokens
        kept = cut(tokens, self.tokens, self.side, leading, trailing)
        timings.dropped_tokens = len(tokens) - len(kept)
        return kept


async def _requests(
    asked: Request, param: str, prompts: Sequence[Prompt], add_special_tokens: bool, room: Room | None, host: Host, call: Call
) -> list[Request]:
    """`asked` once for every prompt, with the prompt's own tokens, id and clock. `room`: None refuses what is too long."""
    _check_count(len(prompts), param, host)
    requests = []
    for index, prompt in enumerate(prompts):
        start = time.monotonic()
        tokens = await tokens_of(prompt, add_special_tokens, room is not None, host, param, call)
        timings = Timings(tokenize_seconds=time.monotonic() - start)
        has_special = add_special_tokens and isinstance(prompt, str)
        leading = host.tokenizer.leading if has_special else 0
        if room is not None:
            tokens = room.fit(tokens, leading, timings, host.tokenizer.trailing if has_special else 0)
        requests.append(replace(asked, id=f"{asked.id}-{index}", tokens=tokens, timings=timings, leading=leading))
    return requests


def _check_count(count: int, param: str, host: Host) -> None:
    if count > host.config.max_prompts:
        raise InvalidRequest(f"{param} may hold {host.config.max_prompts} entries, received {count}", param=param)


async def tokens_of(
    prompt: Prompt, add_special_tokens: bool, may_be_longer: bool, host: Host, param: str, call: Call
) -> Sequence[int]:
    """A prompt's token ids; those of a caller stay as they are.

    Raises:
        InvalidRequest: an empty prompt, an id that is none.
        ContextTooLong: a text that is longer than the context alone, unless it may be.
    """
    if not prompt:
        raise InvalidRequest(f"{param} is empty, it must have at least one token", param=param)
    if not isinstance(prompt, str):
        check_ids(prompt, host, param)
        return prompt
    if not may_be_longer:
        check_text(prompt, host.tokenizer.longest_token_bytes, host.card.max_length, param)
    tokens = await host.reader.encode(prompt, add_special_tokens, call)
    if not may_be_longer:
        check_tokens(len(tokens), host.card.max_length, param)  # the engine would, after the other prompts have been read
    return tokens


def check_ids(tokens: Sequence[int], host: Host, param: str) -> None:
    """Raise InvalidRequest unless every id is a token."""
    place = host.tokenizer.stranger(tokens)
    if place is not None:
        last, found = host.tokenizer.vocab_size - 1, tokens[place]
        hole = ", of which this is none" if 0 <= found <= last else ""
        raise InvalidRequest(f"{param}: token ids are 0 to {last}, received {found} at place {place}{hole}", param=param)
