"""Log lines as a log collector takes them: a JSON object each, in a file that may be rotated."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from service import logs


def test_every_line_of_a_log_file_is_json_and_goes_on_in_a_new_file_after_a_rotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logs, "LOGGERS", ("test.logs",))
    file, logger = tmp_path / "lines.jsonl", logging.getLogger("test.logs.child")
    logs.install(str(file))
    try:
        logger.warning("one\nmessage", extra={"fields": {"id": "ä", "bytes": 5}})
        file.rename(tmp_path / "old.jsonl")
        try:
            raise ValueError("cause") from KeyError("root")
        except ValueError as error:
            logger.error("failed", exc_info=error)
    finally:
        (handler,) = logging.getLogger("test.logs").handlers
        logging.getLogger("test.logs").removeHandler(handler)
        handler.close()
    (first,) = [json.loads(line) for line in (tmp_path / "old.jsonl").read_text().splitlines()]
    assert (first["message"], first["id"], first["bytes"], first["level"]) == ("one\nmessage", "ä", 5, "warning")
    (second,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert second["error"] == "ValueError: cause"
    assert "KeyError: 'root'" in second["traceback"]
    assert not caplog.records  # nobody else gets them


def test_a_file_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        logs.install(str(tmp_path / "nowhere" / "lines.jsonl"))
