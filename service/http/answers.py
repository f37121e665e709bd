"""From the engine's deltas and embeddings to OpenAI's bodies. No sockets here; `streaming.py` sends."""

from __future__ import annotations

import asyncio
import base64
import codecs
import json
import math
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.engine.request import Delta, FinishReason, Request, TokenLogprob
from service.http.face import Host, Tokenizer
from service.http.read_schemas import RerankBody
from service.timing import PHASES, receipt

Json = dict[str, Any]

LONG_LIST = 256
"""Entries; a longer list is spelled and encoded in a thread, by so many at once: some milliseconds of Python's lock."""


WIDE_LIST = 64

FEW_VECTORS = 16
"""Of an answer, that are encoded at once: more are in a thread, one by one, half a millisecond each."""


class Choice:
    """One sample on its way: the chunk each delta makes, and the whole when it is complete."""

    spellers: type[Speller]

    def __init__(self, index: int, tokenizer: Tokenizer, is_streamed: bool) -> None:
        self.index = index
        self._is_streamed = is_streamed  # nobody asks for the whole: nothing is kept
        self.finish_reason: FinishReason | None = None
        self._texts: list[str] = []
        self._logprobs: list[Json] = []
        self._speller = self.spellers(tokenizer)

    def add(self, delta: Delta) -> Json:
        """Take a delta in; returns it as a chunk's choice."""
        self.finish_reason = delta.finish_reason
        logprobs = None if delta.logprobs is None else self._speller.spell(delta.logprobs)
        if not self._is_streamed:
            self._texts.append(delta.text)
            self._logprobs += [] if logprobs is None else [logprobs]
        return {"index": self.index, **self.part(delta.text), "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def whole(self) -> Json:
        """The complete sample."""
        assert self.finish_reason is not None, "a whole choice has ended"
        logprobs = self.spellers.joined(self._logprobs) if self._logprobs else None
        text = self.all("".join(self._texts))
        return {"index": self.index, **text, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def part(self, text: str) -> Json:
        """The next piece of text as a chunk shows it."""
        raise NotImplementedError

    def all(self, text: str) -> Json:
        """The whole text as an answer shows it."""
        raise NotImplementedError


class Speller:
    """Tokens' log-probabilities in OpenAI's spelling."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def spell(self, logprobs: Sequence[TokenLogprob]) -> Json:
        """The next tokens of the sample."""
        raise NotImplementedError

    @staticmethod
    def joined(parts: Sequence[Json]) -> Json:
        """Several spellings as one."""
        return {key: [item for part in parts for item in part[key]] for key in parts[0] if parts[0][key] is not None}

    def _text(self, raw: bytes) -> str:
        """A token's text; one that is no text by itself is spelled `bytes:\\xe2`, as OpenAI does."""
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class ListSpeller(Speller):
    """As completions spell them: a list for each fact, and each token's place in the text of its sample."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end inside a character
        self._offset = 0

    def spell(self, logprobs: Sequence[TokenLogprob]) -> Json:
        return {
            "tokens": [self._text(self._bytes(each)) for each in logprobs],
            "token_logprobs": [each.logprob for each in logprobs],
            "top_logprobs": [self._top(each) for each in logprobs],
            "text_offset": [self._advance(self._bytes(each)) for each in logprobs],
        }

    def _bytes(self, logprob: TokenLogprob) -> bytes:
        """A token's bytes. One without a log-probability begins an echoed text."""
        if logprob.logprob is None:
            return self._tokenizer.bytes_of([logprob.token])
        return self._tokenizer.token_bytes(logprob.token)

    def _top(self, logprob: TokenLogprob) -> dict[str, float] | None:
        if logprob.logprob is None:
            return None
        return {self._text(self._tokenizer.token_bytes(token)): value for token, value in logprob.top}

    def _advance(self, raw: bytes) -> int:
        start = self._offset
        self._offset += len(self._decoder.decode(raw))
        return start


class ItemSpeller(Speller):
    """As conversations spell them: an object for each token."""

    def spell(self, logprobs: Sequence[TokenLogprob]) -> Json:
        return {"content": [self._item(each) for each in logprobs], "refusal": None}

    def _item(self, told: TokenLogprob) -> Json:
        assert told.logprob is not None, "only a prompt's first token has none"
        return self._entry(told.token, told.logprob) | {"top_logprobs": [self._entry(*each) for each in told.top]}

    def _entry(self, token: int, logprob: float) -> Json:
        raw = self._tokenizer.token_bytes(token)
        return {"token": self._text(raw), "logprob": logprob, "bytes": list(raw)}

    @staticmethod
    def joined(parts: Sequence[Json]) -> Json:
        return Speller.joined(parts) | {"refusal": None}


class TextChoice(Choice):
    """A sample of a completion."""

    spellers = ListSpeller

    def part(self, text: str) -> Json:
        return {"text": text}

    def all(self, text: str) -> Json:
        return {"text": text}


class ChatChoice(Choice):
    """A sample of what the assistant says."""

    spellers = ItemSpeller
    _is_opened = False

    def part(self, text: str) -> Json:
        role = {} if self._is_opened else {"role": "assistant"}
        self._is_opened = True
        return {"delta": {**role, "content": text}}

    def all(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}


@dataclass(frozen=True)
class Form:
    """One of OpenAI's two shapes of what was drawn."""

    prefix: str  # of its id
    whole: str  # its name
    chunk: str  # that of a part
    choice: type[Choice]


TEXT = Form("cmpl", "text_completion", "text_completion", TextChoice)
CHAT = Form("chatcmpl", "chat.completion", "chat.completion.chunk", ChatChoice)


class Completion:
    """The answer to one call that draws tokens: every prompt's every sample."""

    def __init__(self, id: str, requests: Sequence[Request], host: Host, is_streamed: bool, form: Form) -> None:
        name = form.chunk if is_streamed else form.whole
        self._head = {"id": f"{form.prefix}-{id}", "object": name, "created": int(time.time()), "model": host.card.id}
        self._requests = requests
        self._samples = requests[0].n
        self._choices = [form.choice(index, host.tokenizer, is_streamed) for index in range(len(requests) * self._samples)]
        self._told = 0  # tokens with their log-probabilities

    @property
    def is_long(self) -> bool:
        """Whether a thread should encode it."""
        return self._told > LONG_LIST

    async def take(self, prompt: int, delta: Delta) -> Json:
        """`add`, in a thread when there is much to spell."""
        told = len(delta.logprobs or ())
        self._told += told
        if told <= LONG_LIST:
            return self.add(prompt, delta)
        return await asyncio.to_thread(self.add, prompt, delta)

    def add(self, prompt: int, delta: Delta) -> Json:
        """Take in a delta of the prompt with that index; returns it as a chunk of a stream."""
        return {**self._head, "choices": [self._choices[prompt * self._samples + delta.index].add(delta)]}

    def usage_chunk(self) -> Json:
        """The last chunk of a stream that asked for usage: no choice, the usage and the receipt."""
        return {**self._head, "choices": [], **self._account()}

    def whole(self) -> Json:
        """The complete answer."""
        return {**self._head, "choices": [choice.whole() for choice in self._choices], **self._account()}

    def usage(self) -> Json:
        """Tokens so far."""
        prompt = sum(len(request.tokens) for request in self._requests)
        answer = sum(request.timings.output_tokens for request in self._requests)
        cached = sum(request.timings.cached_tokens for request in self._requests)
        guessed = sum(request.timings.guessed_tokens for request in self._requests)
        accepted = sum(request.timings.accepted_tokens for request in self._requests)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": guessed - accepted,
            },
        }

    def _account(self) -> Json:
        return {"usage": self.usage(), "longserve": receipt([request.timings for request in self._requests])}


