"""A service under mixed traffic for minutes: nothing is lost, nothing grows. `python -m tests.soak --minutes 10`.

Starts `longserve serve` with two replicas, measures what it can take of the mixture, and sends four fifths of that, open loop:
short and long completions, streams, embeddings, callers who hang up, requests that are the caller's fault. Meanwhile the switch
is thrown every half minute, and one replica is killed. At the end SIGTERM, with streams under way. Exit status 1 when a request
was lost (neither answered nor refused, and not broken by the killed replica), when a caller's fault got a 5xx, when a process
kept growing, when something is still held after all has been answered, or when the end was not a clean one.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.serving import Service, are_gone, descendants, serving, sockets, switch_of

CONCURRENCY = 8  # callers at a time while the capacity is measured
CAPACITY_SECONDS = 20.0
LOAD = 0.8  # of the capacity
SWITCH_SECONDS = 30.0
KILL_AT = 0.2  # of the run: a replica dies
BASE_AT = 0.6  # of the run: the sizes are taken that those at the end are compared to. A replica takes minutes to reach its own
SUCCESSOR_SECONDS = 180.0
QUIET_SECONDS = 60.0  # in which all that was sent must have been answered before sizes are taken
TIMEOUT_SECONDS = 120.0
DRAINED_STREAMS = 4
ENDED_SECONDS = 60.0
GROWTH_BYTES, GROWTH_RATIO = 32 << 20, 0.1  # of a process's resident memory, whichever is more
GROWTH_DESCRIPTORS = 16
BACKENDS = ("dense", "sliding_window", "performer")
LONG_TEXT = inspect.getsource(argparse)[:20_000]
NO_ANSWER = (aiohttp.ClientError, ConnectionError, asyncio.TimeoutError)


@dataclass
class Tally:
    """What became of the requests: by kind and outcome."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    outage: tuple[float, float] = (float("inf"), float("inf"))  # from a replica's death until its successor serves

    def note(self, kind: str, outcome: str, sent: float) -> None:
        """Count an outcome. Those that begin with `broken` are lost unless the request met the outage."""
        died, restored = self.outage
        if outcome.startswith("broken"):
            if sent <= restored and time.monotonic() >= died:
                outcome = "broken by the kill"
            else:
                self.lost.append(f"{kind}: {outcome}")
        self.outcomes[kind, outcome] += 1


