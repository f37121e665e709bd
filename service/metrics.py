"""Every metric: name, unit, help, labels, buckets. A registry per replica; `exposition.py` makes one page of all of them.

Levels are read from the engine when somebody scrapes, so none can go stale; events are told by the engine as they happen.
Label values come from closed sets: backends of the allow-list, kinds, outcomes, error codes, route templates, and the
classes of input length below, which four histograms carry, and one more where answers are scored again. Nothing a caller sends
becomes a label; a request's id stands in exemplars. A backend takes under 850 lines with all lengths, and scored a sixth more.
Cost: some 35 microseconds a request and 11 a step.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, Summary
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.engine.observer import Outcome, Shadowed, ShadowResult, Snapshot, Step
from service.engine.request import DeadlineExceeded, Draining, InvalidRequest, QueueFull, Request, RequestError, Withdrawn
from service.timing import receipt

logger = logging.getLogger("longserve.request")

PREFIX = "longserve"


def powers(first: float, ratio: float, count: int) -> tuple[float, ...]:
    """Bucket edges `first`, `first * ratio`, ... `count` of them."""
    return tuple(first * ratio**i for i in range(count))


REQUEST_SECONDS = powers(0.01, 2, 17)  # 10 ms to 655 s: past the longest a request may take by default
TOKEN_SECONDS = powers(0.0005, 2, 14)  # 0.5 ms to 4 s
STEP_SECONDS = powers(0.001, 2, 15)  # 1 ms to 16 s
TOKENS = powers(16, 2, 14)  # 16 to 131,072
ROWS = powers(1, 2, 9)  # 1 to 256
BYTES = powers(2**18, 4, 9)  # 256 KiB to 16 GiB
RATIO = (0.25, 0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 2.0, 4.0)
NATS = (1e-6, 1e-5, 1e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # from rounding to another text
LEAST_BYTES = 2**20  # no law of cost is held to less
EXEMPLAR_ID = 128 - len("request_id")  # characters: OpenMetrics' bound on an exemplar's names and values together
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)

OUTCOMES: Mapping[Outcome, str] = {
    "stop": "ok",
    "length": "ok",
    "embedded": "ok",
    "cancelled": "cancelled",
    "deadline_exceeded": "timeout",
    "draining": "rejected",
    "withdrawn": "internal",
    "out_of_memory": "internal",
    "model_failed": "internal",
    "form_failed": "rejected",
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
        self._shadow_metrics()
        self._service_metrics()

    def _request_metrics(self) -> None:
        backend, by_length = ("backend",), ("backend", "length")
        self.requests = self._counter("requests", "Requests by outcome.", ("backend", "kind", "outcome"))
        self.rejected = self._counter("rejected", "Requests refused at the door, by the error's code.", ("reason",))
        for reason in REFUSALS:
            self.rejected.labels(reason)
        self.duration = self._histogram("request_duration_seconds", "From the door to the end.", by_length, REQUEST_SECONDS)
        self.tokenizer = self._histogram("tokenizer_seconds", "From text to token ids, waiting included.", (), TOKEN_SECONDS)
        reading = "What worker processes read, long bodies and texts: seconds in their queue, and at work."
        self.reading = Summary(f"{PREFIX}_reading_seconds", reading, ("job", "phase"), registry=self.registry)
        self.queue = self._histogram("request_queue_seconds", "From the door to the first step.", backend, REQUEST_SECONDS)
        self.prefill = self._histogram(
            "prefill_seconds", "From the first step to the last input token.", by_length, REQUEST_SECONDS
        )
        self.decode = self._histogram("decode_seconds", "From the last input token to the end.", backend, REQUEST_SECONDS)
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From the door to the first output token.", by_length, REQUEST_SECONDS
        )
        self.inter_token = self._histogram(
            "inter_token_seconds", "Between output tokens of one sample.", backend, TOKEN_SECONDS
        )
        self.input_tokens = self._histogram("input_tokens", "Input length.", backend, TOKENS)
        self.output_tokens = self._histogram("output_tokens", "Output length.", backend, TOKENS)
        self.prompt_tokens = self._counter("prompt_tokens", "Input tokens of the requests whose input was read.", backend)
        self.seen_tokens = self._counter("prompt_tokens_seen", "Those that the last of them sees in one layer.", backend)
        self.cached_tokens = self._counter("prompt_tokens_cached", "Those whose state an earlier request had left.", backend)
        reserved = "State and workspace of a request by the cost law."
        self.reserved = Summary(f"{PREFIX}_request_reserved_bytes", reserved, by_length, registry=self.registry)
        self.measured = self._histogram(
            "request_measured_bytes", "State of a request, and its share of a step's peak, as measured.", by_length, BYTES
        )

    def _step_metrics(self) -> None:
        labels, kind = ("backend", "kind"), ("kind",)
        self.tokens = self._counter("processed_tokens", "Tokens the model has read or written.", labels)
        guessed = "Tokens guessed by prompt lookup and looked over, by whether the model drew them, too."
        self.guessed = self._counter("guessed_tokens", guessed, ("backend", "result"))
        self.forward = self._histogram("forward_seconds", "One call of the model.", labels, STEP_SECONDS)
        self.batch_size = self._histogram("batch_size", "Sequences in one call of the model.", kind, ROWS)
        self.batch_tokens = self._histogram("batch_tokens", "Tokens in one call of the model.", kind, powers(1, 4, 9))
        self.peak = self._histogram("forward_peak_bytes", "Peak of storages made in one call, sampled.", labels, BYTES)
        self.memory_ratio = self._histogram(
            "memory_prediction_ratio", "Measured peak over the cost law's, from 1 MiB on.", ("backend",), RATIO
        )
        self.time_ratio = self._histogram("time_prediction_ratio", "Measured seconds over the engine's.", ("backend",), RATIO)
        self.samples = self._counter("memory_samples", "Calls whose peak was measured, or was not.", ("backend", "method"))

    def _shadow_metrics(self) -> None:
        by_length = ("backend", "length")
        answers = "Answers drawn to be scored again under the reference, by what became of them."
        self.shadow_answers = self._counter("shadow_answers", answers, ("backend", "result"))
        kl = "KL(reference || served) of next-token distributions, at each place of an answer that was compared."
        self.shadow_kl = self._histogram("shadow_divergence_nats", kl, by_length, NATS)
        agreed = "Those places at which both find the same token likeliest."
        self.shadow_agreed = self._counter("shadow_agreed", agreed, by_length)
        self.shadow_bound = self._gauge("shadow_bound_nats", "engine.shadow.bound_nats: the mean divergence to tell of.")

    def _service_metrics(self) -> None:
        self.responses = self._counter("http_responses", "Responses sent.", ("route", "method", "status"))
        self.tokenizer_waiting = self._gauge("tokenizer_waiting", "Long bodies and texts that wait for a worker process.")
        self.active = self._gauge("backend_active", "1 for a backend of the allow-list.", ("backend", "is_default"))
        share = "Of the calls without a wish, the share that it is given; what is left of 1 is auto's."
        self.share = self._gauge("backend_share_ratio", share, ("backend",))
        self.info = self._gauge("backend_info", "1; how a backend is built.", ("backend", "dtype", "device", "options"))
        self.truth_error = self._gauge("truth_error", "Largest error of a backend's last truth check.", ("backend",))
        self.truth_bound = self._gauge("truth_bound", "The error that check allows.", ("backend",))
        self.truth_passed = self._gauge("truth_passed", "1 where that error was within the bound.", ("backend",))
        self.truth_checked = self._gauge("truth_check_timestamp_seconds", "When it was checked.", ("backend",))
        self.switches = self._counter("backend_switch", "Changes of the allow-list, by result.", ("result",))
        for result in ("ok", "failed"):
            self.switches.labels(result)
        self.switch_seconds = self._histogram("backend_switch_seconds", "Building and checking one.", (), STEP_SECONDS)
        self.last_switch = self._gauge("backend_last_switch_seconds", "What the last one took.")
        self.switching = self._gauge("backend_switching", "1 while another allow-list is being built and checked.")
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
        """Count a request's end, its phases and its bytes, and log its one line."""
        timings, backend, id = request.timings, request.timings.backend, request.id
        length = length_class(len(request.tokens))
        self.requests.labels(backend, request.kind, OUTCOMES[outcome]).inc()
        self.input_tokens.labels(backend).observe(len(request.tokens))
        self.reserved.labels(backend, length).observe(timings.reserved_bytes)
        _observe(self.measured.labels(backend, length), timings.measured_bytes, id)
        _observe(self.duration.labels(backend, length), timings.total_seconds, id)
        self.tokenizer.observe(timings.tokenize_seconds)
        _observe(self.queue.labels(backend), timings.queue_seconds)
        if timings.prefill_seconds is not None:
            self._prefilled(request, length)
        if request.kind == "completion":
            self._decoded(request, length)
        self._log(request, outcome)

    def _prefilled(self, request: Request, length: str) -> None:
        timings, backend = request.timings, request.timings.backend
        _observe(self.prefill.labels(backend, length), timings.prefill_seconds, request.id)
        self.prompt_tokens.labels(backend).inc(len(request.tokens))
        self.seen_tokens.labels(backend).inc(timings.seen_tokens)
        self.cached_tokens.labels(backend).inc(timings.cached_tokens)

    def _decoded(self, request: Request, length: str) -> None:
        timings, backend = request.timings, request.timings.backend
        self.output_tokens.labels(backend).observe(timings.output_tokens)
        _observe(self.decode.labels(backend), timings.decode_seconds)
        _observe(self.first_token.labels(backend, length), timings.first_token_seconds, request.id)

    def _log(self, request: Request, outcome: str) -> None:
        if logger.isEnabledFor(logging.INFO):
            facts = {"id": request.id, "kind": request.kind, "outcome": outcome, "tokens": len(request.tokens)}
            facts |= {"length": length_class(len(request.tokens)), "output_tokens": request.timings.output_tokens}
            facts |= {"total_seconds": request.timings.total_seconds}
            logger.info("request ended", extra={"fields": facts | receipt([request.timings])})

    def refused(self, request: Request, reason: str) -> None:
        """Count a request that was not let in. The backend it asked for may be anything, so it is no label."""
        self.rejected.labels(reason).inc()
        outcome = "client_error" if reason in CLIENT_FAULTS else "rejected"
        self.requests.labels("none", request.kind, outcome).inc()

    def read(self, job: str, queue_seconds: float, work_seconds: float) -> None:
        """Count one job of a worker process; `job` is the name of a function of ours."""
        self.reading.labels(job, "queue").observe(queue_seconds)
        self.reading.labels(job, "work").observe(work_seconds)

    def stepped(self, step: Step) -> None:
        """Count one call of the model."""
        labels = (step.backend, step.kind)
        self.tokens.labels(*labels).inc(step.tokens)
        self.forward.labels(*labels).observe(step.seconds)
        self.batch_size.labels(step.kind).observe(step.sequences)
        self.batch_tokens.labels(step.kind).observe(step.tokens)
        if step.guessed:
            self.guessed.labels(step.backend, "right").inc(step.right)
            self.guessed.labels(step.backend, "wrong").inc(step.guessed - step.right)
        if step.predicted_seconds > 0:
            self.time_ratio.labels(step.backend).observe(step.seconds / step.predicted_seconds)
        self.samples.labels(step.backend, "skipped" if step.measured_bytes is None else step.method).inc()
        gaps = self.inter_token.labels(step.backend)
        for gap in step.token_gaps:
            gaps.observe(gap)
        if step.measured_bytes is not None and step.predicted_bytes is not None:
            self.peak.labels(*labels).observe(step.measured_bytes)
            if max(step.measured_bytes, step.predicted_bytes) >= LEAST_BYTES:
                self.memory_ratio.labels(step.backend).observe(step.measured_bytes / max(step.predicted_bytes, 1))

    def shadowed(self, shadowed: Shadowed) -> None:
        """Count what became of an answer that was to be scored again, and what was found."""
        for result in get_args(ShadowResult):
            self.shadow_answers.labels(shadowed.backend, result).inc(result == shadowed.result)
        if shadowed.nats:
            labels = shadowed.backend, length_class(shadowed.prompt_tokens)
            kl = self.shadow_kl.labels(*labels)
            for nats in shadowed.nats:
                _observe(kl, nats, shadowed.id)
            self.shadow_agreed.labels(*labels).inc(shadowed.agreed)

    def responded(self, route: str, method: str, status: int) -> None:
        """Count one response."""
        self.responses.labels(route, method if method in METHODS else "other", str(status)).inc()

    def truth(self, backend: str, error: float, bound: float) -> None:
        """State the verdict of a truth check."""
        self.truth_error.labels(backend).set(error)
        self.truth_bound.labels(backend).set(bound)
        self.truth_passed.labels(backend).set(error <= bound)
        self.truth_checked.labels(backend).set_to_current_time()

    def switched_to(
        self,
        backends: Iterable[Mapping[str, Any]],
        default: str,
        weights: Mapping[str, float],
        dtype: str,
        device: str,
    ) -> None:
        """State the allow-list now in force; `backends` are `AttentionBackend.describe()`, `weights` the candidates' shares.

        Its counters begin at 0: of a series that begins at 1, no rate ever sees the first.
        """
        self.active.clear()
        self.info.clear()
        self.share.clear()
        rest = 1 - sum(weights.values())
        for backend in backends:
            self.share.labels(backend["name"]).set(weights.get(backend["name"], 0) + rest * (backend["name"] == default))
            self.active.labels(backend["name"], str(backend["name"] == default).lower()).set(1)
            for kind, outcome in product(KINDS, {*OUTCOMES.values()}):
                self.requests.labels(backend["name"], kind, outcome)
            for result in ("right", "wrong"):
                self.guessed.labels(backend["name"], result)
            self.info.labels(backend["name"], dtype, device, json.dumps(backend["options"], sort_keys=True)).set(1)
        self.switched.set_to_current_time()