def embeddings(
    vectors: Sequence[Sequence[float]],
    requests: Sequence[Request],
    host: Host,
    as_base64: bool,
    places: Sequence[Mapping[str, int]] = (),
) -> Json:
    """The answer to an embedding call. `places`: of late chunks, each vector's."""
    tokens = sum(len(request.tokens) for request in requests)
    return {
        "object": "list",
        "model": host.card.id,
        "data": [
            {"object": "embedding", "index": index, "embedding": _packed(each) if as_base64 else each, **place}
            for index, (each, place) in enumerate(zip(vectors, places or [{}] * len(vectors), strict=True))
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "longserve": receipt([request.timings for request in requests]),
    }


def _scored(call_id: str, prefix: str, requests: Sequence[Request], host: Host) -> Json:
    """What the answers of a classifier say alike."""
    tokens = sum(len(request.tokens) for request in requests)
    return {
        "id": f"{prefix}-{call_id}",
        "object": "list",
        "created": int(time.time()),
        "model": host.card.id,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "longserve": receipt([request.timings for request in requests]),
    }


def classified(call_id: str, scores: Sequence[Sequence[float]], requests: Sequence[Request], host: Host) -> Json:
    """The answer to a classify call: of each input the likeliest label, and the score of each."""
    labels = host.card.labels
    data = [
        {"index": i, "label": labels[max(range(len(each)), key=each.__getitem__)], "probs": each, "num_classes": len(each)}
        for i, each in enumerate(scores)
    ]
    return {**_scored(call_id, "classify", requests, host), "data": data}


def scored(call_id: str, scores: Sequence[Sequence[float]], requests: Sequence[Request], host: Host) -> Json:
    """The answer to a score call."""
    data = [{"object": "score", "index": i, "score": each} for i, (each,) in enumerate(scores)]
    return {**_scored(call_id, "score", requests, host), "data": data}


def reranked(
    call_id: str, scores: Sequence[Sequence[float]], requests: Sequence[Request], host: Host, body: RerankBody
) -> Json:
    """The answer to a rerank call: the best first, of equals the earlier."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i][0])[: body.top_n]
    told: list[Json] = [{"index": i, "relevance_score": scores[i][0]} for i in order]
    if body.return_documents is not False:
        told = [{**each, "document": {"text": body.documents[i]}} for each, i in zip(told, order, strict=True)]
    return {**_scored(call_id, "rerank", requests, host), "results": told}


def cut(vector: list[float], dimensions: int | None, is_normalized: bool = True) -> list[float]:
    """The first so many numbers of a vector, where it is normalized at length one again if they have any; None: all of them."""
    if dimensions is None or dimensions >= len(vector):
        return vector
    first = vector[:dimensions]
    if not is_normalized:
        return first
    length = math.hypot(*first)
    return [each / length for each in first] if length else first


def _packed(vector: Sequence[float]) -> str:
    """Little-endian float32 in base64: what OpenAI's clients ask for and unpack."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def encoded(value: Any) -> bytes:
    """A value as JSON."""
    return json.dumps(value, ensure_ascii=False).encode()


def encoded_in_pieces(value: Any) -> bytes:
    """The same for a thread: it lets Python's lock go between the pieces, which `json.dumps` keeps to its end."""
    return "".join(_pieces(value)).encode()


def _pieces(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield "{"
        for place, (key, each) in enumerate(value.items()):
            yield f"{',' * bool(place)}{json.dumps(key)}:"
            yield from _pieces(each)
        yield "}"
    elif isinstance(value, list) and not any(map(_is_wide, value[:1])):
        slices = (value[start : start + LONG_LIST] for start in range(0, len(value), LONG_LIST))
        yield f"[{','.join(json.dumps(each, ensure_ascii=False)[1:-1] for each in slices)}]"
    elif isinstance(value, list):
        yield "["
        for place, each in enumerate(value):
            yield "," * bool(place)
            yield from _pieces(each)
        yield "]"
    else:
        yield json.dumps(value, ensure_ascii=False)


def _is_wide(entry: Any) -> bool:
    """Whether an entry of a list has so much in it that several are too much for one piece."""
    parts = entry.values() if isinstance(entry, dict) else ()
    return any(len(each) > WIDE_LIST if isinstance(each, list) else _is_wide(each) for each in parts)


def headers(requests: Sequence[Request]) -> dict[str, str]:
    """The receipt as far as it is known now: `Server-Timing` in milliseconds and one header per fact."""
    known: Mapping[str, Any] = {k: v for k, v in receipt([request.timings for request in requests]).items() if v is not None}
    timing = ", ".join(f"{p};dur={known[f'{p}_seconds'] * 1000:.3f}" for p in PHASES if f"{p}_seconds" in known)
    facts = {f"x-longserve-{name.replace('_', '-')}": str(value) for name, value in known.items()}
    return {"server-timing": timing} | facts
