"""A command in a session of its own, behind a process that stays where the caller put it. Linux and other POSIX systems.

Terminals and supervisors signal a whole process group. Ray's daemons belong to the group of whoever starts Ray, and SIGTERM
ends them at once, whatever is being answered. So `longserve serve` works in a child with a session of its own, which only
hears what its parent passes on. Neither survives the other: a killed parent counts as a signal for the child, and what a killed
child leaves in its session the parent ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PASSED = signal.SIGINT  # whichever came: Ray makes SIGTERM its own as it starts, and as it ends lets it kill the process
SAME_SIGNAL_SECONDS = 0.5  # a terminal and a wrapper may both pass on one Ctrl-C
POLL_SECONDS = 0.02
ORPHANS_SECONDS = 3.0  # in which what a killed child leaves may end by itself


Handler = Callable[[int, FrameType | None], None]


def run_in_own_session(work: Callable[[], int], handle: Handler) -> int:
    """The exit status of `work()`, which runs in a child; 128 plus a signal's number when that ended it, as shells tell it.

    `handle` is the child's handler of signals. To be called before the process has threads: `fork` copies only the calling one.
    """
    _open_standard_streams()
    held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until both sides can handle them
    end, lifeline = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(lifeline)
        os.setsid()
        threading.Thread(target=_end_with_parent, args=(end,), daemon=True).start()
        catch(handle)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        try:
            return work()
        finally:
            _ignore()
    os.close(end)
    catch(lambda _, __: _send(child, PASSED))
    signal.pthread_sigmask(signal.SIG_SETMASK, held)
    _, status = os.waitpid(child, 0)
    _ignore()
    end_session(child, ORPHANS_SECONDS)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _open_standard_streams() -> None:
    """Put nothing in the place of a standard stream that the caller has closed: a socket of ours would get its number else."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free
            setattr(sys, name, os.fdopen(number, mode))


def catch(handle: Handler) -> None:
    """Have it handle the signals that end a service: all but a hang-up that the caller has switched off (nohup)."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handle)


def _ignore() -> None:
    """Let no signal change how this process ends: without a handler, which Python's own end takes away, it would kill."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_session(session: int, patience_seconds: float) -> None:
    """Wait until a session has no process but perhaps this one; kill what is left after the time given."""
    deadline = time.monotonic() + patience_seconds
    while members := [pid for pid in _others() if _session(pid) == session]:
        if time.monotonic() > deadline:
            for pid in members:
                _send(pid, signal.SIGKILL)
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


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _end_with_parent(end: int) -> None:
    os.read(end, 1)  # nothing is ever written: it returns when the parent is no more
    os.kill(os.getpid(), PASSED)


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


class Signals:
    """What signals ask of a service: while it starts, to end at once; while it serves, to drain, and the next, to end at once.

    That end comes in the handler itself: an exception of it would come upon any line, and Ray's lines swallow some.
    """

    def __init__(self) -> None:
        self.stopped = Stopped()
        self.serves = False
        self.folder: str | None = None  # what is removed at once
        self._first = 0.0

    def handle(self, _: int, __: FrameType | None) -> None:
        """The handler, in a process that leads a session."""
        if self.serves and not self.stopped.is_set():
            self._first = time.monotonic()
            self.stopped.set()
        elif time.monotonic() - self._first > SAME_SIGNAL_SECONDS:
            end_session(os.getpid(), 0)
            if self.folder is not None:
                shutil.rmtree(self.folder, ignore_errors=True)  # the work may just be removing it, too
            os._exit(0)
