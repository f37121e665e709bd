"""From single requests to what a block says: distributions, counts, rates, and whether the generator kept its word.

Distributions are HDR histograms of microseconds with three significant digits: small, mergeable, and kept in the report
file, so that every figure of a report can be computed again from it.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from hdrh.histogram import HdrHistogram
from pydantic import BaseModel, ConfigDict

from loadtests.client import Outcome, Record
from loadtests.generator import Sent
from loadtests.scenario import ServiceLevel

DIGITS = 3
MOST_MICROSECONDS = 24 * 3600 * 10**6
FEW_FOR_P99 = 500  # below it a p99 is the accident of a handful of requests
DELAY_SHARE = 0.05  # of the median latency that sends may be late at p99
DELAY_FLOOR_SECONDS = 0.005  # which is always granted
LAG_SECONDS = 0.1  # that the event loop may be late at p99
ACHIEVED_SHARE = 0.98  # of the intended rate that must have been sent
SHORT_SPAN_SENDS = 20  # below so many sends a rate says nothing


class Kept(BaseModel):
    """Base of all that goes into the report file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Distribution(Kept):
    """Seconds, as an encoded histogram."""

    count: int
    encoded: str

    def values(self) -> np.ndarray:
        """The samples, ascending, in seconds; each to three digits."""
        return _values(self.encoded) if self.count else np.empty(0)


@functools.lru_cache(maxsize=4096)
def _values(encoded: str) -> np.ndarray:
    histogram = HdrHistogram.decode(encoded)
    counts = np.asarray(histogram.counts, dtype=np.int64)
    (places,) = np.nonzero(counts)
    low = [histogram.get_value_from_index(int(place)) for place in places]
    high = [histogram.get_highest_equivalent_value(each) for each in low]
    return np.repeat((np.asarray(low, float) + high) / 2e6, counts[places])


def pooled(parts: Iterable[Distribution]) -> np.ndarray:
    """The samples of several distributions together, in seconds."""
    return np.concatenate([np.empty(0), *(part.values() for part in parts)])


def quantile(seconds: np.ndarray, share: float) -> float | None:
    """A quantile; None without samples, and for a p99 of too few."""
    if len(seconds) == 0 or (share >= 0.99 and len(seconds) < FEW_FOR_P99):
        return None
    return float(np.quantile(seconds, share))


def distribution(seconds: Iterable[float]) -> Distribution:
    """The histogram of some durations; below a microsecond they count as none."""
    histogram = HdrHistogram(1, MOST_MICROSECONDS, DIGITS)
    count = 0
    for each in seconds:
        microseconds = round(min(max(each, 0.0) * 1e6, MOST_MICROSECONDS))
        histogram.record_value(microseconds)
        count += 1
    return Distribution(count=count, encoded=histogram.encode().decode() if count else "")


class Failure(Kept):
    """One way in which requests failed, and the first words about it."""

    outcome: Outcome
    told: str
    count: int


class StreamMeasures(Kept):
    """One stream of one block. Latencies and rates are of whole answers only."""

    name: str
    outcomes: dict[str, int]
    statuses: dict[str, int]  # of every HTTP answer, also of those that failed
    failures: tuple[Failure, ...]
    latency: Distribution  # from the intended send to the last byte
    latency_from_send: Distribution
    first_token: Distribution  # from the intended send; streams only
    per_output_token: Distribution  # of each request: last token less first, over the tokens between; streams only
    chunk_gap: Distribution  # between the pieces a stream came in; a piece may hold several tokens
    delay: Distribution  # from the intended send to the send
    seconds: float  # from the first intended send to the last answer
    intended_seconds: float  # from the first intended send to the last
    sent_seconds: float  # from the first send to the last
    prompt_tokens: int
    output_tokens: int
    tokens_off: int  # answers whose usage tells another number of input tokens than was cut
    good: int | None  # requests that kept the service level; None where there is none
    server: dict[str, Distribution]  # phases by the answers' receipts
    reserved_bytes: tuple[int, int] | None  # least and most by the answers' receipts
    measured_bytes: tuple[int, int] | None  # likewise, of the requests whose widest step was measured
    backends: dict[str, int]  # that the answers name
    clipped_share: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.outcomes.values())

    @property
    def ok(self) -> int:
        return self.outcomes.get(Outcome.OK, 0)


