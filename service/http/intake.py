"""Bodies on their way in: bounded in bytes, each and all together, and in time. What no length or encoding can be trusted of is
refused before a byte is read."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import Receive

from service.config import HttpConfig
from service.engine.request import QueueFull
from service.http.errors import BodyTooLarge, BodyTooSlow, WrongEncoding

RETRY_SECONDS = 2.0  # until some of the bodies that fill the bound have been answered


class Intake:
    """The bodies that are being read or wait for their answer to begin, in bytes."""

    def __init__(self, config: HttpConfig) -> None:
        self.held_bytes = 0
        self.config = config

    def open(self) -> Share:
        """A call's own share, which it must close."""
        return Share(self)


class Share:
    """What one call's body takes of the bound."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._bytes = 0

    async def read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None when the caller hung up meanwhile.

        Raises:
            WrongEncoding, BodyTooLarge, BodyTooSlow, QueueFull: the rest of the body is not read.
        """
        _check_encoding(headers)
        declared, limit = headers.get("content-length", "0"), self._intake.config.max_body_bytes
        if declared.isdecimal() and int(declared[:20]) > limit:
            raise BodyTooLarge(f"the body may have {limit} bytes, received {declared[:20]}")
        seconds = self._intake.config.body_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                return await self._collect(receive)
        except TimeoutError:
            raise BodyTooSlow(f"the body must arrive within {seconds:g} s, received {self._bytes} bytes") from None

    def close(self) -> None:
        """Give the bytes back. Idempotent."""
        self._intake.held_bytes -= self._bytes
        self._bytes = 0

    async def _collect(self, receive: Receive) -> bytes | None:
        parts = []
        while (message := await receive())["type"] == "http.request":
            parts.append(message.get("body", b""))
            self._take(len(parts[-1]))
            if not message.get("more_body", False):
                return b"".join(parts)
        return None

    def _take(self, count: int) -> None:
        config = self._intake.config
        self._bytes += count
        self._intake.held_bytes += count
        if self._bytes > config.max_body_bytes:
            raise BodyTooLarge(f"the body may have {config.max_body_bytes} bytes, received more")
        if self._intake.held_bytes > config.max_bodies_bytes:
            raise QueueFull(f"bodies of {config.max_bodies_bytes} bytes are being read, and no more may", RETRY_SECONDS)


def _check_encoding(headers: Headers) -> None:
    """Raise WrongEncoding for a body that would have to be unpacked first: what it grows to is not known."""
    for coding in headers.getlist("content-encoding"):
        if coding.strip().lower() not in ("", "identity"):
            raise WrongEncoding(f"send the body as it is, without content-encoding, received {coding[:80]!r}")
