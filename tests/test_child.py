"""What a signal's handler may do, wherever it comes upon."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from service.child import Stopped
from tests.serving import are_gone


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


SERVES = """
import os, signal, subprocess, sys, time
from service.child import SAME_SIGNAL_SECONDS, Signals, run_in_own_session

signals = Signals()

def work():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as Ray does when it starts
    signals.folder, signals.serves = sys.argv[1], sys.argv[2] == "serves"
    below = subprocess.Popen(["sleep", "100"])
    print(below.pid, flush=True)
    if signals.stopped.wait(20):
        print("drains", flush=True)
        time.sleep(SAME_SIGNAL_SECONDS * 1.5)
        print("still drains", flush=True)
        time.sleep(20)

sys.exit(run_in_own_session(work, signals.handle))
"""


@pytest.mark.parametrize("state", ["starts", "serves"])
def test_a_service_ends_at_once_before_it_serves_and_at_a_second_signal(state: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "log").touch()
    process = subprocess.Popen([sys.executable, "-c", SERVES, str(folder), state], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert lines[1:] == (["drains", "still drains"] if state == "serves" else [])  # the one that came at once was the same
    assert are_gone({int(lines[0])}) and not folder.exists()


ENDS = """
import atexit, os, signal, sys, time
from service.child import Signals, run_in_own_session

def work():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray does when it ends
    return 3

atexit.register(lambda: (print("leaves", flush=True), time.sleep(0.5)))
sys.exit(run_in_own_session(work, Signals().handle))
"""


def test_no_signal_breaks_off_the_end_of_an_interpreter() -> None:
    process = subprocess.Popen([sys.executable, "-c", ENDS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:  # the child's, the parent's
        lines.append(line)
        process.send_signal(signal.SIGTERM)
    assert (process.wait(10), len(lines)) == (3, 2)


def test_what_is_printed_to_a_closed_stream_goes_nowhere(tmp_path: Path) -> None:
    code = (
        "import os, sys; from service.child import run_in_own_session\n"
        "def work(): print('a', file=sys.stderr, flush=True); os.write(1, b'b'); os.write(2, b'c'); return os.pipe()[0]\n"
        "sys.exit(run_in_own_session(work, lambda *_: None))"
    )
    done = subprocess.run(["bash", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code], timeout=60)
    assert done.returncode > 2