class Caller:
    """Sends the mixture."""

    def __init__(self, url: str, session: aiohttp.ClientSession, tally: Tally, seed: int) -> None:
        self._url = url
        self._session = session
        self._tally = tally
        self._random = random.Random(seed)
        self._kinds: dict[str, tuple[float, Callable[[], Awaitable[str]]]] = {
            "completion": (40, self._complete),
            "stream": (20, self._stream),
            "embedding": (15, self._embed),
            "long completion": (5, self._complete_long),
            "hangs up": (10, self._hang_up),
            "caller's fault": (10, self._err),
        }

    async def send(self) -> None:
        """Send one request of the mixture and note what becomes of it."""
        (kind,) = self._random.choices(list(self._kinds), [weight for weight, _ in self._kinds.values()])
        sent = time.monotonic()
        try:
            outcome = await self._kinds[kind][1]()
        except NO_ANSWER as error:
            outcome = f"broken: {type(error).__name__}"
        self._tally.note(kind, outcome, sent)

    def _body(self, prompt: str, tokens: int, **fields: Any) -> dict[str, Any]:
        return {"prompt": prompt, "max_tokens": tokens, "attention": self._random.choice(BACKENDS), **fields}

    async def _complete(self) -> str:
        return await self._post("/v1/completions", self._body("import os", self._random.randint(1, 32)))

    async def _complete_long(self) -> str:
        return await self._post("/v1/completions", self._body(LONG_TEXT[: self._random.randint(4_000, 20_000)], 8))

    async def _embed(self) -> str:
        body = {"input": [LONG_TEXT[: self._random.randint(10, 2_000)]], "attention": self._random.choice(BACKENDS)}
        return await self._post("/v1/embeddings", body)

    async def _err(self) -> str:
        path, body, wanted = self._random.choice(
            [
                ("/v1/completions", {"prompt": ""}, 400),
                ("/v1/completions", {"prompt": "a", "attention": "nowhere"}, 400),
                ("/v1/completions", {"prompt": [7] * 40_000}, 400),
                ("/v1/completions", {"prompt": "a", "model": "unknown"}, 404),
                ("/v1/embeddings", {"input": 7}, 400),
                ("/nowhere", {}, 404),
            ]
        )
        async with self._session.post(self._url + path, json=body) as answer:
            await answer.read()
            if answer.status in (wanted, 429, 503):
                return f"status {answer.status}"
            return f"broken: status {answer.status} for {json.dumps(body)[:60]}"

    async def _post(self, path: str, body: Any) -> str:
        async with self._session.post(self._url + path, json=body) as answer:
            text = await answer.text()
            return judged(answer.status, text)

    async def _stream(self) -> str:
        return await stream(self._session, self._url, self._body("import os", self._random.randint(1, 64), stream=True))

    async def _hang_up(self) -> str:
        body = self._body("import os", 2_000, stream=True, ignore_eos=True)
        async with self._session.post(f"{self._url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                return judged(answer.status, await answer.text())
            await answer.content.read(self._random.randint(1, 2_000))
            answer.close()
        return "left"


def judged(status: int, text: str) -> str:
    """The outcome of a whole answer. Refused is who is told so with an error that a client can read."""
    if status == 200:
        return "status 200"
    if status in (429, 503) and '"error"' in text:
        return f"status {status}"
    return f"broken: status {status}: {text[:80]}"


async def stream(session: aiohttp.ClientSession, url: str, body: Any) -> str:
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        text = await answer.text()
        if answer.status == 200 and not text.rstrip().endswith("[DONE]"):
            return f"broken: a stream that ends in {text[-80:]!r}"
        return judged(answer.status, text)


@dataclass(frozen=True)
class Size:
    """What a process takes."""

    name: str
    resident: int
    descriptors: int
    sockets: int


def sizes(pids: set[int]) -> dict[int, Size]:
    found = {}
    for pid in pids:
        with suppress(OSError):  # one that has ended meanwhile takes nothing
            resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            name = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
            found[pid] = Size(short(name), resident, len(os.listdir(f"/proc/{pid}/fd")), len(sockets(pid)))
    return found


def short(command: str) -> str:
    """A process's name: Ray's own, else the program with its script."""
    return command if command.startswith("ray::") else " ".join(Path(word).name for word in command.split()[:3])[:32]


class Soak:
    """One run on one service."""

    def __init__(self, service: Service, session: aiohttp.ClientSession, seconds: float, seed: int) -> None:
        self._service = service
        self._session = session
        self._seconds = seconds
        self._random = random.Random(seed)
        self.tally = Tally()
        self._caller = Caller(service.url, session, self.tally, seed)
        self._switches = Counter[str]()
        self._sent: set[asyncio.Task[None]] = set()
        self.faults: list[str] = []

    async def run(self) -> None:
        """The whole run; what went wrong is in `faults` after it."""
        rate = LOAD * await self._capacity()
        print(f"sending {rate:.1f} requests/s, {LOAD:.0%} of what it takes, for {self._seconds:.0f} s", flush=True)
        await self._send(rate, self._seconds * KILL_AT)
        killing = asyncio.create_task(self._kill())
        await self._send(rate, self._seconds * (BASE_AT - KILL_AT))
        await killing
        before = await self._quiet_sizes()
        await self._send(rate, self._seconds * (1 - BASE_AT))
        after = await self._quiet_sizes()
        self._compare(before, after)
        await self._end()
        self._report()

    async def _capacity(self) -> float:
        """Requests of the mixture that it answers in a second."""
        until, done = time.monotonic() + CAPACITY_SECONDS, 0

        async def call() -> None:
            nonlocal done
            while time.monotonic() < until:
                await self._caller.send()
                done += 1

        await asyncio.gather(*(call() for _ in range(CONCURRENCY)))
        return done / CAPACITY_SECONDS

    async def _send(self, rate: float, seconds: float) -> None:
        """Send at random times, whatever becomes of what was sent before; throw the switch meanwhile."""
        until = time.monotonic() + seconds
        switching = asyncio.create_task(self._switch(until))
        due = time.monotonic()
        while (due := due + self._random.expovariate(rate)) < until:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(self._caller.send())
            self._sent.add(task)
            task.add_done_callback(self._sent.discard)
        await switching

    async def _switch(self, until: float) -> None:
        while time.monotonic() + SWITCH_SECONDS < until:
            await asyncio.sleep(SWITCH_SECONDS)
            default = self._random.choice(BACKENDS)
            self._service.rewrite(lambda data, default=default: switch_of(data).update(default=default))
            applied = await asyncio.to_thread(self._service.apply)
            self._switches["ok" if applied.returncode == 0 else "failed"] += 1
            self._tell_growth()
            if applied.returncode:
                self.faults.append(f"a switch failed: {applied.stderr.strip()[-200:]}")

    def _tell_growth(self) -> None:
        """The replicas' resident memory by now: a series that ends flat is no leak."""
        found = sizes(descendants(self._service.process.pid))
        told = ", ".join(f"{pid} {size.resident / 2**20:.0f}" for pid, size in found.items() if "ServeReplica" in size.name)
        print(f"{len(self._sent)} requests under way; replicas' MiB: {told}", flush=True)

    async def _kill(self) -> None:
        """Kill one replica, and wait until it has a successor."""
        victim, number = self._random.choice(sorted(self._replicas())), len(self._replicas())
        died = time.monotonic()
        self.tally.outage = (died, float("inf"))
        os.kill(victim, signal.SIGKILL)
        while not await asyncio.to_thread(self._are_serving, number, victim):
            await asyncio.sleep(1)
            if time.monotonic() - died > SUCCESSOR_SECONDS:
                self.faults.append(f"a killed replica has no successor after {SUCCESSOR_SECONDS:.0f} s")
                break
        self.tally.outage = (died, time.monotonic())
        print(f"killed replica {victim}; its successor serves after {time.monotonic() - died:.0f} s", flush=True)

    def _replicas(self) -> set[int]:
        found = sizes(descendants(self._service.process.pid))
        return {pid for pid, size in found.items() if "ServeReplica" in size.name}

    def _are_serving(self, number: int, victim: int) -> bool:
        """Whether so many replicas answer a scrape, the victim not among them."""
        try:
            answering = len(self._service.metric("longserve_process_start_time_seconds"))
        except (OSError, ValueError):  # the one that was asked died under the question
            return False
        return answering == number == len(self._replicas() - {victim})

    async def _quiet_sizes(self) -> dict[int, Size]:
        """The processes' sizes once all that was sent is answered and nothing is held for it."""
        if self._sent:
            await asyncio.wait(self._sent, timeout=QUIET_SECONDS)
        held = -1.0
        for _ in range(int(QUIET_SECONDS)):
            held = await asyncio.to_thread(self._held)
            if held == 0 and not self._sent:
                await asyncio.sleep(2)  # longer than the engine's rest, after which it gives free memory back
                break
            await asyncio.sleep(1)
        else:
            self.faults.append(
                f"after {QUIET_SECONDS:.0f} s of rest {len(self._sent)} requests unanswered, {held:.0f} bytes held"
            )
        return sizes({self._service.process.pid, *descendants(self._service.process.pid)})

    def _held(self) -> float:
        """Bytes that the replicas hold for requests, and requests that run."""
        names = ("longserve_memory_reserved_bytes", "longserve_state_bytes", "longserve_requests_running")
        return sum(sum(self._service.metric(name)) for name in names)

    def _compare(self, before: dict[int, Size], after: dict[int, Size]) -> None:
        print(f"\n{'process':<34}{'MiB':>8}{'grown':>8}{'descriptors':>13}{'grown':>7}{'sockets':>9}{'grown':>7}")
        for pid, now in sorted(after.items()):
            then = before.get(pid, now)
            grown, more, talks = now.resident - then.resident, now.descriptors - then.descriptors, now.sockets - then.sockets
            print(
                f"{now.name:<34}{now.resident / 2**20:>8.0f}{grown / 2**20:>+8.1f}"
                f"{now.descriptors:>13}{more:>+7}{now.sockets:>9}{talks:>+7}"
            )
            if grown > max(GROWTH_BYTES, GROWTH_RATIO * then.resident):
                self.faults.append(f"{now.name} has grown by {grown / 2**20:.0f} MiB")
            if max(more, talks) > GROWTH_DESCRIPTORS:
                self.faults.append(f"{now.name} has {more} descriptors and {talks} sockets more")

    async def _end(self) -> None:
        """SIGTERM to the group while streams run: they end whole, and the service in order."""
        process, below = self._service.process, descendants(self._service.process.pid)
        body = {"prompt": "import os", "max_tokens": 1_000, "stream": True, "ignore_eos": True}
        streams = [asyncio.create_task(stream(self._session, self._service.url, body)) for _ in range(DRAINED_STREAMS)]
        await asyncio.sleep(0.5)
        began = time.monotonic()
        os.killpg(process.pid, signal.SIGTERM)
        outcomes = await asyncio.gather(*streams, return_exceptions=True)
        try:
            code = await asyncio.to_thread(process.wait, ENDED_SECONDS)
        except Exception as error:
            self.faults.append(f"it has not ended: {error}")
            return
        print(f"\nended with status {code} {time.monotonic() - began:.1f} s after SIGTERM; streams under way: {outcomes}")
        if code != 0 or outcomes != ["status 200"] * DRAINED_STREAMS or not are_gone(below):
            self.faults.append("the end was not a clean one")

    def _report(self) -> None:
        print(f"\n{'request':<18}{'outcome':<40}{'number':>8}")
        for (kind, outcome), number in sorted(self.tally.outcomes.items()):
            print(f"{kind:<18}{outcome[:40]:<40}{number:>8}")
        print(f"sent {sum(self.tally.outcomes.values())}, lost {len(self.tally.lost)}, switches {dict(self._switches)}")
        self.faults += [f"lost: {each}" for each in self.tally.lost[:20]]


async def soak(service: Service, seconds: float, seed: int) -> list[str]:
    """Run on a service; returns what went wrong."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=1)  # idle ones are gone when sizes are taken
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        run = Soak(service, session, seconds, seed)
        await run.run()
        return run.faults


def two_replicas(data: Any) -> None:
    data["applications"][0]["deployments"][0]["num_replicas"] = 2
    data["applications"][0]["args"]["engine"]["prefix_share"] = 0.002  # full before sizes are looked at: it is no growth


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=10, help="how long traffic is sent")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "soak.yaml", two_replicas) as service:
        faults = asyncio.run(soak(service, options.minutes * 60, options.seed))
    print("\n".join(faults) or "all is well")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
