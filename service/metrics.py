"""Every metric: name, unit, help, labels, buckets. A registry per replica; any replica answers for all of them.

Levels are read from the engine when somebody scrapes, so none can go stale; events are told by the engine as they happen.
Label values come from closed sets: backends of the allow-list, kinds, outcomes, error codes, route templates, and the
length classes below. Nothing a caller sends becomes a label. A replica exports under 6,000 lines with all seven backends.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from service.engine.observer import Outcome, Step
from service.engine.request import InvalidRequest, Request
from service.timing import receipt

if TYPE_CHECKING:
    from service.engine.engine import Snapshot

logger = logging.getLogger("longserve.request")

PREFIX = "longserve"


def powers(first: float, ratio: float, count: int) -> tuple[float, ...]:
    """Bucket edges `first`, `first * ratio`, ... `count` of them."""
    return tuple(first * ratio**i for i in range(count))


REQUEST_SECONDS = powers(0.005, 2, 18)  # 5 ms to 655 s: past the longest a request may take by default
TOKEN_SECONDS = powers(0.0005, 2, 14)  # 0.5 ms to 4 s
STEP_SECONDS = powers(0.0005, 2, 16)  # 0.5 ms to 16 s
TOKENS = powers(16, 2, 14)  # 16 to 131,072
ROWS = powers(1, 2, 9)  # 1 to 256
BYTES = powers(2**18, 4, 10)  # 256 KiB to 64 GiB
RATIO = (0.25, 0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 2.0, 4.0)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)

OUTCOMES: Mapping[Outcome, str] = {
    "stop": "ok",
    "length": "ok",
    "embedded": "ok",
    "cancelled": "cancelled",
    "deadline_exceeded": "timeout",
    "draining": "rejected",
    "out_of_memory": "internal",
    "model_failed": "internal",
}


def length_class(tokens: int) -> str:
    """The class of an input length: the least of LENGTHS that holds it, or `over`."""
    return next((str(edge) for edge in LENGTHS if tokens <= edge), "over")


class Metrics:
    """One replica's metric objects, and the engine's observer that feeds them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(namespace=PREFIX, registry=self.registry)
        self._request_metrics()
        self._step_metrics()
        self._service_metrics()

    def _request_metrics(self) -> None:
        by_backend, by_kind = ("backend",), ("backend", "kind")
        self.requests = self._counter("requests", "Requests by outcome.", (*by_kind, "outcome"))
        self.rejected = self._counter("rejected", "Requests refused at the door, by the error's code.", ("reason",))
        self.duration = self._histogram("request_duration_seconds", "From the door to the end.", by_kind, REQUEST_SECONDS)
        self.tokenize = self._histogram("tokenize_seconds", "From text to token ids.", ("kind",), TOKEN_SECONDS)
        self.queue = self._histogram("request_queue_seconds", "From the door to the first step.", by_kind, REQUEST_SECONDS)
        self.prefill = self._histogram(
            "prefill_seconds", "From the first step to the last input token.", (*by_backend, "length"), REQUEST_SECONDS
        )
        self.decode = self._histogram("decode_seconds", "From the last input token to the end.", by_backend, REQUEST_SECONDS)
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From the door to the first output token.", by_backend, REQUEST_SECONDS
        )
        self.inter_token = self._histogram(
            "inter_token_seconds", "Between output tokens of one request.", by_backend, TOKEN_SECONDS
        )
        self.input_tokens = self._histogram("input_tokens", "Input length.", by_kind, TOKENS)
        self.output_tokens = self._histogram("output_tokens", "Output length.", by_backend, TOKENS)
        self.reserved = self._histogram(
            "request_reserved_bytes", "State and workspace of a request by the cost law.", (*by_backend, "length"), BYTES
        )

    def _step_metrics(self) -> None:
        labels = ("backend", "kind")
        self.tokens = self._counter("processed_tokens", "Tokens the model has read or written.", labels)
        self.forward = self._histogram("forward_seconds", "One call of the model.", labels, STEP_SECONDS)
        self.batch_size = self._histogram("batch_size", "Sequences in one call of the model.", labels, ROWS)
        self.batch_tokens = self._histogram("batch_tokens", "Tokens in one call of the model.", labels, powers(1, 4, 9))
        self.peak = self._histogram("forward_peak_bytes", "Peak of storages made in one call, sampled.", labels, BYTES)
        self.memory_ratio = self._histogram(
            "memory_prediction_ratio", "Measured peak over the cost law's.", ("backend",), RATIO
        )
        self.time_ratio = self._histogram("time_prediction_ratio", "Measured seconds over the engine's.", ("backend",), RATIO)
        self.samples = self._counter("memory_samples", "Calls whose peak was measured, or was not.", ("backend", "method"))

    def _service_metrics(self) -> None:
        self.responses = self._counter("http_responses", "Responses sent.", ("route", "method", "status"))
        self.active = self._gauge("backend_active", "1 for a backend of the allow-list.", ("backend", "is_default"))
        self.info = self._gauge("backend_info", "1; how a backend is built.", ("backend", "dtype", "device", "options"))
        self.truth_error = self._gauge("truth_error", "Largest error of a backend's last truth check.", ("backend",))
        self.truth_bound = self._gauge("truth_bound", "The error that check allows.", ("backend",))
        self.switches = self._counter("backend_switch", "Changes of the allow-list, by result.", ("result",))
        self.switch_seconds = self._histogram("backend_switch_seconds", "Building and checking one.", (), STEP_SECONDS)
        self.degraded = self._gauge("backend_degraded", "1 while the last change failed and the old list is in force.")
        self.switched = self._gauge("config_reload_success_timestamp_seconds", "When the allow-list came into force.")
        self.threads = self._gauge("torch_threads", "Threads of one tensor operation.")
        self.build = self._gauge("build_info", "1; what runs here.", ("version", "torch", "model"))
        peak = self._gauge("process_peak_resident_memory_bytes", "Most resident memory this process ever had.")
        peak.set_function(peak_resident_bytes)

    def _counter(self, name: str, help: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"{PREFIX}_{name}", help, labels, registry=self.registry)

    def _gauge(self, name: str, help: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", help, labels, buckets=buckets, registry=self.registry)

    def watch(self, snapshot: Callable[[], Snapshot]) -> None:
        """Export the engine's levels, read at each scrape."""
        self.registry.register(Levels(snapshot))

    def finished(self, request: Request, outcome: Outcome) -> None:
        """Count a request's end and its phases, and log its one line."""
        timings, backend, kind = request.timings, request.timings.backend, request.kind
        length = length_class(len(request.tokens))
        self.requests.labels(backend, kind, OUTCOMES[outcome]).inc()
        self.input_tokens.labels(backend, kind).observe(len(request.tokens))
        self.reserved.labels(backend, length).observe(timings.peak_bytes)
        _observe(self.duration.labels(backend, kind), timings.total_seconds)
        self.tokenize.labels(kind).observe(timings.tokenize_seconds)
        _observe(self.queue.labels(backend, kind), timings.queue_seconds)
        _observe(self.prefill.labels(backend, length), timings.prefill_seconds)
        if kind == "completion":
            self._decoded(request)
        self._log(request, outcome)

    def _decoded(self, request: Request) -> None:
        timings, backend = request.timings, request.timings.backend
        self.output_tokens.labels(backend).observe(timings.output_tokens)
        _observe(self.decode.labels(backend), timings.decode_seconds)
        _observe(self.first_token.labels(backend), timings.first_token_seconds)
        gaps = self.inter_token.labels(backend)
        for earlier, later in pairwise(timings.token_times):
            gaps.observe(later - earlier)

    def _log(self, request: Request, outcome: str) -> None:
        if logger.isEnabledFor(logging.INFO):
            facts = {"id": request.id, "kind": request.kind, "outcome": outcome, "tokens": len(request.tokens)}
            logger.info(json.dumps(facts | {"output_tokens": request.timings.output_tokens} | receipt([request.timings])))

    def refused(self, request: Request, reason: str) -> None:
        """Count a request that was not let in. The backend it asked for may be anything, so it is no label."""
        self.rejected.labels(reason).inc()
        outcome = "client_error" if reason in CLIENT_FAULTS else "rejected"
        self.requests.labels("none", request.kind, outcome).inc()

    def stepped(self, step: Step) -> None:
        """Count one call of the model."""
        labels = (step.backend, step.kind)
        self.tokens.labels(*labels).inc(step.tokens)
        self.forward.labels(*labels).observe(step.seconds)
        self.batch_size.labels(*labels).observe(step.sequences)
        self.batch_tokens.labels(*labels).observe(step.tokens)
        if step.predicted_seconds > 0:
            self.time_ratio.labels(step.backend).observe(step.seconds / step.predicted_seconds)
        self.samples.labels(step.backend, "skipped" if step.measured_bytes is None else step.method).inc()
        if step.measured_bytes is not None:
            self.peak.labels(*labels).observe(step.measured_bytes)
            self.memory_ratio.labels(step.backend).observe(step.measured_bytes / max(step.predicted_bytes, 1))

    def responded(self, route: str, method: str, status: int) -> None:
        """Count one response."""
        self.responses.labels(route, method if method in METHODS else "other", str(status)).inc()

    def truth(self, backend: str, error: float, bound: float) -> None:
        """State the verdict of a truth check."""
        self.truth_error.labels(backend).set(error)
        self.truth_bound.labels(backend).set(bound)

    def switched_to(self, backends: Iterable[Mapping[str, Any]], default: str, dtype: str, device: str) -> None:
        """State the allow-list now in force; `backends` are `AttentionBackend.describe()`."""
        self.active.clear()
        self.info.clear()
        for backend in backends:
            self.active.labels(backend["name"], str(backend["name"] == default).lower()).set(1)
            self.info.labels(backend["name"], dtype, device, json.dumps(backend["options"], sort_keys=True)).set(1)
        self.switched.set_to_current_time()

    def export(self) -> list[Metric]:
        """All families with their samples, as plain data that another process can merge."""
        return list(self.registry.collect())


METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def _subclasses(cls: type[InvalidRequest]) -> Iterator[type[InvalidRequest]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _subclasses(child)


CLIENT_FAULTS = frozenset(cls.code for cls in _subclasses(InvalidRequest))


def _observe(histogram: Histogram, seconds: float | None) -> None:
    if seconds is not None:
        histogram.observe(seconds)


class Levels(Collector):
    """Gauges read from the engine's snapshot."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        now = self._snapshot()
        plain = (
            ("requests_running", "Sequences that hold state.", now.running),
            ("requests_waiting", "Requests in the queue.", now.waiting),
            ("waiting_tokens", "Input tokens in the queue.", now.waiting_tokens),
            ("memory_budget_bytes", "What requests may reserve together.", now.budget_bytes),
            ("memory_reserved_bytes", "What they have reserved.", now.bytes_in_use),
            (
                "state_usage_ratio",
                "Reserved share of the budget: a gateway's KV-cache use.",
                now.bytes_in_use / now.budget_bytes,
            ),
        )
        for name, help, value in plain:
            yield GaugeMetricFamily(f"{PREFIX}_{name}", help, value=value)
        yield _by_backend("state_bytes", "Decode state held.", now.pool_bytes)
        yield _by_backend("state_slots", "Sequences whose decode state is held.", now.pool_slots)


def _by_backend(name: str, help: str, values: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(f"{PREFIX}_{name}", help, labels=("backend",))
    for backend, value in values.items():
        family.add_metric((backend,), value)
    return family


class Merged(Collector):
    """Several replicas' families as one, every sample with its `replica`."""

    def __init__(self, exports: Mapping[str, Sequence[Metric]]) -> None:
        self._exports = exports

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, metrics in self._exports.items():
            for metric in metrics:
                merged = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type, metric.unit))
                merged.samples.extend(_labelled(metric.samples, replica))
        yield from families.values()


def _labelled(samples: Iterable[Sample], replica: str) -> Iterator[Sample]:
    """The samples with their replica; the client library's `_created` series, which nobody reads, are left out."""
    for sample in samples:
        if not sample.name.endswith("_created"):
            yield sample._replace(labels={**sample.labels, "replica": replica})


def render(exports: Mapping[str, Sequence[Metric]]) -> bytes:
    """Prometheus' text format of all replicas' exports."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Merged(exports))
    return generate_latest(registry)


def peak_resident_bytes() -> int:
    """The process's high-water mark: a process metric, never a request's."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
