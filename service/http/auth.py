"""API keys: `Authorization: Bearer KEY`, compared in constant time. The routes a probe asks need none."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers

from service.http.errors import Unauthorized

OPEN_PATHS = frozenset({"/health", "/ready"})


class ApiKeys:
    """The keys callers may show; without any, every call is let in."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def check(self, path: str, headers: Headers) -> None:
        """Raise Unauthorized unless this call may pass."""
        if not self._keys or path in OPEN_PATHS:
            return
        scheme, _, shown = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not shown:
            raise Unauthorized("this service asks for an API key: Authorization: Bearer KEY")
        if not self._is_known(shown.strip().encode()):
            raise Unauthorized("the API key is not one of this service's")

    def _is_known(self, shown: bytes) -> bool:
        """Compares with every key, so that the time tells nothing of which one was near."""
        matches = [hmac.compare_digest(shown, key) for key in self._keys]
        return any(matches)
