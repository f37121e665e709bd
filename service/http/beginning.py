"""A prompt's beginning as its caller wrote it: marks by which a proxy knows two calls that begin alike, without a tokenizer.

A mark is a digest of all bytes up to a multiple of `STEP_BYTES` behind the name of the field that the prompt stands in, and of
the caller's API key, so calls of two callers have none in common. What was read is given on as it came.
"""

from __future__ import annotations

import asyncio
import re
from hashlib import blake2b

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

HEADER = b"x-longserve-beginning"
"""Carries the marks from the proxy to the router in it, the shortest beginning first. A caller's own is dropped."""

PATHS = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/prefixes"})
STEP_BYTES = 2048  # 512 tokens, some: what is kept of a prompt is whole chunks
WAIT_SECONDS = 1.0  # for the first piece of a body, which the server reads in up to 64 KiB
PROMPT = re.compile(rb'"(?:prompt|messages)"\s*:\s*')


async def read_beginning(scope: Scope, receive: Receive) -> tuple[list[bytes], Receive]:
    """The marks of a call that is about to be sent on, and the `receive` to send it on with."""
    if scope["method"] != "POST" or not any(scope["path"].endswith(path) for path in PATHS):
        return [], receive
    try:
        first = await asyncio.wait_for(receive(), WAIT_SECONDS)
    except TimeoutError:  # whoever is as slow goes where there is the least to do
        return [], receive
    key = Headers(scope=scope).get("authorization", "")
    return marks(key, first.get("body", b"")), _again(first, receive)


def marks(key: str, body: bytes) -> list[bytes]:
    """Of the first piece of a body."""
    found = PROMPT.search(body)
    if found is None:
        return []
    digest, marked = blake2b(key.encode(), digest_size=8), []
    for end in range(found.end() + STEP_BYTES, len(body) + 1, STEP_BYTES):
        digest.update(body[end - STEP_BYTES : end])
        marked.append(digest.copy().hexdigest().encode())
    return marked


def _again(first: Message, receive: Receive) -> Receive:
    """A `receive` that gives a message that was received, then what follows it."""
    held = [first]

    async def again() -> Message:
        return held.pop() if held else await receive()

    return again
