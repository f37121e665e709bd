"""python -m service.engine.benchmark: the bare model, then the engine alone, then the service over HTTP, in one run.

What the engine is compared with is the bare model: the same chunks through `Transformer.hidden` with nothing around them,
measured in turn with it. Prints a table for people, the machine beneath, and one last line of JSON for programs. About five
minutes on two cores; `--quick` leaves out 32k tokens and HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import itertools
import json
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import aclosing, contextmanager
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

import attention
from attention import AttentionBackend, Segments
from service.config import EngineConfig
from service.engine.engine import Backends, Engine
from service.engine.memory import BESIDE_BUDGET_BYTES
from service.engine.request import Delta, ModelFailed, Request, RequestError, Sampling
from service.machine import Place, dealt_cpus, in_passing_thread
from service.model import families
from service.model.checkpoint import EMBEDDED, Checkpoint, choose_dtype, load
from service.model.transformer import Transformer

PARTS = ("bare", "engine", "memory", "http")
BACKENDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "sliding_window": {"window": 512, "sinks": 4},
    "performer": {"features": 256},
}
CHUNK = 512  # of the bare model's prefill
STEPS = 20  # timed decode steps of the bare model
SHORT = (200, 16)  # tokens in and out of a short request
MEMORY_BUDGET = 32 * 2**20  # of the memory trial: a quarter of what 32k tokens hold under dense


def report(what: str, name: str, told: str) -> None:
    """One line of the table: what was measured, under which backend, and how it came out."""
    print(f"{what:60s} {name:15s} {told}", flush=True)


# ---- the bare model -------------------------------------------------------------------------------------------------


def bare_model(groups: int) -> Transformer:
    """The shape of the embedded model with random weights and a number of key-value heads."""
    config = json.loads((EMBEDDED / "config.json").read_text()) | {"num_key_value_heads": groups}
    torch.manual_seed(0)
    dtype, _ = choose_dtype("auto", "cpu")
    model = Transformer(families.read(config)).to(dtype).requires_grad_(False).eval()
    model.pack()
    return model


def build(model: Transformer, name: str) -> AttentionBackend:
    return attention.build(name, BACKENDS[name], model.head_shape())


@torch.inference_mode()
def bare(model: Transformer, backend: AttentionBackend, tokens: int, steps: int = 0) -> tuple[float, float]:
    """Seconds of a prefill in chunks, and of the median decode step behind it."""
    pool = backend.new_pool(model.config.num_hidden_layers, 2**62)
    slot = pool.allocate(tokens + steps)

    def extend(ids: torch.Tensor, start: int) -> torch.Tensor:
        segments = Segments((len(ids),), (start,))
        positions = torch.arange(start, start + len(ids))
        return model.hidden(ids, positions, lambda layer, q, k, v: backend.extend(q, k, v, segments, pool, layer, (slot,)))

    def decode(place: int) -> float:
        return _seconds(lambda: model.logits(extend(ids[:1], place)).argmax(-1).item())

    ids = torch.randint(model.config.vocab_size, (tokens,))
    prefill = _seconds(lambda: [extend(ids[a : a + CHUNK], a) for a in range(0, tokens, CHUNK)])
    times = [decode(tokens + i) for i in range(steps)]
    return prefill, median(times[1:]) if steps else 0.0


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_bare(lengths: Sequence[int]) -> None:
    """Prefill and decode of the bare model, for two numbers of key-value heads."""
    for groups in (2, 4):
        model = bare_model(groups)
        for name in BACKENDS:
            backend = build(model, name)
            for tokens in lengths:
                tokens = min(tokens, model.config.max_length - STEPS)
                bare(model, backend, tokens)  # compiles the kernels of these shapes
                prefill, step = bare(model, backend, tokens, steps=STEPS)
                told = f"{tokens / prefill:8.0f} tokens/s, decode step {step * 1e3:.2f} ms"
                report(f"bare model, {groups} kv heads, {tokens} tokens", name, told)


# ---- the engine alone -----------------------------------------------------------------------------------------------


def make_engine(checkpoint: Checkpoint, **config: Any) -> Engine:
    backends = in_passing_thread(lambda: {name: build(checkpoint.model, name) for name in BACKENDS})
    settings = EngineConfig(**config)
    return Engine(checkpoint.model, checkpoint.tokenizer, Backends(backends, "dense"), settings, cpus=dealt_cpus(Place()))


def make_request(tokens: int, answer: int, backend: str) -> Request:
    sampling = Sampling(max_tokens=answer, temperature=0.0, ignore_eos=True)
    return Request("benchmark", "completion", random.choices(range(1, 4000), k=tokens), backend, sampling)


async def answered(engine: Engine, request: Request) -> Request:
    """The request, after its answer; a refusal or failure passes through."""
    async with aclosing(engine.submit(request)) as answer:
        async for _ in answer:
            pass
    return request


async def token_times(engine: Engine, request: Request) -> list[float]:
    """When each token of the answer came, in time.monotonic() seconds."""
    times = []
    async for delta in engine.submit(request):
        assert isinstance(delta, Delta)
        times += [time.monotonic()] * len(delta.tokens)
    return times


async def prefill_ratio(engine: Engine, model: Transformer, name: str, tokens: int, repeats: int) -> float:
    """Throughput of the engine's prefill in parts of the bare model's, measured in turn.

    The first pair is left out: the matrix library compiles a kernel for each new shape, and a prefill has many.
    """
    ours, theirs = [], []
    for _ in range(repeats + 1):
        theirs.append(await engine._on_model_thread(lambda: bare(model, build(model, name), tokens)[0]))
        ours.append(await _timed(answered(engine, make_request(tokens - 1, 1, name))))
    return median(theirs[1:]) / median(ours[1:])


async def _timed(work: Any) -> float:
    start = time.perf_counter()
    await work
    return time.perf_counter() - start


async def decode_speedup(engine: Engine, name: str, together: int = 32, answer: int = 300) -> float:
    """Tokens a second of many concurrent decodes over those of one, each measured behind a run that compiled its kernels.

    Counted while all of them run: from the end of the last prefill to the end of the first answer.
    """

    async def rate(count: int) -> float:
        requests = [make_request(SHORT[0], answer, name) for _ in range(count)]
        times = await asyncio.gather(*(token_times(engine, request) for request in requests))
        begin = max(request.timings.prefilled_at or 0.0 for request in requests)
        end = min(own[-1] for own in times)
        return sum(begin < at <= end for own in times for at in own) / (end - begin)

    found = [[await rate(count) for _ in range(2)][-1] for count in (together, 1)]
    return found[0] / found[1]


@contextmanager
def pressed(engine: Engine, name: str, tokens: int) -> Iterator[None]:
    """Prompts of so many tokens are prefilled, one behind the other, for as long as the block lasts."""

    async def press() -> None:
        while True:
            await answered(engine, make_request(tokens - 1, 1, name))

    task = asyncio.ensure_future(press())
    try:
        yield
    finally:
        task.cancel()


async def short_p95(engine: Engine, name: str, count: int) -> float:
    return _p95([await _timed(answered(engine, make_request(*SHORT, name))) for _ in range(count)])


async def gap_p95(engine: Engine, name: str, count: int) -> float:
    """p95 of the seconds between the tokens of one running stream."""
    times = await token_times(engine, make_request(SHORT[0], count, name))
    return _p95([b - a for a, b in itertools.pairwise(times)])


def _p95(values: Sequence[float]) -> float:
    return sorted(values)[int(0.95 * (len(values) - 1))]


async def under_pressure(measure: Callable[[], Any], engine: Engine, name: str, tokens: int) -> tuple[float, float]:
    """A measure taken on an idle engine, and while long prompts are prefilled."""
    idle = await measure()
    with pressed(engine, name, tokens):
        await asyncio.sleep(0.2)
        loaded = await measure()
    await _quiet(engine)
    return idle, loaded


async def _quiet(engine: Engine) -> None:
    """Wait until the requests that a cancelled task has left are gone."""
    while engine.snapshot().bytes_in_use:
        await asyncio.sleep(0.01)


async def measure_engine(lengths: Sequence[int], repeats: int) -> dict[str, Any]:
    checkpoint = in_passing_thread(load)
    engine = make_engine(checkpoint)
    await engine.start()
    found: dict[str, Any] = {"prefill_ratio": {}, "decode_speedup_32": {}, "short_p95_ratio": {}, "stream_itl_p95_ratio": {}}
    for name in BACKENDS:
        for tokens in lengths:
            ratio = await prefill_ratio(engine, checkpoint.model, name, tokens, repeats)
            found["prefill_ratio"].setdefault(str(tokens), {})[name] = round(ratio, 3)
            report(f"engine, prefill of {tokens} tokens over the bare model", name, f"{ratio:.2f}")
        speedup = await decode_speedup(engine, name)
        found["decode_speedup_32"][name] = round(speedup, 2)
        report("engine, 32 concurrent decodes over one, tokens/s", name, f"{speedup:.1f}")
        longest = max(lengths)
        for key, what, measure in (
            ("short_p95_ratio", "short requests, p95", lambda name=name: short_p95(engine, name, 40)),
            ("stream_itl_p95_ratio", "time between tokens, p95", lambda name=name: gap_p95(engine, name, 300)),
        ):
            idle, loaded = await under_pressure(measure, engine, name, longest)
            found[key][name] = round(loaded / idle, 2)
            told = f"{idle * 1e3:.1f} ms idle, {loaded * 1e3:.1f} ms beside {longest} tokens of prefill: {loaded / idle:.2f}x"
            report(f"engine, {what}", name, told)
    await engine.stop()
    return found


# ---- memory ---------------------------------------------------------------------------------------------------------


def memory_trial() -> int:
    """Peak bytes of this process over budget, weights and runtime, under requests of up to 4 times the budget at once."""
    return asyncio.run(_memory_trial())


async def _memory_trial() -> int:
    engine = make_engine(in_passing_thread(load), memory_budget_bytes=MEMORY_BUDGET)
    await engine.start()
    for name in BACKENDS:
        await answered(engine, make_request(2 * CHUNK, 2, name))
    before, peak, ended = resident_bytes(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.001):
            peak[0] = max(peak[0], resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    lengths = (100, 1000, 4000, 16_000, 32_000)
    calls = [answered(engine, make_request(n, 8, name)) for n in lengths for name in BACKENDS for _ in range(2)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    ended.set()
    watcher.join()
    failed = [a for a in answers if not isinstance(a, (Request, RequestError)) or isinstance(a, ModelFailed)]
    assert not failed, f"not answered cleanly: {failed}"
    assert engine.snapshot().bytes_in_use == 0
    await engine.stop()
    return peak[0] - before - MEMORY_BUDGET


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# ---- over HTTP ------------------------------------------------------------------------------------------------------


@contextmanager
def serving() -> Iterator[int]:
    """The port of a whole service, Ray with its Python proxy, in processes of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    user = {"attention": {"default": "dense", "backends": BACKENDS}}
    application = {
        "args": {},
        "deployments": [{"name": "longserve", "ray_actor_options": {"num_cpus": 1}, "user_config": user}],
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "serve.yaml"
        file.write_text(yaml.safe_dump({"http_options": {"port": port}, "applications": [application]}))
        command = [sys.executable, "-m", "service.cli", "serve", str(file)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
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


async def one_token_seconds() -> float:
    """Median seconds of a one-token request on the engine alone."""
    engine = make_engine(in_passing_thread(load))
    await engine.start()
    times = [await _timed(answered(engine, make_request(1, 1, "dense"))) for _ in range(100)]
    await engine.stop()
    return median(times[10:])


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


# ---- all of it ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m service.engine.benchmark", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one repeat, up to 16k tokens, by default without HTTP")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="which parts to run")
    options = parser.parse_args()
    lengths = [16_384] if options.quick else [16_384, 32_768]
    repeats = 1 if options.quick else 2
    parts = options.parts or PARTS[: 3 if options.quick else 4]
    random.seed(0)
    result: dict[str, Any] = {"prefill_ratio": {}}
    if "bare" in parts:
        in_passing_thread(lambda: measure_bare([1024, 4096, *lengths]))
    if "engine" in parts:
        found = asyncio.run(measure_engine(lengths, repeats))
        result["prefill_ratio"]["engine"] = found.pop("prefill_ratio")
        result |= found
    if "memory" in parts:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            result["peak_over_budget_bytes"] = fresh.submit(memory_trial).result()
        told = f"{result['peak_over_budget_bytes'] / 2**20:.1f} MiB, {BESIDE_BUDGET_BYTES / 2**20:.0f} are stated"
        report("memory, peak over budget, weights and runtime", "all", told)
    if "http" in parts:
        found = measure_http(lengths, repeats)
        result["prefill_ratio"]["http"] = found["prefill_ratio"]
        result["overhead_ms"] = found["overhead_ms"]
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
