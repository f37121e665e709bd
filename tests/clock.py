"""A wall clock that a test can set for the processes that it starts: `tests/clock.c`, preloaded. The machine's own stays."""

from __future__ import annotations

import os
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")


@dataclass(frozen=True)
class Clock:
    """How far ahead of the machine's the clock of some processes is."""

    file: Path
    environment: dict[str, str]

    def set(self, seconds: float) -> None:
        """Have it jump: so far ahead of the machine's, or behind."""
        with self.file.open("r+b") as file:
            file.write(struct.pack("q", int(seconds * 1e9)))


def make_clock(folder: Path) -> Clock:
    """A clock in a folder, and the environment of processes that go by it. Needs gcc."""
    library, file = folder / "clock.so", folder / "clock"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", library, SOURCE, "-ldl"], check=True)
    file.write_bytes(struct.pack("q", 0))
    return Clock(file, os.environ | {"LD_PRELOAD": str(library), "LONGSERVE_CLOCK": str(file)})