def measure(name: str, records: Sequence[Record], level: ServiceLevel | None, clipped: float = 0.0) -> StreamMeasures:
    """What the requests of one stream say together."""
    whole = [record for record in records if record.outcome is Outcome.OK]
    made = [record for record in records if record.outcome is not Outcome.NOT_SENT]
    ends = [record.done for record in whole]
    begin = min((record.intended for record in records), default=0.0)
    return StreamMeasures(
        name=name,
        outcomes=dict(Counter(str(record.outcome) for record in records)),
        statuses=dict(Counter(str(record.status) for record in records if record.status is not None)),
        failures=_failures(records),
        latency=distribution(record.done - record.intended for record in whole),
        latency_from_send=distribution(record.done - record.sent for record in whole),
        first_token=distribution(record.first - record.intended for record in whole if record.first is not None),
        per_output_token=distribution(_per_output_token(whole)),
        chunk_gap=distribution(later - earlier for record in whole for earlier, later in pairwise(record.chunk_times)),
        delay=distribution(record.sent - record.intended for record in made),
        seconds=max(ends, default=begin) - begin,
        intended_seconds=max((record.intended for record in records), default=begin) - begin,
        sent_seconds=max((r.sent for r in made), default=0.0) - min((r.sent for r in made), default=0.0),
        prompt_tokens=sum(record.prompt_tokens for record in whole),
        output_tokens=sum(record.output_tokens for record in whole),
        tokens_off=sum(record.asked_tokens not in (None, record.prompt_tokens) for record in whole),
        good=None if level is None else sum(is_good(record, level) for record in records),
        server=_phases(whole),
        reserved_bytes=_range(record.receipt.get("reserved_bytes") for record in whole),
        measured_bytes=_range(record.receipt.get("measured_bytes") for record in whole),
        backends=dict(Counter(str(record.receipt["backend"]) for record in whole if "backend" in record.receipt)),
        clipped_share=clipped,
    )


def is_good(record: Record, level: ServiceLevel) -> bool:
    """Whether a request was answered within the service level; one that failed was not."""
    if record.outcome is not Outcome.OK:
        return False
    if level.latency is not None and record.done - record.intended > level.latency.at(record.prompt_tokens):
        return False
    if level.first_token is None:
        return True
    return record.first is not None and record.first - record.intended <= level.first_token.at(record.prompt_tokens)


def _failures(records: Sequence[Record]) -> tuple[Failure, ...]:
    kinds = Counter((record.outcome, record.told) for record in records if record.outcome is not Outcome.OK)
    return tuple(Failure(outcome=outcome, told=told, count=count) for (outcome, told), count in kinds.most_common(8))


def _per_output_token(records: Sequence[Record]) -> Iterable[float]:
    for record in records:
        if len(record.chunk_times) > 1 and record.output_tokens > 1:
            yield (record.chunk_times[-1] - record.chunk_times[0]) / (record.output_tokens - 1)


def _phases(records: Sequence[Record]) -> dict[str, Distribution]:
    found = {}
    for phase in ("tokenize", "queue", "prefill", "decode"):
        seconds = _numbers(record.receipt.get(f"{phase}_seconds") for record in records)
        if seconds:
            found[phase] = distribution(seconds)
    return found


def _range(values: Iterable[object]) -> tuple[int, int] | None:
    numbers = _numbers(values)
    return (int(min(numbers)), int(max(numbers))) if numbers else None


def _numbers(values: Iterable[object]) -> list[float]:
    """Those of a server's values that are numbers: it may send anything."""
    return [each for each in values if isinstance(each, (int, float)) and math.isfinite(each) and each >= 0]


class Gate(Kept):
    """One condition on which a block's figures stand."""

    name: str
    passed: bool
    told: str


def gates(stream: StreamMeasures, is_open: bool, sent: Sent) -> list[Gate]:
    """Whether the generator did what it was to do: the server is not judged here."""
    found = [_lateness(stream), _lag(sent)]
    if is_open:
        found.append(_pace(stream))
    return found


def _lateness(stream: StreamMeasures) -> Gate:
    delays, latencies = stream.delay.values(), stream.latency_from_send.values()
    late = float(np.quantile(delays, 0.99)) if len(delays) else 0.0
    median = float(np.median(latencies)) if len(latencies) else 0.0
    allowed = max(DELAY_SHARE * median, DELAY_FLOOR_SECONDS)
    told = f"{stream.name}: p99 of the sends' delay {late * 1e3:.1f} ms, allowed {allowed * 1e3:.1f} ms"
    return Gate(name="sent on time", passed=late <= allowed, told=told)


def _lag(sent: Sent) -> Gate:
    late = float(np.quantile(sent.lags, 0.99)) if sent.lags else 0.0
    told = f"p99 of the event loop's lag {late * 1e3:.1f} ms, allowed {LAG_SECONDS * 1e3:.0f} ms"
    return Gate(name="undisturbed by lag", passed=late <= LAG_SECONDS, told=told)


def _pace(stream: StreamMeasures) -> Gate:
    """The rate that was reached over the intended one, by how long the same sends took; requests not made count against it."""
    missing = stream.outcomes.get(Outcome.NOT_SENT, 0) / max(stream.count, 1)
    stretched = stream.sent_seconds / stream.intended_seconds if stream.intended_seconds and not missing else 1.0
    achieved = (1 - missing) / max(stretched, 1e-9) if stream.count >= SHORT_SPAN_SENDS else 1 - missing
    told = f"{stream.name}: {achieved:.1%} of the intended rate was sent, {ACHIEVED_SHARE:.0%} are needed"
    return Gate(name="at the intended rate", passed=achieved >= ACHIEVED_SHARE, told=told)
