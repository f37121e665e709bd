"""OpenTelemetry traces: one per request with a span for each phase, made of its `Timings` once it has ended.

Off unless `args.traces` names a collector (OTLP over HTTP). Nothing is written down while a request runs that is not written
down anyway; spans are made at its end and sent by the library's own thread. A caller's `traceparent` (W3C) becomes the
parent, its sampling flag is obeyed. Attribute names of the request itself are OpenTelemetry's for generative models.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.engine.observer import Observer, Outcome, Shadowed, Step
from service.engine.request import Request

FAILURES = frozenset({"deadline_exceeded", "draining", "out_of_memory", "model_failed"})
OPERATIONS = {"completion": "text_completion", "embedding": "embeddings", "classification": "classification"}


def exporter(endpoint: str) -> SpanExporter:
    """What sends spans to a collector. Raises ValueError where the package for it is missing."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ValueError("args.traces needs OpenTelemetry's exporter: pip install 'longserve[traces]'") from error
    return OTLPSpanExporter(endpoint)


class Traced:
    """An observer that makes traces and hands everything on to another."""

    def __init__(self, inner: Observer, sends: SpanExporter, replica: str) -> None:
        resource = Resource.create({"service.name": "longserve", "service.instance.id": replica})
        self._inner = inner
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(sends))
        self._tracer = self._provider.get_tracer("longserve")
        self._zero = time.time_ns() - time.monotonic_ns()  # of the monotonic clock, in nanoseconds since 1970

    def finished(self, request: Request, outcome: Outcome) -> None:
        """Make the request's spans."""
        self._inner.finished(request, outcome)
        timings = request.timings
        assert timings.queued_at is not None and timings.finished_at is not None, "a finished request has begun and ended"
        span = self._root(request, outcome in FAILURES, outcome)
        inside = set_span_in_context(span)
        self._phase(inside, "tokenize", timings.queued_at - timings.tokenize_seconds, timings.queued_at)
        self._phase(inside, "queue", timings.queued_at, timings.admitted_at)
        for chunk in timings.chunks:
            self._phase(inside, "prefill chunk", chunk.began_at, chunk.ended_at, {"longserve.tokens": chunk.tokens})
        if request.kind == "completion":
            self._phase(inside, "decode", timings.prefilled_at, timings.finished_at)
        span.end(self._at(timings.finished_at))

    def refused(self, request: Request, reason: str) -> None:
        """Make the one span of a request that was not let in."""
        self._inner.refused(request, reason)
        self._root(request, True, reason).end()

    def stepped(self, step: Step) -> None:
        self._inner.stepped(step)

    def shadowed(self, shadowed: Shadowed) -> None:
        self._inner.shadowed(shadowed)

    def stop(self) -> None:
        """Send what is left. Takes as long as the collector does, some seconds at most."""
        self._provider.shutdown()

    def _root(self, request: Request, is_failure: bool, outcome: str) -> Span:
        parent = TraceContextTextMapPropagator().extract(request.trace)
        span = self._tracer.start_span(
            request.kind, parent, SpanKind.SERVER, _attributes(request, outcome), start_time=self._at(request.arrival)
        )
        if is_failure:
            span.set_status(StatusCode.ERROR, outcome)
        return span

    def _phase(
        self, inside: Context, name: str, start: float | None, end: float | None, facts: Mapping[str, int] | None = None
    ) -> None:
        """A span of a phase that has begun and ended."""
        if start is not None and end is not None:
            self._tracer.start_span(name, inside, attributes=facts, start_time=self._at(start)).end(self._at(end))

    def _at(self, monotonic: float) -> int:
        return self._zero + int(monotonic * 1e9)


def _attributes(request: Request, outcome: str) -> dict[str, str | int]:
    timings = request.timings
    known: dict[str, str | int | None] = {
        "gen_ai.operation.name": OPERATIONS[request.kind],
        "gen_ai.usage.input_tokens": len(request.tokens),
        "gen_ai.usage.output_tokens": timings.output_tokens,
        "longserve.request_id": request.id,
        "longserve.outcome": outcome,
        "longserve.backend": timings.backend,
        "longserve.batch_mates": timings.batch_mates,
        "longserve.reserved_bytes": timings.reserved_bytes,
        "longserve.measured_bytes": timings.measured_bytes,
    }
    return {name: value for name, value in known.items() if value is not None}
