"""What Ray keeps on this machine's disk: a folder of sockets and logs for each service, a token for all of a user's."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from service.config import ConfigError

SOCKET_BYTES = 107  # of the path of a Unix socket, Linux says
LONGEST_SOCKET = "/longserve-xxxxxxxx/ray/session_YYYY-MM-DD_HH-MM-SS_ffffff_{pid}/sockets/plasma_store"
LEAST_BYTES = 16 << 20  # of room for logs: without any, Ray waits for half a minute and cannot say for what


def place() -> str:
    """Where the folders are made."""
    return os.path.abspath(os.environ.get("RAY_TMPDIR") or "/tmp")


def make_folder() -> str:
    """A new folder, which only this user may enter. Raises ConfigError where Ray could not live in it."""
    parent = place()
    room = SOCKET_BYTES - len(LONGEST_SOCKET.format(pid=os.getpid()))
    try:
        if (free := shutil.disk_usage(parent).free) < LEAST_BYTES:
            raise ConfigError(f"{parent} has {free >> 20} MiB left, too few for Ray's logs; RAY_TMPDIR names another place")
        if len(os.fsencode(parent)) > room:
            raise ConfigError(f"{parent} is too long for the paths of Ray's sockets below it: RAY_TMPDIR may have {room} bytes")
        return tempfile.mkdtemp(prefix="longserve-", dir=parent)
    except OSError as error:
        told = f"{parent}: no folder for Ray's sockets and logs can be made there ({error.strerror})"
        raise ConfigError(f"{told}; RAY_TMPDIR names another place") from error


def close_token() -> None:
    """Have Ray's token readable by this user alone: a Ray of other making leaves it open. Raises ConfigError where none can be.

    An empty one counts as none for Ray, which then makes one.
    """
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    try:
        token = Path.home() / ".ray" / "auth_token"
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch(0o600)
        token.chmod(0o600)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"Ray's token cannot be kept: {error}; HOME must name a folder where this user may write") from error
