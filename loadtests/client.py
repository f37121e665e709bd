"""One request: sent, read, timed and judged. Only an answer that is whole and well-formed counts as one.

Times are `time.monotonic()` seconds, which all processes of a machine share. Two latencies of each request are kept: from the
moment the schedule meant it to be sent, which is what a caller of a busy service waits, and from the moment it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from loadtests.scenario import STREAMED, Api
from loadtests.wire import Answer, CutOff, Unreachable, Wire
from loadtests.workload import PATHS

MAX_ANSWER_BYTES = 64 * 2**20
MAX_TOLD = 200  # characters of a server's own words
MAX_LINE_BYTES = 2**22  # of one event of a stream
END_SECONDS = 0.1  # that a stream's body has to end behind its [DONE]


class Outcome(StrEnum):
    """How a request ended."""

    OK = "ok"
    REFUSED = "refused"
    CLIENT_ERROR = "client_error"
    SERVER_ERROR = "server_error"
    GARBAGE = "garbage"
    CUT_OFF = "cut_off"
    TRICKLED = "trickled"
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    CANCELLED = "cancelled"
    NOT_SENT = "not_sent"


MEANINGS = {
    Outcome.OK: "a whole and well-formed answer",
    Outcome.REFUSED: "the server was too busy (429 or 503)",
    Outcome.CLIENT_ERROR: "the server found the request wrong (other 4xx)",
    Outcome.SERVER_ERROR: "the server failed (other 5xx)",
    Outcome.GARBAGE: "a 200 whose body is not the answer it must be",
    Outcome.CUT_OFF: "the connection ended before the answer did",
    Outcome.TRICKLED: "an answer began, but was not whole within the time-out",
    Outcome.TIMEOUT: "no answer began within the time-out",
    Outcome.UNREACHABLE: "no connection",
    Outcome.CANCELLED: "given up because the run was interrupted",
    Outcome.NOT_SENT: "not sent: too many in flight already (max_in_flight)",
}


@dataclass(frozen=True)
class Ask:
    """A request to send. `at`: seconds from the block's beginning, None in a closed loop; `tokens`: None when not known."""

    stream: str
    index: int
    api: Api
    body: bytes
    tokens: int | None
    at: float | None = None


@dataclass
class Record:
    """What became of one request. Times are monotonic seconds; tokens are the server's usage, else what was asked."""

    stream: str
    index: int
    intended: float
    sent: float = 0.0
    first: float | None = None
    done: float = 0.0
    outcome: Outcome = Outcome.CANCELLED
    status: int | None = None
    told: str = "the run was interrupted"  # why it failed, in words
    asked_tokens: int | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    chunk_times: list[float] = field(default_factory=list)
    receipt: dict[str, Any] = field(default_factory=dict)
    received_bytes: int = 0


def begun(ask: Ask, intended: float) -> Record:
    """The record of a request that is to be sent; it stays "cancelled" unless something becomes of it."""
    return Record(ask.stream, ask.index, intended, asked_tokens=ask.tokens, prompt_tokens=ask.tokens or 0)


class NotAnAnswer(Exception):
    """The body is not what the API promises."""


class Client:
    """Sends requests to one server over connections that are kept and reused."""

    def __init__(self, url: str, headers: dict[str, str], timeout_seconds: float) -> None:
        self._wire = Wire(url, {"content-type": "application/json", **headers})
        self._timeout = timeout_seconds

    def close(self) -> None:
        self._wire.close()

    async def send(self, ask: Ask, record: Record) -> None:
        """Send one request now and write down what becomes of it. Raises nothing of the server's doing."""
        record.sent = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout):
                await self._exchange(ask, record)
        except TimeoutError:
            record.outcome = Outcome.TRICKLED if record.status is not None else Outcome.TIMEOUT
            record.told = f"{record.received_bytes} bytes of the answer within {self._timeout:g} s"
        except Exception as error:  # the edge: whatever a server does ends as a named outcome
            record.outcome, record.told = _failure(error), f"{type(error).__name__}: {error}"[:MAX_TOLD]
        finally:
            record.done = record.done or time.monotonic()

    async def _exchange(self, ask: Ask, record: Record) -> None:
        answer = await self._wire.post(PATHS[ask.api], ask.body)
        try:
            record.status = answer.status
            if answer.status != 200:
                record.outcome = _outcome_of(answer.status)
                told = (await _body(answer, record)).decode(errors="replace")
                record.told = f"{answer.status}: {_message(told)}"[:MAX_TOLD]
                return
            if ask.api in STREAMED:
                await _take_stream(answer, record)
            else:
                _take_whole(_parse(await _body(answer, record)), ask, record)
            record.receipt = record.receipt or _receipt_headers(answer.headers)
            record.outcome, record.told = Outcome.OK, ""
        finally:
            self._wire.release(answer)


