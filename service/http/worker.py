"""The process that reads large bodies and long texts for a replica: `python -m service.http.worker SOCKET DIRECTORY`.

It loads the tokenizer of the directory, says so, and then does one job after the other until the socket closes. A frame is
eight bytes of length and a pickle; both ends are ours, and nobody else has the socket.
"""

from __future__ import annotations

import gc
import json
import mmap
import pickle
import resource
import signal
import socket
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel

from service.engine.request import InvalidRequest, RequestError
from service.http.body import parse
from service.http.errors import ChatNotOffered, TemplateRefused
from service.http.face import Tokenizer
from service.http.length import check_text
from service.model import chat as templates
from service.model import tokenizer as files
from service.model.encoding import TextRefused

B = TypeVar("B", bound=BaseModel)

LENGTH_BYTES = 8

TEMPLATE_SECONDS, TEMPLATE_BYTES = 5.0, 2**30
"""What a chat template, a foreign program, may take for one conversation."""

TEMPLATE_GROWTH, TEMPLATE_CHARACTERS = 8, 2**20
"""What it may write: so many times the characters of the messages, and so many more."""


def framed(value: Any) -> tuple[bytes, bytes]:
    """A value as it goes over the socket: length and pickle, apart, since joining them would copy what may be long."""
    data = pickle.dumps(value, protocol=5)
    return len(data).to_bytes(LENGTH_BYTES, "little"), data


def read(tokenizer: Tokenizer, raw: bytes, kind: type[B]) -> B:
    """A body's record. Raises InvalidRequest."""
    return parse(raw, kind)


@contextmanager
def _refusing() -> Iterator[None]:
    """A text that the tokenizer gives up on is the caller's to change: InvalidRequest."""
    try:
        yield
    except TextRefused as error:
        raise InvalidRequest(str(error)) from None


@_refusing()
def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> Sequence[int]:
    """A text's token ids."""
    return array("i", tokenizer.encode(text, add_special_tokens))


@_refusing()
def spans(tokenizer: Tokenizer, text: str, add_special_tokens: bool, size: int) -> Sequence[tuple[int, int]]:
    """Where each `size` tokens of a text begin and end, in characters."""
    return tokenizer.spans(text, add_special_tokens, size)


@_refusing()
def encode_pair(tokenizer: Tokenizer, first: str, second: str) -> tuple[Sequence[int], int, int | None]:
    """A pair's token ids, and where those of the second text and of the second type begin."""
    tokens, begin, begin_of_type = tokenizer.encode_pair(first, second)
    return array("i", tokens), begin, begin_of_type


@_refusing()
def chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any], max_length: int | None
) -> Sequence[int]:
    """A conversation's token ids. Raises ChatNotOffered, TemplateRefused, and ContextTooLong unless `max_length` is None."""
    most = TEMPLATE_GROWTH * sum(len(text) for each in messages for text in each.values()) + TEMPLATE_CHARACTERS
    try:
        with _bounded():
            template = tokenizer.chat
            text = template.render(messages, options, most)
    except templates.NoTemplate as error:
        raise ChatNotOffered(f"this model offers no chat: {error}; /v1/completions continues any text") from None
    except templates.MessagesRefused as error:
        raise TemplateRefused(f"{error!s:.400}", param="messages") from None
    except TimeoutError:
        raise TemplateRefused(f"the model's chat template took more than {TEMPLATE_SECONDS:g} s", param="messages") from None
    except MemoryError:
        raise TemplateRefused(
            f"the model's chat template took more than {TEMPLATE_BYTES >> 20} MiB", param="messages"
        ) from None
    if max_length is not None:
        check_text(text, tokenizer.longest_token_bytes, max_length, "messages")
    return array("i", template.encode(text))


@contextmanager
def _bounded() -> Iterator[None]:
    """Time and memory of foreign code in this process, which has no other thread: TimeoutError or MemoryError beyond it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    rung: list[bool] = []

    def ring(*_: object) -> NoReturn:
        rung.append(True)
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (now + TEMPLATE_BYTES, hard))
    signal.setitimer(signal.ITIMER_REAL, TEMPLATE_SECONDS)
    try:
        yield
    except Exception as error:
        if rung:
            raise TimeoutError from error  # Jinja may stumble over it and raise something else
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


@_refusing()
def tokenized(tokenizer: Tokenizer, text: str, add_special_tokens: bool, max_length: int) -> bytes:
    """The answer to `/tokenize`, as JSON."""
    tokens = tokenizer.encode(text, add_special_tokens)
    return json.dumps({"tokens": tokens, "count": len(tokens), "max_model_len": max_length}).encode()


def detokenized(tokenizer: Tokenizer, tokens: Sequence[int]) -> bytes:
    """The answer to `/detokenize`, as JSON."""
    return json.dumps({"prompt": tokenizer.decode(tokens)}, ensure_ascii=False).encode()


def _serve(line: socket.socket, tokenizer: Tokenizer) -> None:
    incoming = line.makefile("rb")
    while len(head := incoming.read(LENGTH_BYTES)) == LENGTH_BYTES:
        job, arguments = pickle.loads(incoming.read(int.from_bytes(head, "little")))
        _send(line, _answer(job, tokenizer, arguments))
        del arguments
        gc.collect()


def _answer(job: Callable[..., Any], tokenizer: Tokenizer, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    """Whether it went well, and result or error."""
    try:
        return True, job(tokenizer, *arguments)
    except RequestError as error:
        return False, error
    except Exception as error:  # told to the replica, which logs it and answers 500
        return False, RuntimeError(f"{type(error).__name__} in {job.__name__}: {error!s:.500}")


def _send(line: socket.socket, value: Any) -> None:
    for part in framed(value):
        line.sendall(part)


def main() -> None:
    """Serve the socket whose number is the first argument, with the tokenizer of the second."""
    gc.disable()  # millions of small lists would be looked through again and again; after each job it runs once
    line, tokenizer = socket.socket(fileno=int(sys.argv[1])), files.Tokenizer.load(sys.argv[2])
    _send(line, "ready")
    _serve(line, tokenizer)


if __name__ == "__main__":
    # as the module of its own name, so that jobs pickled by the replica are the functions above
    from service.http import worker

    worker.main()
