"""This machine's pace as it was measured once, kept in a file between starts: for this machine, model and version only.

What is kept is a first guess: `forecast.Drift` corrects it by what steps then take. Who deletes the file has all measured anew.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.engine.forecast import Ramp

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]

logger = logging.getLogger(__name__)


class PaceFile(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid")

    facts: dict[str, str | int]
    lines: dict[str, list[tuple[Amount, Amount]]]


class Profile:
    """Straight lines by what they are of. Without a folder, or where it cannot be written, for this process only."""

    def __init__(self, folder: Path | None = None, facts: Mapping[str, str | int] | None = None) -> None:
        """`facts`: all that the lines depend on beside their keys. Another machine's facts have another file."""
        self._facts = dict(facts or {})
        name = sha256(json.dumps(self._facts, sort_keys=True).encode()).hexdigest()[:16]
        self._path = None if folder is None else folder / f"pace-{name}.json"
        self._lines = self._read()

    def recall(self, key: str, count: int) -> list[Ramp] | None:
        """The lines kept under a key, if there are so many."""
        found = self._lines.get(key, [])
        return list(found) if len(found) == count else None

    def keep(self, key: str, lines: Sequence[Ramp]) -> None:
        """Keep lines, beside those that other replicas have kept meanwhile. Never raises."""
        self._lines = {**self._read(), **self._lines, key: list(lines)}
        if self._path is None:
            return
        kept = PaceFile(facts=self._facts, lines={key: [(r.fixed, r.slope) for r in each] for key, each in self._lines.items()})
        draft = self._path.with_suffix(f".{secrets.token_hex(4)}")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft.write_text(kept.model_dump_json())
            os.replace(draft, self._path)
        except OSError as error:  # it serves all the same, and measures again the next time
            logger.info("the pace of this machine is not kept: %s", error)

    def _read(self) -> dict[str, list[Ramp]]:
        try:
            kept = PaceFile.model_validate_json(self._path.read_bytes()) if self._path is not None else None
        except (OSError, ValidationError):  # not there yet, or nothing of ours: measured anew and written over
            kept = None
        if kept is None or kept.facts != self._facts:
            return {}
        return {key: [Ramp(*line) for line in lines] for key, lines in kept.lines.items()}