async def _take_stream(answer: Answer, record: Record) -> None:
    """Server-sent events until [DONE]. Raises NotAnAnswer for a stream without a finished choice or without its end."""
    if "event-stream" not in answer.headers.get("content-type", ""):
        raise NotAnAnswer(f"a stream was asked for, received {answer.headers.get('content-type', 'no type')}")
    finished, rest = False, b""
    while part := await answer.part():
        record.received_bytes += len(part)
        *lines, rest = (rest + part).split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            raise NotAnAnswer(f"a line of more than {MAX_LINE_BYTES} bytes")
        for line in lines:
            field, _, data = line.partition(b":")
            if field != b"data":
                continue
            if data.strip() == b"[DONE]":
                if not finished:
                    raise NotAnAnswer("the stream ended without a finish_reason")
                record.done = answer.arrived
                await _rest(answer)
                return
            finished = _take_chunk(_parse(data), answer.arrived, record) or finished
    raise CutOff("the stream ended without [DONE]")


async def _rest(answer: Answer) -> None:
    """Read what comes behind [DONE], the end of the body, so that the connection can be used again."""
    with contextlib.suppress(TimeoutError, CutOff):
        async with asyncio.timeout(END_SECONDS):
            while await answer.part():
                pass


async def _body(answer: Answer, record: Record) -> bytes:
    parts = []
    while part := await answer.part():
        record.received_bytes += len(part)
        parts.append(part)
        if record.received_bytes > MAX_ANSWER_BYTES:
            raise NotAnAnswer(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
    record.done = answer.ended
    return b"".join(parts)


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        data = json.loads(raw)
    except ValueError as error:
        raise NotAnAnswer(f"no JSON: {raw[:80]!r}") from error
    if not isinstance(data, dict):
        raise NotAnAnswer(f"an object was expected, received {raw[:80]!r}")
    if data.get("error"):
        raise NotAnAnswer(f"an error inside a 200: {_message(raw.decode(errors='replace'))}")
    return data


def _take_chunk(data: dict[str, Any], arrived: float, record: Record) -> bool:
    """Take in one event of a stream; whether a choice has finished with it."""
    finished = False
    for choice in data.get("choices") or ():
        text = choice.get("text") or (choice.get("delta") or {}).get("content")
        if text or choice.get("finish_reason"):
            record.first = record.first or arrived
            record.chunk_times.append(arrived)
        finished = finished or choice.get("finish_reason") is not None
    _take_account(data, record)
    return finished


def _take_whole(data: dict[str, Any], ask: Ask, record: Record) -> None:
    """Take in a complete answer. Raises NotAnAnswer for one that lacks what it must have."""
    if ask.api == "embeddings":
        if not data.get("data") or not data["data"][0].get("embedding"):
            raise NotAnAnswer("no embedding in the answer")
    else:
        choice = (data.get("choices") or [{}])[0]
        text = choice.get("text") if ask.api == "completions" else (choice.get("message") or {}).get("content")
        if not isinstance(text, str) or choice.get("finish_reason") is None:
            raise NotAnAnswer("no finished choice with a text in the answer")
    _take_account(data, record)


def _take_account(data: dict[str, Any], record: Record) -> None:
    usage = data.get("usage")
    if isinstance(usage, dict):
        record.prompt_tokens = int(usage.get("prompt_tokens") or record.prompt_tokens)
        record.output_tokens = int(usage.get("completion_tokens") or 0)
    if isinstance(data.get("longserve"), dict):
        record.receipt = data["longserve"]


def _receipt_headers(headers: dict[str, str]) -> dict[str, Any]:
    """Facts of `x-longserve-*` headers, numbers as numbers."""
    prefix = "x-longserve-"
    found = {name[len(prefix) :].replace("-", "_"): value for name, value in headers.items() if name.startswith(prefix)}
    return {name: _number(value) for name, value in found.items()}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _outcome_of(status: int) -> Outcome:
    if status in (429, 503):
        return Outcome.REFUSED
    if 400 <= status < 500:
        return Outcome.CLIENT_ERROR
    return Outcome.SERVER_ERROR if status >= 500 else Outcome.GARBAGE


def _failure(error: Exception) -> Outcome:
    if isinstance(error, Unreachable):
        return Outcome.UNREACHABLE
    return Outcome.CUT_OFF if isinstance(error, (CutOff, OSError)) else Outcome.GARBAGE


def _message(text: str) -> str:
    """OpenAI's error message inside a body, else the body."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())
