"""The service over HTTP, Ray with its Python proxy and all, beside the engine alone and the bare model."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from service.benchmark.alone import one_token_seconds
from service.benchmark.bare import BACKENDS, bare, build, report
from service.model.checkpoint import load
from service.threads import in_passing_thread


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(environment: Mapping[str, str] | None = None) -> Iterator[int]:
    """The port of a whole service, Ray with its Python proxy unless the environment says otherwise, in processes of its own."""
    port = free_port()
    user = {"attention": {"default": "dense", "backends": BACKENDS}}
    application = {
        "args": {},
        "deployments": [{"name": "longserve", "ray_actor_options": {"num_cpus": 1}, "user_config": user}],
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "serve.yaml"
        file.write_text(yaml.safe_dump({"http_options": {"port": port}, "applications": [application]}))
        command = [sys.executable, "-m", "service.cli", "serve", str(file)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | dict(environment or {}))
        try:
            _wait_ready(port, process)
            yield port
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)


def _wait_ready(port: int, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, f"the service ended with status {process.returncode}"
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"the service was not ready within {seconds} s")


def ask(connection: http.client.HTTPConnection, tokens: int, answer: int, name: str) -> float:
    """Seconds of a completion over HTTP."""
    prompt = random.choices(range(1, 4000), k=tokens)
    body = json.dumps({"prompt": prompt, "max_tokens": answer, "temperature": 0, "attention": name, "ignore_eos": True})
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    response = connection.getresponse()
    told = response.read()
    assert response.status == 200, told[:500]
    return time.perf_counter() - start


def measure_http(lengths: Sequence[int], repeats: int) -> dict[str, Any]:
    model, alone = in_passing_thread(load).model, asyncio.run(one_token_seconds())
    found: dict[str, Any] = {}
    with serving() as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        over = median([ask(connection, 1, 1, "dense") for _ in range(120)][20:])
        overhead = (over - alone) * 1e3
        report("HTTP through Ray, one token, over the engine alone", "dense", f"{overhead:.2f} ms")
        for name in BACKENDS:
            for tokens in lengths:
                pairs = [
                    (bare(model, build(model, name), tokens)[0], ask(connection, tokens - 1, 1, name))
                    for _ in range(repeats + 1)
                ][1:]
                ratio = median(a for a, _ in pairs) / median(b for _, b in pairs)
                found.setdefault(str(tokens), {})[name] = round(ratio, 3)
                report(f"HTTP, prefill of {tokens} tokens over the bare model", name, f"{ratio:.2f}")
    return {"overhead_ms": round(overhead, 2), "prefill_ratio": found}
