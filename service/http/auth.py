"""Who may call: API keys (`Authorization: Bearer KEY`), each with a name and limits of its own. A probe's routes need none.

Keys come from an environment variable, without limits, and from a file that is read again when it changes. Limits hold for each
replica by itself. A minute's budget fills evenly. Tokens are counted when they have been read and written, so what runs may
overdraw the budget; the next call waits until the debt is paid.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from starlette.datastructures import Headers

from service.config import KeyConfig, read_keys
from service.engine.request import NeverFits
from service.http.errors import RateLimited, Unauthorized

OPEN_PATHS = frozenset({"/health", "/ready"})
LOOK_SECONDS = 1.0  # between two looks at the file
SHARE_RETRY_SECONDS = 2.0  # until some of a key's own requests have ended

log = logging.getLogger("longserve.http")


class Meter:
    """What one minute's budget has left: it fills evenly up to the whole, and is below zero after an overdraft."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = time.monotonic()

    def seconds_until(self, level: float) -> float:
        """Until so much is there; 0: it is."""
        now = time.monotonic()
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
        return max(0.0, (level - self._level) * 60 / self.per_minute)

    def take(self, amount: float) -> None:
        self._level -= amount


class Caller:
    """One key's owner, and what its calls have taken so far."""

    def __init__(self, config: KeyConfig) -> None:
        self.config = config
        self.held_bytes = 0
        self._requests = None if config.requests_per_minute is None else Meter(config.requests_per_minute)
        self._tokens = None if config.tokens_per_minute is None else Meter(config.tokens_per_minute)

    def enter(self) -> None:
        """Count a call. Raises RateLimited."""
        for meter, what in ((self._requests, "requests"), (self._tokens, "tokens")):
            if meter is not None and (seconds := meter.seconds_until(1)) > 0:
                message = (
                    f"the key {self.config.name!r} may use {meter.per_minute} {what} a minute; try again in {seconds:.1f} s"
                )
                raise RateLimited(message, seconds)
        if self._requests is not None:
            self._requests.take(1)

    def used(self, tokens: int) -> None:
        """Count tokens that were read or written."""
        if self._tokens is not None:
            self._tokens.take(tokens)

    @contextmanager
    def holding(self, needed_bytes: int, budget_bytes: int) -> Iterator[None]:
        """Hold so much of this key's share of the memory for as long as the block lasts.

        Raises:
            NeverFits: it is more than the whole share.
            RateLimited: it is, beside what the key's other calls hold.
        """
        share = self.config.memory_share
        if share is not None:
            self._check(needed_bytes, int(share * budget_bytes))
        self.held_bytes += needed_bytes
        try:
            yield
        finally:
            self.held_bytes -= needed_bytes

    def _check(self, needed: int, most: int) -> None:
        told = f"the call needs {needed} bytes, of which the key {self.config.name!r} may hold {most}"
        if needed > most:
            raise NeverFits(told, details={"needed_bytes": needed, "budget_bytes": most})
        if self.held_bytes + needed > most:
            raise RateLimited(f"{told} and holds {self.held_bytes}", SHARE_RETRY_SECONDS)


NOBODY = Caller(KeyConfig(name="anyone"))
"""Who calls where no key is asked for."""


class ApiKeys:
    """The keys callers may show; without any, and without a file, every call is let in."""

    def __init__(self, keys: Sequence[str], file: str | None = None) -> None:
        """Raises ValueError for a file that cannot be read."""
        self._own = [KeyConfig(name=f"key-{place}", key=key) for place, key in enumerate(keys, 1)]
        self._file = None if file is None else Path(file)
        self._looked_at = time.monotonic()
        self._callers: dict[str, Caller] = {}
        self._digests: list[tuple[bytes, str]] = []
        self._stamp = self._stamp_of()
        self._take([] if self._file is None else read_keys(self._file))

    def check(self, path: str, headers: Headers) -> Caller:
        """Who calls. Raises Unauthorized unless this call may pass."""
        self._look()
        if path in OPEN_PATHS or (not self._digests and self._file is None):
            return NOBODY
        scheme, _, shown = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not shown:
            raise Unauthorized("this service asks for an API key: Authorization: Bearer KEY")
        found = self._owner(shown.strip().encode())
        if found is None:
            raise Unauthorized("the API key is not one of this service's")
        return found

    def _owner(self, shown: bytes) -> Caller | None:
        """Compares with every key, so that the time tells nothing of which one was near."""
        digest = sha256(shown).digest()
        matches = [name for known, name in self._digests if hmac.compare_digest(digest, known)]
        return self._callers[matches[0]] if matches else None

    def _look(self) -> None:
        """Read the file again when it has changed. One that cannot be read leaves all as it was, and is logged."""
        now = time.monotonic()
        if self._file is None or now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        stamp = self._stamp_of()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._take(read_keys(self._file))
        except ValueError as error:
            log.error("API keys stay as they were: %s", error)

    def _stamp_of(self) -> tuple[int, int] | None:
        try:
            found = None if self._file is None else self._file.stat()
        except OSError:
            return None
        return None if found is None else (found.st_mtime_ns, found.st_ino)

    def _take(self, entries: Sequence[KeyConfig]) -> None:
        """Let these in and nobody else; who stays with the limits it had keeps what it has used."""
        before, self._callers, self._digests = self._callers, {}, []
        for entry in (*self._own, *entries):
            known = before.get(entry.name)
            self._callers[entry.name] = known if known is not None and known.config == entry else Caller(entry)
            self._digests.append((entry.digest, entry.name))
