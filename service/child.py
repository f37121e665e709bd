"""A command in a session of its own, behind a process that stays where the caller put it. Linux and other POSIX systems.

Terminals and supervisors signal a whole process group. Ray's daemons belong to the group of whoever starts Ray, and SIGTERM
ends them at once, whatever is being answered. So `longserve serve` works in a child with a session of its own, which only
hears what its parent passes on. Neither survives the other: a killed parent counts as SIGTERM for the child, and what a killed
child leaves in its session the parent ends.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_SECONDS = 0.02
ORPHANS_SECONDS = 3.0  # in which what a killed child leaves may end by itself


def run_in_own_session(work: Callable[[], int]) -> int:
    """The exit status of `work()`, which runs in a child; 128 plus a signal's number when that ended it, as shells tell it.

    To be called before the process has threads: `fork` copies only the calling one.
    """
    held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until both sides can handle them
    end, lifeline = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(lifeline)
        os.setsid()
        threading.Thread(target=_end_with_parent, args=(end,), daemon=True).start()
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        return work()
    os.close(end)
    for number in heeded():
        signal.signal(number, lambda received, _: _pass_on(child, received))
    signal.pthread_sigmask(signal.SIG_SETMASK, held)
    _, status = os.waitpid(child, 0)
    end_session(child, ORPHANS_SECONDS)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def heeded() -> list[signal.Signals]:
    """The signals that end a service: all but a hang-up that the caller has switched off (nohup)."""
    return [each for each in SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]


def end_session(session: int, patience_seconds: float) -> None:
    """Wait until a session has no process but perhaps this one; kill what is left after the time given."""
    deadline = time.monotonic() + patience_seconds
    while members := [pid for pid in _others() if _session(pid) == session]:
        if time.monotonic() > deadline:
            for pid in members:
                _pass_on(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _others() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def _session(pid: int) -> int | None:
    """A live process's session; None for one that is gone, and for one that has ended and waits for its parent to ask."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            state, _, _, session = stat.read().rpartition(")")[2].split()[:4]
    except OSError:
        return None
    return None if state == "Z" else int(session)


def _pass_on(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _end_with_parent(end: int) -> None:
    os.read(end, 1)  # nothing is ever written: it returns when the parent is no more
    os.kill(os.getpid(), signal.SIGTERM)


class Stopped:
    """Like a `threading.Event`, and a signal's handler may set it.

    An Event's lock is taken in Python: a handler that comes upon its own `set`, or upon a `wait`, waits for itself for ever.
    A SimpleQueue's `put` may come upon anything, its documentation says.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._told: SimpleQueue[None] = SimpleQueue()

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        self._told.put(None)

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it is set, at the latest after so many seconds; one thread waits."""
        if not self._is_set:
            with suppress(Empty):
                self._told.get(timeout=timeout)
        return self._is_set
