"""Traces as a collector gets them: a real receiver of OTLP over HTTP in this process."""

from __future__ import annotations

import asyncio
import gzip
import threading
from collections.abc import Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from service.config import ServiceConfig, UserConfig
from service.plain import listening
from service.replica import Replica
from tests.http.client import Client

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{flags}"


class Collector(ThreadingHTTPServer):
    """Takes traces and keeps their spans."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.spans: list[Span] = []
        self.resources: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"

    def by_name(self) -> dict[str, list[Span]]:
        found: dict[str, list[Span]] = {}
        for span in sorted(self.spans, key=lambda span: span.start_time_unix_nano):
            found.setdefault(span.name, []).append(span)
        return found


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
        for each in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.server.resources.append(facts(each.resource))
            self.server.spans += [span for scope in each.scope_spans for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def facts(owner: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in owner.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@asynccontextmanager
async def traced(collector: Collector) -> Any:
    """A client of a replica that traces; all traces have arrived when the block is left."""
    replica = Replica(ServiceConfig(threads=1, traces=collector.url), name="r")
    async with listening(replica, UserConfig()) as url:
        yield Client(url, replica)


async def test_a_requests_phases_are_spans_under_the_callers_own(collector: Collector) -> None:
    body = {"prompt": [7] * 1200, "max_tokens": 4, "ignore_eos": True}
    async with traced(collector) as client:
        headers = {"traceparent": PARENT.format(flags="01"), "x-request-id": "mine"}
        reply = await asyncio.to_thread(client.post, "/v1/completions", body, headers)
    found = collector.by_name()
    assert {name: len(spans) for name, spans in found.items()} == {
        "completion": 1, "tokenize": 1, "queue": 1, "prefill chunk": 3, "decode": 1,
    }  # fmt: skip
    (root,) = found["completion"]
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == tuple(PARENT.split("-")[1:3])
    assert root.kind == Span.SPAN_KIND_SERVER and root.status.code != Status.STATUS_CODE_ERROR
    told = facts(root)
    assert (told["longserve.request_id"], told["longserve.outcome"], told["longserve.backend"]) == ("mine-0", "length", "dense")
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (1200, 4)
    assert told["longserve.reserved_bytes"] == reply.json["longserve"]["reserved_bytes"]
    parts = [span for name, spans in found.items() if name != "completion" for span in spans]
    for part in parts:
        assert (part.trace_id, part.parent_span_id) == (root.trace_id, root.span_id)
        assert root.start_time_unix_nano <= part.start_time_unix_nano <= part.end_time_unix_nano <= root.end_time_unix_nano
    assert [facts(chunk)["longserve.tokens"] for chunk in found["prefill chunk"]] == [512, 512, 176]
    assert {(each["service.name"], each["service.instance.id"]) for each in collector.resources} == {("longserve", "r")}


async def test_a_refusal_is_a_trace_of_its_own_that_says_why(collector: Collector) -> None:
    async with traced(collector) as client:
        assert (await asyncio.to_thread(client.complete, [7] * 40_000)).status == 400
    (span,) = collector.spans
    assert (span.status.code, span.status.message) == (Status.STATUS_CODE_ERROR, "context_length_exceeded")
    assert span.parent_span_id == b""


@pytest.mark.parametrize(("header", "spans"), [(PARENT.format(flags="00"), 0), ("no trace context", 5)])
async def test_a_caller_who_does_not_sample_is_not_traced_and_nonsense_begins_a_trace(
    collector: Collector, header: str, spans: int
) -> None:
    async with traced(collector) as client:
        body = {"prompt": "import os", "max_tokens": 2}
        assert (await asyncio.to_thread(client.post, "/v1/completions", body, {"traceparent": header})).status == 200
    assert len(collector.spans) == spans


async def test_a_collector_that_is_gone_hinders_no_request() -> None:
    replica = Replica(ServiceConfig(threads=1, traces="http://127.0.0.1:9/v1/traces"))
    async with listening(replica, UserConfig()) as url:
        assert (await asyncio.to_thread(Client(url, replica).complete, "import os")).status == 200


def test_an_address_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="traces"):
        ServiceConfig(traces="localhost:4318")
