"""An open-loop load on a service that breaks, and what becomes of each request: `tests/faults.py` sends it.

An answer is whole, or it refuses (429, 503, with an error that a client can read; nobody listens), or it fails where the caller
sees it (an error, a broken connection); what ends in none of these, or looks whole and is not, is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from typing import Any

import aiohttp

from tests.serving import Service

CAPACITY_SECONDS, CALLERS = 10.0, 6
OUTCOMES = ("sent", "answered", "refused", "failed", "lost")


class Load:
    """Requests at random times, and what becomes of them."""

    def __init__(self, service: Service, session: aiohttp.ClientSession, seed: int) -> None:
        self.service = service
        self.tally: Counter[str] = Counter()
        self.words: Counter[str] = Counter()
        self._session = session
        self._random = random.Random(seed)
        self._under_way: set[asyncio.Task[None]] = set()

    async def capacity(self) -> float:
        """Requests a second that a few callers get answered, each one after the other."""
        until = time.monotonic() + CAPACITY_SECONDS

        async def call() -> None:
            while time.monotonic() < until:
                await self.send(self._body())

        await asyncio.gather(*(call() for _ in range(CALLERS)))
        return self.tally["answered"] / CAPACITY_SECONDS

    def _body(self) -> dict[str, Any]:
        stream = self._random.random() < 0.5
        return {"prompt": "import os", "max_tokens": self._random.randint(1, 48), "ignore_eos": True, "stream": stream}

    async def send(self, body: dict[str, Any]) -> None:
        self.tally["sent"] += 1
        outcome, words = await self._outcome(body)
        self.tally[outcome] += 1
        if outcome in ("failed", "lost"):
            self.words[words] += 1

    async def _outcome(self, body: dict[str, Any]) -> tuple[str, str]:
        try:
            async with self._session.post(f"{self.service.url}/v1/completions", json=body) as answer:
                text = await answer.text()
        except TimeoutError:
            return "lost", "no end"
        except aiohttp.ClientConnectorError:  # nobody listens: told at once, as by a 503
            return "refused", "not connected"
        except (aiohttp.ClientError, OSError) as error:
            return "failed", type(error).__name__
        if answer.status == 200 and (not body.get("stream") or text.rstrip().endswith("[DONE]")):
            return "answered", ""
        if '"error"' not in text:
            return "lost", f"status {answer.status} and no error: {text[-60:]!r}"
        refused = answer.status in (429, 503)
        return ("refused" if refused else "failed"), f"status {answer.status}: {text[:60]!r}"

    async def run(self, rate: float, stopped: asyncio.Event) -> None:
        """Send until `stopped`, whatever becomes of what was sent before; then wait for all of it."""
        while not stopped.is_set():
            self.start(self._body())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopped.wait(), self._random.expovariate(rate))
        await asyncio.gather(*self._under_way)

    def start(self, body: dict[str, Any]) -> None:
        task = asyncio.create_task(self.send(body))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
