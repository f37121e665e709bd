"""From the bytes of a body to a checked record: strict JSON first, then the schema. No sockets and no event loop here: any
thread will do.

JSON is RFC 8259's in UTF-8, and stricter where two readers could differ: no key twice in an object, no NaN or Infinity, no lone
surrogate, no byte order mark, nothing behind the end. An integer has no decimal point (`1`, not `1.0`), as with OpenAI.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import jiter
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.datastructures import Headers

from service.config import worded
from service.engine.request import MOST_QUOTED, InvalidRequest, quoted
from service.http.errors import WrongMediaType
from service.http.plan_schemas import TAGS

B = TypeVar("B", bound=BaseModel)

MOST_FAULTS = 5
"""Faults told of one body; whoever mends them learns of the rest."""


def check_media_type(headers: Headers) -> None:
    """Raise WrongMediaType unless a body with these headers is declared to be JSON in UTF-8."""
    declared = headers.get("content-type", "")
    kind, *parameters = (part.strip().lower() for part in declared.split(";"))
    charsets = [part.partition("=")[2].strip('"') for part in parameters if part.startswith("charset=")]
    is_json = kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
    if not is_json or any(charset not in ("utf-8", "utf8") for charset in charsets):
        received = quoted(declared) if declared else "none"
        message = f"send the body as JSON in UTF-8 with content-type: application/json, received {received}"
        raise WrongMediaType(message, param="content-type")


def parse(raw: bytes, kind: type[B]) -> B:
    """The record that a body's bytes say. Raises InvalidRequest, which names what is wrong and where."""
    value = _object(raw)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)) from None  # the error holds the whole body


def _object(raw: bytes) -> dict[str, Any]:
    """The JSON object in the bytes. Raises InvalidRequest."""
    try:
        value = jiter.from_json(raw, allow_inf_nan=False, catch_duplicate_keys=True, cache_mode="keys")
    except ValueError as error:
        raise InvalidRequest(_no_json(raw, str(error))) from None
    if not isinstance(value, dict):
        raise InvalidRequest(f'the body must be a JSON object such as {{"prompt": "..."}}, received {quoted(value)}')
    return value


def _no_json(raw: bytes, fault: str) -> str:
    """What is wrong with bytes that the parser would not read."""
    if not raw.strip():
        return "the body is empty: send a JSON object"
    if raw.startswith(b"\xef\xbb\xbf"):
        return "the body begins with a byte order mark: send JSON in UTF-8 without one"
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return f"the body is not UTF-8: {error.reason} at byte {error.start}"
    what, at, place = fault.rpartition(" at line ")
    return f"the body is not JSON that can be read: {what[:MOST_QUOTED]}{at}{place}"


def _refusal(faults: Sequence[ErrorDetails]) -> InvalidRequest:
    """The refusal of an object that breaks its schema."""
    told = faults[:MOST_FAULTS]
    more = f"; and {len(faults) - len(told)} more" if len(faults) > len(told) else ""
    message = "; ".join(_describe(fault, MOST_QUOTED // (2 * len(told))) for fault in told)
    return InvalidRequest(message + more, param=_param(faults[0]))


def _param(fault: ErrorDetails) -> str | None:
    return fault.get("ctx", {}).get("param") or _path(fault, MOST_QUOTED) or None


def _describe(fault: ErrorDetails, most: int) -> str:
    """One fault in a sentence with at most twice `most` characters of the caller's."""
    where, message = _path(fault, most), worded(fault)
    if fault["type"] == "missing":
        return f"{where} is required"
    if fault["type"] == "extra_forbidden":
        return f"{where} is no field that is known here: leave it out"
    received = "" if "received" in message or "param" in fault.get("ctx", {}) else f", received {quoted(fault['input'], most)}"
    return f"{where}: {message}{received}" if where else f"{message}{received}"


def _path(fault: ErrorDetails, most: int) -> str:
    """Where the fault stands; the keys of the path may be the caller's."""
    parts, tagged = fault["loc"], (None, *fault["loc"])
    return ".".join(str(part) for part, before in zip(parts, tagged, strict=False) if not _is_tag(part, before))[:most]


def _is_tag(part: int | str, before: int | str | None) -> bool:
    """Whether a part of a path tells which of several bodies or forms is meant, and is no field."""
    return part in TAGS or before == "response_format"
