"""What a signal's handler may do, wherever it comes upon."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from types import FrameType
from typing import Any

import pytest

from service import child
from service.child import SAME_SIGNAL_SECONDS, Signals, Stopped


@pytest.mark.parametrize("kind", [Stopped, pytest.param(threading.Event, marks=pytest.mark.xfail(strict=True))])
def test_a_handler_may_set_it_upon_any_line_of_its_own(kind: type[Stopped]) -> None:
    """As two signals at once do, and one that comes upon the wait: an Event waits for itself."""
    ended = []

    def work() -> None:
        stopped, is_within = kind(), False

        def signals(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal is_within
            if frame.f_code.co_filename in (threading.__file__, sys.modules[Stopped.__module__].__file__) and not is_within:
                is_within = True
                stopped.set()
                is_within = False
            return signals

        sys.settrace(signals)
        try:
            stopped.set()
            ended.append(stopped.wait(1))
        finally:
            sys.settrace(None)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(5)
    assert ended == [True]


def test_it_waits_no_longer_than_told() -> None:
    stopped = Stopped()
    assert not stopped.wait(0.01) and not stopped.is_set()
    stopped.set()
    assert stopped.wait() and stopped.wait(0) and stopped.is_set()


class Moments:
    """A clock that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(child.time, "monotonic", lambda: self.now)


def signalled(signals: Signals) -> bool:
    """Whether a signal ends all at once."""
    try:
        signals.handle(signal.SIGTERM, None)
    except KeyboardInterrupt:
        return True
    return False


def test_a_service_that_starts_ends_at_once_and_is_not_disturbed_as_it_ends() -> None:
    signals = Signals()
    assert signalled(signals) and signals.stopped.is_set()
    assert not signalled(signals)


def test_a_service_that_serves_drains_and_a_later_signal_ends_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    signals, clock = Signals(), Moments(monkeypatch)
    signals.serves = True
    told = []
    for clock.now in (100.0, 100.0 + SAME_SIGNAL_SECONDS / 2, 101.0, 102.0):
        told.append(signalled(signals))
    assert told == [False, False, True, False] and signals.stopped.is_set()


def test_the_end_of_a_drained_service_is_not_broken_off() -> None:
    signals = Signals()
    signals.serves = signals.is_over = True
    assert not signalled(signals)


ENDS_SLOWLY = """
import atexit, os, signal, sys, time
from service.child import Signals, run_in_own_session

signals = Signals()

def work():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as Ray does
    print("works", flush=True)
    try:
        time.sleep(20)
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray does
        print("ends", flush=True)
        time.sleep(0.5)
        print("has ended", flush=True)
    return 3

atexit.register(lambda: (print("leaves", os.getpid(), flush=True), time.sleep(0.5)))
sys.exit(run_in_own_session(work, signals.handle))
"""


def test_signals_reach_work_that_handles_sigterm_itself_and_none_breaks_its_end_off() -> None:
    process = subprocess.Popen([sys.executable, "-c", ENDS_SLOWLY], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:  # one at each: as it works, as it ends, as its interpreter ends, and as that of its parent does
        lines.append(line.split()[0])
        process.send_signal(signal.SIGTERM)
    assert lines == ["works", "ends", "has", "leaves", "leaves"]
    assert process.wait(10) == 3
