"""What a signal's handler may do, wherever it comes upon."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

import pytest

from service.child import Stopped


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
