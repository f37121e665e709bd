"""Our log lines: one JSON object each, an error's cause on one line and its traceback in one field.

`log_level: info` in a config adds a line per request (`service/metrics.py` says what stands in it). They go to stderr, where
Ray puts the replica's name in front of each, or to a file that all replicas of a machine append to.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler

LOGGERS = ("longserve", "service")
"""Roots of all our loggers: what users read by topic, and modules by their own name."""


class JsonLines(logging.Formatter):
    """time (ISO 8601, UTC), level, logger, message; the caller's `extra={"fields": {...}}`; error and traceback."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": when, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        return json.dumps(line | getattr(record, "fields", {}) | self._failure(record), ensure_ascii=False, default=str)

    def _failure(self, record: logging.LogRecord) -> dict[str, str]:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or record.exc_info is None:
            return {}
        return {
            "error": " ".join(f"{type(error).__name__}: {error}".split()),
            "traceback": self.formatException(record.exc_info),
        }


def install(file: str | None) -> None:
    """Send all our lines to stderr or, when one is named, to a file, which may be rotated from outside.

    Loggers that have a handler keep it. Raises OSError for a file that cannot be written.
    """
    # the process's own stderr, for Serve puts a logger of its own in the place of `sys.stderr`
    handler = logging.StreamHandler(sys.__stderr__) if file is None else WatchedFileHandler(file, encoding="utf-8")
    handler.setFormatter(JsonLines())
    for name in LOGGERS:
        root = logging.getLogger(name)
        if not root.handlers:
            root.addHandler(handler)
        root.propagate = False
