"""Storms over a real socket: callers that hang up by the hundred, switches by the dozen. Afterwards all is as it was."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

from service.config import AttentionConfig, EngineConfig, ServiceConfig, UserConfig
from service.machine import resident_bytes, trim
from service.plain import listening, listening_in_thread
from service.replica import Replica
from tests.http.client import Client, eventually

BACKENDS = ("dense", "sliding_window", "performer")
USER = UserConfig(attention=AttentionConfig(default="dense", backends={name: {} for name in BACKENDS}))


class Holdings(NamedTuple):
    """What a process holds for its callers when nobody calls."""

    files: int  # sockets among them
    pool_bytes: int
    pool_slots: int
    reserved_bytes: int
    waiting: int


def holdings(replica: Replica) -> Holdings:
    now = replica.engine.snapshot()
    files = len(os.listdir("/proc/self/fd"))
    return Holdings(files, sum(now.pool_bytes.values()), sum(now.pool_slots.values()), now.bytes_in_use, now.waiting)


def calm(replica: Replica, before: Holdings) -> int:
    """Wait until a replica holds no more than it held before; its resident bytes then."""
    assert eventually(lambda: all(now <= then for now, then in zip(holdings(replica), before, strict=True))), holdings(replica)
    gc.collect()
    trim()
    return resident_bytes()


def hang_up(service: Client, seed: int) -> None:
    """A caller that leaves: at once, while it waits, after a few events, or at the end."""
    source = random.Random(seed)
    prompt = [source.randrange(1, 4000) for _ in range(source.choice((3, 200, 1500)))]
    body = {"prompt": prompt, "max_tokens": 60, "stream": True, "ignore_eos": True, "attention": source.choice(BACKENDS)}
    wishes = {"n": source.choice((1, 2)), "logprobs": source.choice((None, 3)), "echo": source.random() < 0.3}
    read = source.choice((0, 1, 2000, 10**9))
    with service.half_read(body | wishes, 0) as line:
        while read > 0 and (got := line.recv(min(read, 65536))):
            read -= len(got)
            if got.endswith(b"[DONE]\n\n") or b"\r\n0\r\n\r\n" in got:
                break


def storm(service: Client, call: Callable[[int], None], count: int) -> None:
    with ThreadPoolExecutor(24) as callers:
        for _ in callers.map(call, range(count)):
            pass


async def switched(service: Client, seed: int) -> None:
    """A change of the allow-list, and an answer beside it."""
    target = {
        "default": BACKENDS[seed % 3],
        "backends": {"dense": {}, "sliding_window": {"window": 64 + seed % 5}, "performer": {"features": 64 + 64 * (seed % 2)}},
    }
    service.replica.retarget({"attention": target})
    reply = await asyncio.to_thread(service.complete, "import os", max_tokens=8, attention=BACKENDS[seed % 3])
    assert reply.status == 200, reply.text
    await asyncio.to_thread(eventually, lambda: not service.replica.readiness()["switching"])
    assert service.replica.readiness()["degraded"] is None


@pytest.mark.slow
def test_after_a_storm_of_callers_that_hang_up_everything_is_given_back() -> None:
    config = ServiceConfig(threads=1, engine=EngineConfig(memory_budget_bytes=2**28))
    with listening_in_thread(config, USER) as (url, replica):
        service = Client(url, replica)
        service.complete("import os")
        before, resident = holdings(replica), []
        for _ in range(3):  # the first brings threads and caches to their size
            storm(service, lambda seed: hang_up(service, seed), 80)
            resident.append(calm(replica, before))
        assert service.complete("import os").status == 200
    assert resident[2] <= 1.02 * resident[1], resident


@pytest.mark.slow
async def test_after_a_storm_of_switches_everything_is_given_back_and_no_answer_is_lost() -> None:
    replica = Replica(ServiceConfig(threads=1, engine=EngineConfig(memory_budget_bytes=2**28)))
    async with listening(replica, USER) as url:
        service = Client(url, replica)
        await switched(service, 0)
        before, resident = holdings(replica), []
        for _ in range(3):
            for seed in range(1, 25):
                await switched(service, seed)
            resident.append(await asyncio.to_thread(calm, replica, before))
    assert resident[2] <= 1.02 * resident[1], resident
