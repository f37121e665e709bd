"""Dates come from the wall clock, which may jump; how long things take, and deadlines, from the monotonic one."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.clock import make_clock
from tests.test_imports import ROOT

DATES = {
    "service/switch.py": 1,  # when a switch was made, in its history
    "service/replica.py": 1,  # when the replica was started
    "service/http/routes.py": 1,  # when a pin ends, as a date
    "service/http/answers.py": 2,  # `created` of an answer
    "service/model/chat.py": 1,  # the date that a template asks for
    "service/tracing.py": 1,  # when a span began, of which all else is told by the monotonic clock
}
"""Files that read the wall clock, how often, and for which date they tell."""

DURATION = """
import asyncio, sys, time
from tests.clock import Clock
from tests.engine import world
from pathlib import Path

async def main():
    async with world.running() as engine:
        await world.complete(engine, world.completion("warm"))
        before = time.time()
        tasks = [asyncio.create_task(world.tokens_of(engine, world.completion("x", max_tokens=200)))]
        request = world.completion("y" * 50, max_tokens=200)
        request.deadline = time.monotonic() + 60
        tasks.append(asyncio.create_task(world.tokens_of(engine, request)))
        for jump in (86400, -86400, 0):
            Clock(Path(sys.argv[1]), {}).set(jump)
            assert abs(time.time() - before - jump) < 60, "the clock did not jump"
            await asyncio.sleep(0.01)
        assert [len(each) for each in await asyncio.gather(*tasks)] == [200, 200]
        timings = request.timings
        assert 0 < timings.total_seconds < 60 and timings.prefill_seconds >= 0, timings

asyncio.run(main())
"""


def readings(text: str) -> int:
    """How often a module reads the wall clock: time.time(), time_ns(), and now() or today() of dates."""
    names = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
    names |= {f"datetime.{name}" for name in names}
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    imported = {
        alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module == "time"
        for alias in node.names
    }
    return sum(call in names or (call in ("time", "time_ns") and call in imported) for call in calls)


def test_only_dates_that_are_told_come_from_the_wall_clock() -> None:
    files = [path for folder in ("service", "attention") for path in (ROOT / folder).rglob("*.py")]
    found = Counter({str(path.relative_to(ROOT)): readings(path.read_text()) for path in files if "training" not in path.parts})
    assert dict(+found) == DATES


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("import time\nend = time.time() + 5", 1),
        ("from time import time\nend = time() + 5", 1),
        ("from datetime import datetime\nstart = datetime.now()", 1),
        ("import time\nend = time.monotonic() + 5", 0),
    ],
)
def test_a_reading_of_the_wall_clock_is_found(text: str, count: int) -> None:
    assert readings(text) == count


def test_an_answer_goes_on_through_jumps_of_the_clock_by_a_day_each_way(tmp_path: Path) -> None:
    clock = make_clock(tmp_path)
    command = [sys.executable, "-c", DURATION, str(clock.file)]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=clock.environment)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 100
