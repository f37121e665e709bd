"""A real replica with the embedded model, served by uvicorn on a real socket, once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from service.config import AttentionConfig, EngineConfig, HttpConfig, LookupConfig, ServiceConfig, UserConfig
from service.plain import listening_in_thread
from tests.http.client import Client

BACKENDS = ("dense", "sliding_window", "performer")
USER = UserConfig(attention=AttentionConfig(default="sliding_window", backends={name: {} for name in BACKENDS}))
LIMITS = HttpConfig(max_body_bytes=200_000, max_prompts=4, max_samples=3)


@pytest.fixture(scope="session")
def service() -> Iterator[Client]:
    engine = EngineConfig(prompt_lookup=LookupConfig(tokens=4))
    with listening_in_thread(ServiceConfig(threads=1, http=LIMITS, engine=engine), USER) as (url, replica):
        yield Client(url, replica)


@pytest.fixture(scope="session")
def impatient() -> Iterator[Client]:
    """The same, but that nobody waits for long answers: a call that asks for 30,000 tokens is a 408 soon."""
    limits = LIMITS.model_copy(update={"request_timeout_seconds": 0.2})
    with listening_in_thread(ServiceConfig(threads=1, http=limits), USER) as (url, replica):
        yield Client(url, replica)
