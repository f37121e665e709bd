"""Large bodies and long texts are read beside the replica: whoever sends them waits, nobody else does."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import socket
import termios
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from service.config import HttpConfig, ServiceConfig, UserConfig
from service.engine.request import InvalidRequest, QueueFull
from service.http import worker
from service.http.workers import WorkerFailed, Workers
from service.model.checkpoint import EMBEDDED
from service.model.tokenizer import Tokenizer
from service.plain import listening_in_thread
from tests.http.client import Client, eventually
from tests.model.test_tokenizer import endless

LINE = "x = [1, 2]\n"
LONG = LINE * 20_000  # 220 kB, some 120,000 tokens
ENDLESS = "x = [1, 2]; " * 1_300_000  # 15.6 MB: tens of seconds of a worker
TINY_LISTS = b'{"prompt":[' + b",".join([b"[1]"] * 4_000_000) + b"]}"


@pytest.fixture(scope="module")
def alone() -> Iterator[Client]:
    """A service with one worker, and room for one more to wait for it."""
    config = ServiceConfig(threads=1, http=HttpConfig(workers=1, max_waiting_reads=1))
    with listening_in_thread(config, UserConfig()) as (url, replica):
        yield Client(url, replica, patience_seconds=120)


def pid_of(client: Client) -> int:
    """The process of its worker."""
    (only,) = client.replica._workers._workers
    return int(only._process.pid)


def is_free(client: Client) -> bool:
    return bool(client.replica._workers._idle.qsize() == 1 and client.replica._workers.waiting == 0)


def test_a_long_text_becomes_the_tokens_it_would_become_here(alone: Client) -> None:
    tokens = alone.post("/tokenize", {"prompt": LONG}).json["tokens"]
    assert tokens == Tokenizer.load(EMBEDDED).encode(LONG, add_special_tokens=True)
    assert alone.post("/detokenize", {"tokens": tokens[1:]}).json == {"prompt": LONG}


def test_a_text_that_the_tokenizer_gives_up_on_is_its_callers_fault() -> None:
    for job, more in ((worker.encode, (False,)), (worker.encode_pair, ("b",)), (worker.tokenized, (False, 9))):
        is_answer, error = worker._answer(job, endless(), ("a" * 40, *more))
        assert not is_answer and isinstance(error, InvalidRequest) and "gives up on this text" in error.message


@pytest.mark.parametrize("place", [0, 150_000, 299_999])
def test_one_wrong_id_among_many_is_named_with_its_place(alone: Client, place: int) -> None:
    tokens = [7] * 300_000
    tokens[place] = 4096
    reply = alone.post("/detokenize", {"tokens": tokens})
    assert reply.status == 400
    assert f"received 4096 at place {place}" in reply.error["message"]


@pytest.mark.parametrize("wrong", [2**31, -(2**31) - 1, 2**62])
def test_an_id_beyond_31_bits_is_refused_by_name(alone: Client, wrong: int) -> None:
    reply = alone.post("/v1/completions", {"prompt": [1, wrong]})
    assert reply.status == 400
    assert str(wrong) in reply.error["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (TINY_LISTS, "may hold 2048"),
        (b'{"prompt":[' + b",".join([b'"a"'] * 4_000_000) + b"]}", "may hold 2048"),
        (b'{"prompt":' + b"[" * 16_000_000, "recursion limit"),
        (b'{"prompt":[' + b",".join([b"7"] * 8_000_000) + b"]}", "8000000 tokens"),
        (b"\xff\x00" * 8_000_000, "not UTF-8"),
        (b" " * 16_000_000, "empty"),
    ],
    ids=["lists", "strings", "nesting", "ids", "garbage", "spaces"],
)
def test_a_large_wrong_body_is_refused_as_a_small_one_is(alone: Client, body: bytes, words: str) -> None:
    reply = alone.post("/v1/completions", body)
    assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")
    assert words in reply.error["message"]


def test_a_text_that_cannot_fit_is_refused_unread_with_both_numbers(alone: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[str] = []
    monkeypatch.setattr(alone.replica._workers, "observe", lambda job, *_: jobs.append(job))
    reply = alone.complete(ENDLESS)
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    most = alone.replica.card.max_length * alone.replica.tokenizer.longest_token_bytes
    assert f"{len(ENDLESS)} bytes" in reply.error["message"]
    assert str(most) in reply.error["message"]
    assert jobs == ["read"]


def test_the_first_text_that_is_too_long_ends_the_reading(alone: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[str] = []
    monkeypatch.setattr(alone.replica._workers, "observe", lambda job, *_: jobs.append(job))
    assert alone.complete([LONG] * 8).error["code"] == "context_length_exceeded"
    assert jobs == ["read", "encode"]


def test_a_large_body_keeps_the_loop_for_a_fraction_of_its_reading(alone: Client) -> None:
    """Both are measured here and now, so that a busy machine slows both."""
    start = time.perf_counter()
    with pytest.raises(Exception, match="2048"):
        worker.read(alone.replica.tokenizer, TINY_LISTS, worker_kind())
    here = time.perf_counter() - start
    lags = []
    for _ in range(3):
        with ThreadPoolExecutor(1) as callers:
            call = callers.submit(alone.post, "/v1/completions", TINY_LISTS)
            lags.append(longest_turn(alone, call))
    assert min(lags) < here / 3


def worker_kind() -> Any:
    from service.http.drawn_schemas import CompletionBody

    return CompletionBody


def longest_turn(client: Client, call: Any) -> float:
    """Longest time in which the service's event loop did not answer, until the call is over."""
    longest = 0.0
    while not call.done():
        start = time.perf_counter()
        client.get("/health")
        longest = max(longest, time.perf_counter() - start)
    return longest


