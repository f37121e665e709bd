"""The server under test as it tells of itself: its models, backends, longest input, versions. Plain calls, not timed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from loadtests.faults import TargetError

ASK_SECONDS = 30.0
UNKNOWN_LIMIT = 1_000_000  # tokens, where a server does not tell its longest input


@dataclass(frozen=True)
class Target:
    """A server that answered: base URL without /v1, headers to send, and what /v1/models and /info say."""

    url: str
    headers: dict[str, str]
    models: tuple[str, ...]
    max_tokens: int | None  # the longest input and output together; None: the server does not tell
    info: dict[str, Any] = field(default_factory=dict)
    has_metrics: bool = False
    has_tokenize: bool = False

    def model(self, wanted: str | None, backend: str | None) -> str:
        """The model id that asks for a backend. Raises TargetError with what is served."""
        base = wanted or next((each for each in self.models if "@" not in each), self.models[0])
        name = f"{base}@{backend}" if backend else base
        if name not in self.models:
            raise TargetError(f"{self.url} serves no {name!r}, it serves: {', '.join(self.models)}")
        return name

    def session(self, connections: int = 4) -> aiohttp.ClientSession:
        """A session that sends the key; close it."""
        return aiohttp.ClientSession(headers=self.headers, connector=aiohttp.TCPConnector(limit=connections))


def base_url(given: str) -> str:
    """The URL without a trailing /v1, for /metrics and /tokenize stand beside it. Raises TargetError."""
    parts = urlsplit(given)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise TargetError(f"the server's URL must be like http://127.0.0.1:8000, received {given!r}")
    if parts.username or parts.password:
        raise TargetError("a URL with a password in it would stand in the report: name the key's variable by --key-env")
    return re.sub(r"/v1/?$|/$", "", given)


async def find(url: str, key: str | None) -> Target:
    """Ask a server what it is. Raises TargetError when nothing usable answers."""
    base = base_url(url)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession(headers=headers) as session:
        models = await _models(session, base)
        info = await _optional(session, f"{base}/info")
        metrics = await _answers(session, "GET", f"{base}/metrics")
        probe = {"model": models[0]["id"], "prompt": "a"}
        tokenize = await _answers(session, "POST", f"{base}/tokenize", probe)
    limits = [each["max_model_len"] for each in models if isinstance(each.get("max_model_len"), int)]
    ids = tuple(str(each["id"]) for each in models)
    return Target(base, headers, ids, min(limits) if limits else None, info, metrics, tokenize)


async def _models(session: aiohttp.ClientSession, base: str) -> Sequence[dict[str, Any]]:
    url = f"{base}/v1/models"
    try:
        status, data = await _json(session, "GET", url)
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        raise TargetError(f"nothing answers at {url} ({type(error).__name__}: {error}); is the server running?") from error
    except ValueError as error:
        raise TargetError(f"{url} does not answer in JSON: {error}") from error
    if status == 401:
        raise TargetError(f"{url} wants an API key: name the environment variable that holds it by --key-env")
    listed = data.get("data") if isinstance(data, dict) else None
    usable = [each for each in listed if isinstance(each, dict) and "id" in each] if isinstance(listed, list) else []
    if status != 200 or not usable:
        raise TargetError(f"{url} answered {status} and lists no model; is it an OpenAI-compatible server?")
    return usable


async def _json(session: aiohttp.ClientSession, method: str, url: str, body: Any = None) -> tuple[int, Any]:
    timeout = aiohttp.ClientTimeout(total=ASK_SECONDS)
    async with session.request(method, url, json=body, timeout=timeout) as response:
        return response.status, await response.json(content_type=None)


async def _optional(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """What a route tells that many servers do not have."""
    try:
        status, data = await _json(session, "GET", url)
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError):
        return {}
    return data if status == 200 and isinstance(data, dict) else {}


async def _answers(session: aiohttp.ClientSession, method: str, url: str, body: Any = None) -> bool:
    try:
        async with session.request(method, url, json=body, timeout=aiohttp.ClientTimeout(total=ASK_SECONDS)) as response:
            return response.status == 200
    except (TimeoutError, aiohttp.ClientError, OSError):
        return False


async def plan_seconds(target: Target, model: str, api: str, tokens: int, output: int) -> float | None:
    """What the server itself expects one request to take (`/v1/plan`); None where it has no such route."""
    asked = {"input": [1] * tokens} if api == "embeddings" else {"prompt": [1] * tokens, "max_tokens": output}
    async with target.session() as session:
        try:
            status, data = await _json(session, "POST", f"{target.url}/v1/plan", {"model": model, **asked})
            return float(sum(data["data"][0]["predicted_seconds"].values())) if status == 200 else None
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError, KeyError, TypeError, IndexError):
            return None
