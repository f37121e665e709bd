"""Prompts: real text, the source of Python's standard library, cut to a wanted number of tokens.

How the tokens are counted is part of the result: by the server's own `/tokenize` or a local `tokenizer.json` (exact), or by a
ratio of characters to tokens that one answer's usage told (approximate; the report then goes by the usage of each answer).
"""

from __future__ import annotations

import functools
import json
import sysconfig
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp
import numpy as np

from loadtests.faults import ScenarioError, TargetError
from loadtests.scenario import STREAMED, Api
from loadtests.target import Target

Count = Callable[[str], Awaitable[int]]
Method = Literal["the server's /tokenize", "a local tokenizer.json", "an estimate by characters"]
SERVER: Method = "the server's /tokenize"
LOCAL: Method = "a local tokenizer.json"
ESTIMATE: Method = "an estimate by characters"
PATHS: Mapping[Api, str] = {
    "completions": "/v1/completions",
    "stream": "/v1/completions",
    "embeddings": "/v1/embeddings",
    "chat": "/v1/chat/completions",
    "chat_stream": "/v1/chat/completions",
}
CALIBRATION_CHARACTERS = 4000
TRIES = 60  # of one cut: texts whose count jumps over the wanted one are left for another


@dataclass(frozen=True)
class Prompt:
    """A text and its number of tokens: `is_exact` unless it was estimated."""

    text: str
    tokens: int
    is_exact: bool


@functools.cache
def corpus() -> str:
    """The standard library's modules in order of their paths, some 10 MB. The same Python gives the same text."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts)
    return "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in paths)


class Cutter:
    """Cuts texts of a wanted number of tokens, `distinct` different ones of each length, and remembers them."""

    def __init__(self, count: Count | None, method: Method, characters_per_token: float, distinct: int, seed: int) -> None:
        self.method: Method = method
        self._count = count
        self._ratio = characters_per_token
        self.distinct = distinct
        self._seed = seed
        self._known: dict[tuple[int, int], Prompt] = {}

    async def prompt(self, tokens: int, index: int) -> Prompt:
        """Text number `index` of this length. Raises TargetError when no cut has the wanted count."""
        place = (tokens, index % self.distinct)
        if place not in self._known:
            rng = np.random.default_rng((self._seed, *place))
            self._known[place] = await self._cut(tokens, rng)
        return self._known[place]

    async def _cut(self, tokens: int, rng: np.random.Generator) -> Prompt:
        if self._count is None:
            size = max(1, round(tokens * self._ratio))
            return Prompt(self._slice(_start(rng, size), size), tokens, False)
        tries = 0
        while tries < TRIES:
            start, size, seen = _start(rng, int(tokens * self._ratio)), max(1, round(tokens * self._ratio)), set[int]()
            while size not in seen and tries < TRIES:
                seen.add(size)
                tries += 1
                text = self._slice(start, size)
                found = await self._count(text)
                if found == tokens:
                    return Prompt(text, tokens, True)
                step = round((tokens - found) * self._ratio)
                size = max(1, size + (step or (1 if found < tokens else -1)))
        raise TargetError(
            f"no text of exactly {tokens} tokens found in {TRIES} tries: the server's tokenizer adds or merges more"
        )

    @staticmethod
    def _slice(start: int, size: int) -> str:
        text = corpus()
        return (
            (text[start : start + size] + text * (size // len(text)))[:size] if size > len(text) else text[start : start + size]
        )


def _start(rng: np.random.Generator, size: int) -> int:
    return int(rng.integers(0, max(1, len(corpus()) - 2 * size)))


async def cutter(
    target: Target, session: aiohttp.ClientSession, model: str, api: Api, tokenizer: Path | None, distinct: int, seed: int
) -> Cutter:
    """The most exact cutter that the server and the given tokenizer allow. Raises TargetError or ScenarioError."""
    sample = corpus()[:CALIBRATION_CHARACTERS]
    count: Count
    method: Method
    if tokenizer is not None:
        count, method = _local(tokenizer), LOCAL
    elif target.has_tokenize:
        count, method = functools.partial(_remote, target, session, model), SERVER
    else:
        usage = await _usage(target, session, model, api, sample)
        return Cutter(None, ESTIMATE, CALIBRATION_CHARACTERS / usage, distinct, seed)
    return Cutter(count, method, CALIBRATION_CHARACTERS / max(1, await count(sample)), distinct, seed)


async def _remote(target: Target, session: aiohttp.ClientSession, model: str, text: str) -> int:
    body = {"model": model, "prompt": text}
    try:
        async with session.post(f"{target.url}/tokenize", json=body, timeout=aiohttp.ClientTimeout(total=60)) as response:
            return int((await response.json(content_type=None))["count"])
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(f"{target.url}/tokenize gave no count: {type(error).__name__}: {error}") from error


def _local(path: Path) -> Count:
    from tokenizers import Tokenizer  # only here: a server's own /tokenize needs no library

    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        loaded = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception for a file it cannot read
        raise ScenarioError(f"{file}: no tokenizer: {error}") from error

    async def count(text: str) -> int:
        return len(loaded.encode(text).ids)

    return count


async def _usage(target: Target, session: aiohttp.ClientSession, model: str, api: Api, text: str) -> int:
    """Tokens of a text by the usage that an answer reports."""
    plain: Api = "completions" if api == "stream" else "chat" if api == "chat_stream" else api
    try:
        async with session.post(
            target.url + PATHS[plain],
            data=body(plain, model, text, 1),
            headers={"content-type": "application/json"},
            timeout=aiohttp.ClientTimeout(total=120),
        ) as response:
            return max(1, int((await response.json(content_type=None))["usage"]["prompt_tokens"]))
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(
            f"{target.url} has no /tokenize and its answers no usage ({type(error).__name__}: {error!s:.200}), "
            "so lengths cannot be told; give its tokenizer by --tokenizer"
        ) from error


def body(api: Api, model: str, text: str, output_tokens: int, ignore_eos: bool = False) -> bytes:
    """A request's JSON. `ignore_eos` makes the answer's length that which was asked, on servers that know it."""
    if api == "embeddings":
        return json.dumps({"model": model, "input": text, "encoding_format": "base64"}).encode()
    asked: dict[str, Any] = {"model": model, "max_tokens": output_tokens, "temperature": 0}
    asked |= {"ignore_eos": True} if ignore_eos else {}
    asked |= {"messages": [{"role": "user", "content": text}]} if api.startswith("chat") else {"prompt": text}
    if api in STREAMED:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(asked).encode()