KINDS = ("completion", "embedding", "classification")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def _codes(cls: type[RequestError]) -> frozenset[str]:
    """The codes of a kind of error and of all that are of it."""
    return frozenset({cls.code}).union(*map(_codes, cls.__subclasses__()))


CLIENT_FAULTS = _codes(InvalidRequest)
REFUSALS = (*CLIENT_FAULTS, QueueFull.code, Draining.code, DeadlineExceeded.code, Withdrawn.code)


def _observe(histogram: Histogram, value: float | None, id: str | None = None) -> None:
    """Observe what there is, with the request's id as exemplar where it is short enough for one."""
    if value is not None:
        exemplar = {"request_id": id} if id is not None and len(id) <= EXEMPLAR_ID else None
        histogram.observe(value, exemplar)


class Levels(Collector):
    """Gauges read from the engine's snapshot."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        now = self._snapshot()
        levels = (
            ("requests_running", "Sequences that hold state.", now.running),
            ("requests_waiting", "Requests in the queue.", now.waiting),
            ("waiting_tokens", "Input tokens in the queue.", now.waiting_tokens),
            ("queue_oldest_seconds", "How long the oldest request in the queue has waited.", now.oldest_seconds),
            (
                "promised_tokens",
                "Most tokens, of inputs and answers, that the admitted requests may have.",
                now.promised_tokens,
            ),
            ("memory_budget_bytes", "What requests may reserve together.", now.budget_bytes),
            ("memory_reserved_bytes", "What they have reserved.", now.bytes_in_use),
            (
                "state_usage_ratio",
                "Reserved share of the budget: a gateway's KV-cache use.",
                now.bytes_in_use / now.budget_bytes,
            ),
            (
                "cpu_starved_ratio",
                "Of the model thread's last seconds of computing, the share in which other processes had its CPU.",
                now.cpu_starved_ratio,
            ),
            ("draining", "1 while nothing more is admitted.", now.draining),
            ("progress_age_seconds", "Since a step ended while work waits.", time.monotonic() - now.last_progress),
            ("shadow_waiting", "Answers that wait to be scored again.", now.shadow.waiting),
            ("shadow_kept_bytes", "What they take.", now.shadow.kept_bytes),
            ("shadow_lent_bytes", "Of the budget, lent to the one that is scored.", now.shadow.lent_bytes),
        )
        for name, help, value in levels:
            yield GaugeMetricFamily(f"{PREFIX}_{name}", help, value=value)
        busy = "Time the model thread has computed: its rate is the busy share."
        yield CounterMetricFamily(f"{PREFIX}_model_busy_seconds", busy, value=now.busy_seconds)
        measuring = "Of it, time that went into measuring memory."
        yield CounterMetricFamily(f"{PREFIX}_memory_measuring_seconds", measuring, value=now.measuring_seconds)
        shadow = "Time the model thread has scored answers again, which is no part of its busy time."
        yield CounterMetricFamily(f"{PREFIX}_shadow_seconds", shadow, value=now.shadow.seconds)
        results, lookups = (("hit", now.prefix_hits), ("miss", now.prefix_misses)), "Prompts that found a kept prefix, or none."
        family = CounterMetricFamily(f"{PREFIX}_prefix_lookups", lookups, labels=("result",))
        for result, count in results:
            family.add_metric((result,), count)
        yield family
        evicted = "Kept prefixes that had to make room."
        yield CounterMetricFamily(f"{PREFIX}_prefix_evictions", evicted, value=now.prefix_evictions)
        yield _by_backend("backend_withdrawn", "1 while nothing is answered under it: it is off its definition.", now.withdrawn)
        yield _by_backend("prefix_bytes", "States of prefixes that are kept.", now.prefix_bytes)
        yield _by_backend("state_bytes", "Decode state held.", now.pool_bytes)
        yield _by_backend("state_slots", "Sequences whose decode state is held.", now.pool_slots)


def _by_backend(name: str, help: str, values: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(f"{PREFIX}_{name}", help, labels=("backend",))
    for backend, value in values.items():
        family.add_metric((backend,), value)
    return family


def peak_resident_bytes() -> int:
    """The process's high-water mark: a process metric, never a request's."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
