"""What Ray keeps on disk has its place, or the operator is told what is wrong with it."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from service import scratch
from service.config import ConfigError


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path is short."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_sockets_can_be_made_below_the_longest_path_that_is_let_in(monkeypatch: pytest.MonkeyPatch, short: Path) -> None:
    room = scratch.SOCKET_BYTES - len(scratch.LONGEST_SOCKET.format(pid=os.getpid()))
    longest = short / ("a" * (room - len(str(short)) - 1))
    longest.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(longest))
    folder = scratch.make_folder()
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    session = "session_2026-11-27_03-08-24_309236_" + str(os.getpid())
    sockets = Path(folder) / "ray" / session / "sockets"
    sockets.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(sockets / "plasma_store"))

    longer = Path(f"{longest}a")
    longer.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(longer))
    with pytest.raises(ConfigError, match=f"too long .* may have {room} bytes"):
        scratch.make_folder()


def test_a_place_without_room_is_told(monkeypatch: pytest.MonkeyPatch, short: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(short))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=scratch.LEAST_BYTES - 1))
    with pytest.raises(ConfigError, match=f"{short} has 15 MiB left"):
        scratch.make_folder()
    assert list(short.iterdir()) == []


@pytest.mark.parametrize("mode", [None, 0o644])
def test_a_token_is_this_users_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: int | None) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / ".ray" / "auth_token"
    if mode is not None:
        token.parent.mkdir()
        token.write_text("kept")
        token.chmod(mode)
    scratch.close_token()
    assert (token.read_text(), stat.S_IMODE(token.stat().st_mode)) == ("" if mode is None else "kept", 0o600)


def test_a_home_that_takes_no_token_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"file/\.ray'; HOME must name a folder"):
        scratch.close_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    scratch.close_token()
