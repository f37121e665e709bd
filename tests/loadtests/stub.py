"""A server with known laws and known faults, on a real socket: what the load tests measure must come out as it was put in.

`Stub.laws` give each backend its latency and its peak bytes by tokens; `Stub.faults` say how the next completions go wrong.
Four characters are a token. Its metrics are those of a Longserve replica, as far as the load tests read them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

Law = Callable[[int], float]
MODEL = "stub"


def nothing(_: int) -> float:
    return 0.0


@dataclass
class Stub:
    """What the stub does; it may be changed while it runs."""

    seconds: dict[str, Law] = field(default_factory=lambda: {"": nothing})  # by backend
    peak_bytes: dict[str, Law] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)  # of the next completions, one each; see `_fault`
    always: str = ""  # the fault of every completion
    has_tokenize: bool = True
    has_usage: bool = True
    named: str = ""  # the backend that answers name, where it is not the one asked for
    receipt: dict[str, Any] = field(default_factory=dict)  # facts put in place of the true ones
    miscounts: int = 0  # requests that the metrics tell beyond those that came
    max_tokens: int | None = 1_000_000
    bodies: list[dict[str, Any]] = field(default_factory=list)
    resident: Callable[[], float] = lambda: 100e6

    site: web.TCPSite | None = None
    transports: set[asyncio.Transport] = field(default_factory=set)  # of every connection that asked for a completion

    def __post_init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.responses = Counter("longserve_http_responses", "", ("route", "method", "status"), registry=registry)
        self.input = Histogram("longserve_input_tokens", "", ("backend",), registry=registry)
        self.output = Histogram("longserve_output_tokens", "", ("backend",), registry=registry)
        self.peaks = Histogram("longserve_forward_peak_bytes", "", ("backend", "kind"), registry=registry)
        Gauge("longserve_requests_waiting", "", registry=registry)
        Gauge("longserve_process_resident_memory_bytes", "", registry=registry).set_function(lambda: self.resident())

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/health", self.models)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_post("/tokenize", self.tokenize)
        for path in ("/v1/completions", "/v1/embeddings", "/v1/chat/completions"):
            app.router.add_post(path, self.answer)
        return app

    async def models(self, _: web.Request) -> web.Response:
        ids = [MODEL, *(f"{MODEL}@{name}" for name in self.seconds if name)]
        limit = {"max_model_len": self.max_tokens} if self.max_tokens else {}
        return web.json_response({"object": "list", "data": [{"id": id, **limit} for id in ids]})

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self.registry))

    async def tokenize(self, request: web.Request) -> web.Response:
        if not self.has_tokenize:
            return web.json_response({"error": {"message": "no such route"}}, status=404)
        return web.json_response({"count": tokens_of((await request.json())["prompt"])})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        arrived = time.monotonic()
        assert request.transport is not None
        self.transports.add(request.transport)
        body = await request.json()
        self.bodies.append(body)
        fault = self.faults.pop(0) if self.faults else self.always
        if fault:
            return await self._fault(fault, request)
        backend = body["model"].partition("@")[2]
        text = body.get("prompt") or body.get("input") or body["messages"][0]["content"]
        tokens, output = tokens_of(text), body.get("max_tokens", 0)
        await _until(arrived + self.seconds[backend](tokens))
        self._count(request, backend, tokens, output)
        account = self._account(backend, tokens, output)
        if body.get("stream"):
            return await self._stream(request, output, account)
        return web.json_response(self._body(request.path, output, account))

    def _count(self, request: web.Request, backend: str, tokens: int, output: int) -> None:
        self._responded(request)
        self.input.labels(backend).observe(tokens)
        self.output.labels(backend).observe(output)
        if backend in self.peak_bytes:
            self.peaks.labels(backend, "prefill").observe(self.peak_bytes[backend](tokens))

    def _responded(self, request: web.Request, status: str = "200") -> None:
        self.responses.labels(request.path, "POST", status).inc(1 + self.miscounts)

    def _account(self, backend: str, tokens: int, output: int) -> dict[str, Any]:
        usage = {"prompt_tokens": tokens, "completion_tokens": output, "total_tokens": tokens + output}
        receipt: dict[str, Any] = {
            "backend": self.named or backend,
            "queue_seconds": 0.0,
            "prefill_seconds": self.seconds[backend](tokens),
        }
        if backend in self.peak_bytes:
            receipt["reserved_bytes"] = receipt["measured_bytes"] = int(self.peak_bytes[backend](tokens))
        return ({"usage": usage} if self.has_usage else {}) | {"longserve": receipt | self.receipt}

    @staticmethod
    def _body(path: str, output: int, account: dict[str, Any]) -> dict[str, Any]:
        if path.endswith("embeddings"):
            return {"data": [{"embedding": "AAAA", "index": 0}], **account}
        said = {"message": {"content": "x " * output}} if "chat" in path else {"text": "x " * output}
        return {"choices": [{"index": 0, "finish_reason": "length", **said}], **account}

    @staticmethod
    async def _stream(request: web.Request, output: int, account: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for place in range(output):
            reason = '"length"' if place == output - 1 else "null"
            await response.write(
                b'data: {"object":"text_completion","choices":[{"text":"x ","finish_reason":%s}]}\n\n' % reason.encode()
            )
        await response.write(
            b"data: " + web.json_response({"object": "text_completion", "choices": [], **account}).body + b"\n\n"
        )  # type: ignore[operator]
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _fault(self, fault: str, request: web.Request) -> web.StreamResponse:
        if fault.isdigit():
            self._responded(request, fault)
            return web.json_response({"error": {"message": f"told to answer {fault}"}}, status=int(fault))
        if fault not in ("not_http", "die", "vanish", "silent"):
            self._responded(request)
        if fault == "garbage":
            return web.Response(body=b"<html>it works</html>", content_type="text/html")
        if fault == "empty":
            return web.json_response({"choices": []})
        if fault == "error_in_200":
            return web.json_response({"error": {"message": "out of luck"}})
        if fault == "not_http":
            assert request.transport is not None
            request.transport.write(b"\x00\x01\x02 no HTTP\r\n\r\n")
            return await self._hang_up(request)
        if fault == "vanish":
            assert self.site is not None
            await self.site.stop()
            for transport in self.transports:
                transport.abort()
            raise asyncio.CancelledError
        if fault == "die":
            return await self._hang_up(request)
        if fault == "silent":
            await asyncio.sleep(60)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        response.content_length = 4096
        await response.prepare(request)
        await response.write(b'data: {"choices":[{"text":"x","finish_reason":null}]}\n\n')
        if fault == "cut_off":
            return await self._hang_up(request)
        assert fault == "trickle", f"the stub knows no fault {fault!r}"
        while True:
            await asyncio.sleep(0.05)
            await response.write(b":")

    @staticmethod
    async def _hang_up(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        await asyncio.sleep(0.01)
        request.transport.close()  # not abort: what was sent must arrive, however busy the reader is
        raise asyncio.CancelledError


def tokens_of(text: str) -> int:
    return -(-len(text) // 4)


async def _until(moment: float) -> None:
    """Like the generator's own wait: timers of the loop are late by up to a millisecond."""
    if (rest := moment - time.monotonic() - 0.0015) > 0:
        await asyncio.sleep(rest)
    while time.monotonic() < moment:
        await asyncio.sleep(0)


async def serve(stub: Stub, port: int = 0) -> tuple[web.AppRunner, str]:
    runner = web.AppRunner(stub.app(), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    stub.site = site
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


@contextmanager
def serving(stub: Stub) -> Iterator[str]:
    """The stub's URL, served from a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner, url = asyncio.run_coroutine_threadsafe(serve(stub), loop).result()
    try:
        yield url
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
