"""What a replica shares with others, asked of a running service: HTTP's part of a call, of a token, and the neighbours'.

Sends the mix's own calls, some one at a time and some at once. For a service that has nothing else to do.
"""

from __future__ import annotations

import http.client
import json
import math
import random
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from service.asking import Refused
from service.capacity.mix import Lengths, Mix
from service.capacity.site import Surroundings
from service.routing import TOLD_SECONDS

Info = dict[str, Any]
REPEATS = 5
ALONE = 24  # calls of the mix, one at a time: they teach the replicas how long their steps take
FORGOTTEN = 2.5 * TOLD_SECONDS  # the router knows no more of a call that has ended
STREAMS, STREAMED = 8, 64  # at once, tokens each
SECONDS = 600.0


class Sender:
    """Sends calls of token ids to a service, one at a time."""

    def __init__(self, url: str, headers: Mapping[str, str], backend: str | None, ids: int) -> None:
        """`ids`: tokens below it are drawn."""
        parts = urlsplit(url)
        self._make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._path = parts.netloc, parts.path.rstrip("/")
        self._headers = {"content-type": "application/json", **headers}
        self._backend, self._ids = backend, ids

    def send(self, lengths: Lengths, stream: bool = False) -> tuple[float, float]:
        """Seconds of a call for its caller, and what of it was not the engine's by its receipt (all of a stream's).

        Raises:
            Refused: it was answered otherwise than by 200.
        """
        prompt = random.choices(range(1, self._ids), k=lengths.prompt)
        asked = {"attention": self._backend} if self._backend else {}
        body = {"prompt": prompt, "max_tokens": lengths.answer, "ignore_eos": True, "stream": stream, **asked}
        connection, raw = self._make(self._host, timeout=SECONDS), json.dumps(body)
        begun = time.perf_counter()
        connection.request("POST", f"{self._path}/v1/completions", raw, self._headers)
        response = connection.getresponse()
        told = response.read()
        seconds = time.perf_counter() - begun
        connection.close()
        if response.status != 200:
            raise Refused(f"a call of {lengths} was answered {response.status}: {told[:300].decode(errors='replace')}")
        return seconds, seconds if stream else seconds - sum(json.loads(told)["longserve"][phase] for phase in PHASES)


PHASES = ("queue_seconds", "prefill_seconds", "decode_seconds")  # of a receipt, in the engine


def probe(caller: Sender, mix: Mix, neighbours: int, cpus: int) -> Surroundings:
    """What HTTP and neighbours cost. `neighbours`: replicas on one machine, itself counted; `cpus`: that they keep busy."""
    call = median(around for _, around in (caller.send(lengths) for lengths in mix.draw(ALONE, 0)))
    small = Lengths(1, STREAMED)
    whole, streamed = (median(_at_once(STREAMS, lambda flag=flag: caller.send(small, flag))) for flag in (False, True))  # type: ignore[misc]
    token = max(0.0, streamed - whole) * cpus / (STREAMS * STREAMED)
    longest = Lengths(max(lengths.prompt for lengths, _ in mix.weights), 1)
    crowding = 1.0
    if neighbours > 1:
        alone, beside = (min(_at_once(count, lambda: caller.send(longest), FORGOTTEN)) for count in (1, neighbours))
        crowding = max(1.0, (beside - call) / (alone - call))  # the least: of calls that did not share a replica
    return Surroundings(max(0.0, call), token, crowding)


def _at_once(count: int, call: Callable[[], object], rest: float = 0.1) -> list[float]:
    """Seconds until so many calls are answered that are sent side by side, several times with a rest between."""
    seconds = []
    with ThreadPoolExecutor(count) as callers:
        for _ in range(REPEATS):
            begun = time.perf_counter()
            for each in [callers.submit(call) for _ in range(count)]:
                each.result()
            seconds.append(time.perf_counter() - begun)
            time.sleep(rest)
    return seconds


def together(infos: list[Info]) -> Info:
    """What several replicas tell, as one: how long their steps lately took is the geometric mean of theirs."""
    first = infos[0]
    backends = {}
    for name, law in first["laws"]["backends"].items():
        told = [each["laws"]["backends"][name]["drift"] for each in infos]
        kinds = {kind for each in told for kind in each}
        logs = {kind: [math.log(each[kind]) for each in told if kind in each] for kind in kinds}
        backends[name] = {**law, "drift": {kind: math.exp(sum(each) / len(each)) for kind, each in logs.items()}}
    return {**first, "laws": {**first["laws"], "backends": backends}}