def test_a_reading_that_outlasts_its_deadline_is_a_408_and_ends(alone: Client) -> None:
    reply = alone.post("/tokenize", {"prompt": ENDLESS}, {"x-longserve-timeout-seconds": "1.5"})
    assert (reply.status, reply.error["code"]) == (408, "deadline_exceeded")
    assert eventually(lambda: is_free(alone), 10)
    assert alone.post("/tokenize", {"prompt": LONG}).status == 200


def test_a_caller_who_leaves_ends_the_reading(alone: Client) -> None:
    raw = json.dumps({"prompt": ENDLESS}).encode()
    with alone.uploaded("/tokenize", raw):
        assert eventually(lambda: not is_free(alone))
    assert eventually(lambda: is_free(alone), 20)
    assert alone.post("/tokenize", {"prompt": LONG}).status == 200


def test_readings_past_the_queue_are_a_429_that_says_when_to_come_back(alone: Client) -> None:
    raw = json.dumps({"prompt": ENDLESS}).encode()
    workers = alone.replica._workers
    with alone.uploaded("/tokenize", raw):
        assert eventually(lambda: workers._idle.empty())
        with alone.uploaded("/tokenize", raw):
            assert eventually(lambda: workers.waiting == 1)
            reply = alone.post("/tokenize", {"prompt": LONG})
            assert (reply.status, reply.error["code"]) == (429, "queue_full")
            assert int(reply.headers["retry-after"]) >= 1
            assert alone.complete("import os").status == 200, "what is short needs no worker"
    assert eventually(lambda: is_free(alone), 20)


def test_a_worker_that_dies_fails_its_own_call_only(alone: Client) -> None:
    with ThreadPoolExecutor(1) as callers:
        call = callers.submit(alone.post, "/tokenize", {"prompt": ENDLESS})
        assert eventually(lambda: not is_free(alone))
        time.sleep(0.5)
        os.kill(pid_of(alone), signal.SIGKILL)
        assert (call.result().status, call.result().error["code"]) == (500, "internal_error")
    assert alone.post("/tokenize", {"prompt": LONG}).status == 200


def test_the_workers_end_with_the_service() -> None:
    config = ServiceConfig(threads=1, http=HttpConfig(workers=1))
    with listening_in_thread(config, UserConfig()) as (url, replica):
        pid = pid_of(Client(url, replica))
        assert os.path.exists(f"/proc/{pid}")
    assert not os.path.exists(f"/proc/{pid}")


async def test_large_jobs_leave_a_worker_to_small_ones() -> None:
    workers = Workers(str(EMBEDDED), count=2, max_waiting=8)
    large = [asyncio.create_task(workers.run(2**24, worker.encode, ENDLESS[: 2**22], False)) for _ in range(2)]
    try:
        await workers.start()
        assert await workers.run(1, worker.encode, "import os", False)
        assert not any(each.done() for each in large)
    finally:
        await workers.stop()
        assert {type(each) for each in await asyncio.gather(*large, return_exceptions=True)} <= {WorkerFailed}


async def test_a_worker_that_dies_with_its_job_unread_is_a_worker_that_failed() -> None:
    workers = Workers(str(EMBEDDED), count=1, max_waiting=1)
    await workers.start()
    (only,) = workers._workers
    assert only._process is not None
    os.kill(only._process.pid, signal.SIGSTOP)
    job = asyncio.create_task(workers.run(1, worker.encode, "import os", False))
    while not (line := only._line) or not unsent(line):
        await asyncio.sleep(0.01)
    only.end()
    with pytest.raises(WorkerFailed, match="in the middle of a job"):
        await job
    assert await workers.run(1, worker.encode, "import os", False)
    await workers.stop()


def unsent(line: socket.socket) -> int:
    """Bytes on a local socket that its other end has not read."""
    return int.from_bytes(fcntl.ioctl(line, termios.TIOCOUTQ, bytes(4)), "little")


async def test_a_job_may_come_while_its_worker_starts() -> None:
    workers = Workers(str(EMBEDDED), count=1, max_waiting=1)
    starting = asyncio.create_task(workers.start())
    await asyncio.sleep(0)
    assert await workers.run(1, worker.encode, "import os", False)
    await starting
    await workers.stop()


async def test_a_job_that_is_given_up_in_the_queue_leaves_it() -> None:
    workers = Workers(str(EMBEDDED), count=1, max_waiting=1)
    running = asyncio.create_task(workers.run(1, worker.encode, ENDLESS, False))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(workers.run(1, worker.encode, "a", False))
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await workers.run(1, worker.encode, "a", False)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert workers.waiting == 0
    await workers.stop()
    assert isinstance((await asyncio.gather(running, return_exceptions=True))[0], WorkerFailed)
