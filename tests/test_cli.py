"""The command line where it is on its own: what it does when nobody reads what it prints."""

from __future__ import annotations

import os
import sys

import pytest

from service import cli, cluster
from service.config import ApplicationSection, ServeFile


def test_a_service_drains_although_nobody_reads_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    drained: list[float] = []
    monkeypatch.setattr(cluster, "drain", lambda file, seconds: drained.append(seconds) or [])
    end, unread = os.pipe()
    os.close(end)
    monkeypatch.setattr(sys, "stdout", os.fdopen(unread, "w"))
    file = ServeFile(applications=[ApplicationSection()])
    cli._drain(file)
    assert drained == [30.0]
    print("more", flush=True)  # as the interpreter flushes at its end
