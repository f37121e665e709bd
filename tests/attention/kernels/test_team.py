"""The team: calls of many threads on few CPUs, one behind the other and beside each other, answer as one thread does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from attention import HeadShape, gather_team
from attention.kernels.softmax import native
from tests.attention.laws import need_native
from tests.sanitizers import HEADERS

GROUPS, HEADS, WIDTH = 2, 4, 64
CALLS = 200


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    need_native(HeadShape(HEADS, GROUPS, WIDTH))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def question(seed: int) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]], list[int]]:
    """Queries, states and counts of some sequences, of one part and of many."""
    generator = torch.Generator().manual_seed(seed)
    counts = [1 + (seed * 37) % 200, 257 * (1 + seed % 5), 1500][: 1 + seed % 3]
    kept = [{name: torch.randn(n, GROUPS * WIDTH, generator=generator) for name in ("k", "v")} for n in counts]
    return torch.randn(len(counts), HEADS, WIDTH, generator=generator), kept, counts


def answer(seed: int) -> torch.Tensor:
    q, states, counts = question(seed)
    out = torch.full_like(q, torch.nan)
    native.step(q, states, counts, GROUPS, out)
    return out


@torch.inference_mode()
def test_more_threads_than_cpus_answer_as_one_does_call_after_call() -> None:
    torch.set_num_threads(1)
    wanted = [answer(seed) for seed in range(12)]
    for count in (2, 3, 4 * (os.cpu_count() or 1)):
        torch.set_num_threads(count)
        assert all(torch.equal(answer(turn % 12), wanted[turn % 12]) for turn in range(CALLS))


@torch.inference_mode()
def test_calls_beside_each_other_do_not_mix() -> None:
    torch.set_num_threads(1)
    wanted = [answer(seed) for seed in range(12)]

    def call(own: int) -> bool:
        torch.set_num_threads(2)
        with torch.inference_mode():
            return all(torch.equal(answer((own + turn) % 12), wanted[(own + turn) % 12]) for turn in range(CALLS))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(call, range(3)))


def test_a_team_is_gathered_once() -> None:
    code = """
import os
from attention import gather_team
tasks = lambda: len(os.listdir("/proc/self/task"))
before = tasks()
gather_team(3), gather_team(3), gather_team(2)
print(tasks() - before)
"""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("tasks are listed on Linux only")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "2"
    with pytest.raises(RuntimeError, match="there must be threads"):
        gather_team(0)


def test_threads_that_share_a_call_never_touch_a_word_unordered(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is missing")
    program, empty = tmp_path / "team", tmp_path / "empty.c"
    flags = ["gcc", "-O1", "-g", "-pthread", "-fsanitize=thread", "-Wno-tsan", f"-I{HEADERS}", "-o", str(program)]
    empty.write_text("int main(void) { return 0; }")
    if subprocess.run([*flags, str(empty)], check=False).returncode or subprocess.run([program], check=False).returncode:
        pytest.skip("gcc is without ThreadSanitizer, or the system's addresses are not for it")
    subprocess.run([*flags, Path(__file__).with_name("team.c"), HEADERS / "team.c"], check=True)
    ran = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr[:2000]) == (0, "", "")
