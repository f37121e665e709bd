"""A scenario: what is sent, how much of it, when. Typed, frozen, unknown keys refused; read from YAML.

Four kinds. `sweep` measures every backend at every length under every load; `capacity` seeks the highest rate that keeps a
service level; `mixed` sends several streams side by side, and one of them alone; `soak` sends one stream for long.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from loadtests.faults import ScenarioError

Api = Literal["completions", "stream", "embeddings", "chat", "chat_stream"]
"""`stream` is a streamed completion, `chat_stream` a streamed chat completion."""

STREAMED: tuple[Api, ...] = ("stream", "chat_stream")
Preset = Literal["azure_code", "azure_conversation", "mooncake_conversation"]
Tokens = Annotated[int, Field(ge=1, le=10_000_000)]
Rate = Annotated[float, Field(gt=0, le=100_000, allow_inf_nan=False)]  # requests a second
Seconds = Annotated[float, Field(gt=0, le=7 * 86400, allow_inf_nan=False)]


class Part(BaseModel):
    """Base of all parts of a scenario."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FixedLength(Part):
    """Every input has the same number of tokens."""

    kind: Literal["fixed"] = "fixed"
    tokens: Tokens


class ListedLengths(Part):
    """One of these. In `sweep` and `capacity` each is a cell of its own; elsewhere each input draws one, evenly."""

    kind: Literal["list"] = "list"
    tokens: Annotated[tuple[Tokens, ...], Field(min_length=1, max_length=64, strict=False)]


class LogNormalLengths(Part):
    """Log-normal lengths, by a published trace's fit or by `ln_mean` and `ln_sd`; what is clipped is reported."""

    kind: Literal["log_normal"] = "log_normal"
    preset: Preset | None = None
    ln_mean: float | None = Field(default=None, gt=0, le=20)
    ln_sd: float | None = Field(default=None, gt=0, le=5)
    minimum: Tokens = 16
    maximum: Tokens | None = Field(default=None, description="Left out: what the server takes.")

    @model_validator(mode="after")
    def _is_one_law(self) -> LogNormalLengths:
        given = (self.ln_mean is not None) + (self.ln_sd is not None)
        if (self.preset is None and given < 2) or (self.preset is not None and given):
            raise ValueError("needs either preset, or both ln_mean and ln_sd")
        return self


class TracedLengths(Part):
    """Each request's own, from the trace that `arrivals` replays."""

    kind: Literal["trace"] = "trace"


Lengths = Annotated[FixedLength | ListedLengths | LogNormalLengths | TracedLengths, Field(discriminator="kind")]


class InFlight(Part):
    """A closed loop: so many requests at any time, a new one when one ends. Says nothing about waiting under a rate."""

    kind: Literal["in_flight"] = "in_flight"
    requests: int = Field(ge=1, le=10_000)


class Constant(Part):
    """One request every 1/rate seconds."""

    kind: Literal["constant"] = "constant"
    rate: Rate


class Poisson(Part):
    """Independent arrivals: exponential gaps of mean 1/rate."""

    kind: Literal["poisson"] = "poisson"
    rate: Rate


class Gamma(Part):
    """Gamma gaps of mean 1/rate whose standard deviation is `variation` times the mean: 1 is Poisson, above 1 bursts."""

    kind: Literal["gamma"] = "gamma"
    rate: Rate
    variation: float = Field(gt=0, le=100)


class OnOff(Part):
    """Poisson arrivals at `rate` for `on_seconds`, silence for `off_seconds`, and again."""

    kind: Literal["on_off"] = "on_off"
    rate: Rate
    on_seconds: Seconds
    off_seconds: Seconds


class Replay(Part):
    """Arrivals, and lengths where asked for, of a trace: CSV or JSONL with Azure's, Mooncake's or plain columns."""

    kind: Literal["replay"] = "replay"
    path: str
    time_scale: float = Field(default=1.0, gt=0, le=1000, description="2: twice as slow, half the rate.")


Arrivals = Annotated[InFlight | Constant | Poisson | Gamma | OnOff | Replay, Field(discriminator="kind")]


class Limit(Part):
    """A length-aware bound: `seconds` and `seconds_per_token` more for every input token."""

    seconds: float = Field(ge=0)
    seconds_per_token: float = Field(default=0.0, ge=0)

    def at(self, tokens: int) -> float:
        """The bound for an input of so many tokens."""
        return self.seconds + self.seconds_per_token * tokens


class ServiceLevel(Part):
    """What a request must keep to count as good, and the share of requests that must."""

    latency: Limit | None = Field(default=None, description="From the intended send to the last byte.")
    first_token: Limit | None = Field(default=None, description="From the intended send to the first token; streams only.")
    attainment: float = Field(default=0.95, gt=0, lt=1)

    @model_validator(mode="after")
    def _bounds_something(self) -> ServiceLevel:
        if self.latency is None and self.first_token is None:
            raise ValueError("needs latency, first_token or both")
        return self


class Stream(Part):
    """One source of requests."""

    name: str = Field(default="requests", pattern=r"^[a-z][a-z0-9_]*$")
    api: Api = "completions"
    lengths: Lengths
    output_tokens: Tokens = 8
    arrivals: Arrivals

    @model_validator(mode="after")
    def _has_its_trace(self) -> Stream:
        if isinstance(self.lengths, TracedLengths) and not isinstance(self.arrivals, Replay):
            raise ValueError("lengths of kind trace need arrivals of kind replay")
        return self


class Common(Part):
    """What every kind of scenario has."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    seed: int = Field(default=1, ge=0, lt=2**32)
    model: str | None = Field(default=None, description="Left out: the first that /v1/models lists.")
    backends: tuple[str, ...] = Field(
        default=(), strict=False, description="Asked for as model@backend; left out: the model as it is served."
    )
    ignore_eos: bool = Field(
        default=True, description="Ask for answers as long as asked; false for servers that refuse the field."
    )
    warm_up_requests: int = Field(default=2, ge=0, le=1000, description="Before each block and stream; not measured.")
    repeats: int = Field(default=1, ge=1, le=100)
    timeout_seconds: Seconds = 120.0
    max_in_flight: int = Field(default=256, ge=1, le=10_000, description="A send beyond it is not made, and counted.")
    distinct_prompts: int = Field(default=8, ge=1, le=1000, description="Different texts of each length.")
    processes: int | None = Field(default=None, ge=1, le=64, description="Generators; left out: by the rate.")
    scrape_seconds: Seconds = 2.0
    service_level: ServiceLevel | None = None


class Sweep(Common):
    """Backends x lengths x loads."""

    kind: Literal["sweep"]
    api: Api = "completions"
    lengths: Lengths
    output_tokens: Tokens = 8
    loads: Annotated[tuple[Arrivals, ...], Field(min_length=1, strict=False)]
    seconds: Seconds = Field(default=10.0, description="Of sending in each block.")
    min_requests: int = Field(default=3, ge=1, description="That a closed loop sends even if it takes longer.")


class Capacity(Common):
    """The highest Poisson rate at which the service level is kept, by bisection, for each backend and length."""

    kind: Literal["capacity"]
    api: Api = "completions"
    lengths: Lengths
    output_tokens: Tokens = 8
    service_level: ServiceLevel
    requests: int = Field(default=80, ge=20, le=10_000, description="Of one probe.")
    first_rate: Rate | None = Field(default=None, description="Left out: what one request at a time reaches.")
    precision: float = Field(default=0.1, gt=0, lt=1, description="Of the rate: 0.1 ends within 10 %.")
    max_probes: int = Field(default=12, ge=2, le=50)

    @model_validator(mode="after")
    def _draws_its_arrivals(self) -> Capacity:
        if isinstance(self.lengths, TracedLengths):
            raise ValueError("lengths: a capacity search draws its own arrivals, so kind trace has no trace to read")
        return self


class Mixed(Common):
    """Streams side by side; `probe` names the one whose wait behind the others is the question."""

    kind: Literal["mixed"]
    streams: Annotated[tuple[Stream, ...], Field(min_length=2, max_length=8, strict=False)]
    probe: str
    seconds: Seconds = 30.0

    @model_validator(mode="after")
    def _names_fit(self) -> Mixed:
        names = [stream.name for stream in self.streams]
        if len(set(names)) < len(names):
            raise ValueError(f"streams: names must differ, received {', '.join(names)}")
        if self.probe not in names:
            raise ValueError(f"probe must be one of {', '.join(names)}, received {self.probe!r}")
        return self


class Soak(Common):
    """One stream for long, watched for growth."""

    kind: Literal["soak"]
    stream: Stream
    seconds: Seconds = 3600.0


Scenario = Annotated[Sweep | Capacity | Mixed | Soak, Field(discriminator="kind")]
_ADAPTER: TypeAdapter[Sweep | Capacity | Mixed | Soak] = TypeAdapter(Scenario)


def read(path: Path, **changes: Any) -> Sweep | Capacity | Mixed | Soak:
    """The scenario of a YAML file with some of its top-level fields changed. Raises ScenarioError naming file and field."""
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ScenarioError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path}: no YAML: {str(error).replace(chr(10), ' ')}") from error
    if not isinstance(data, dict):
        raise ScenarioError(f"{path}: must be a mapping of fields, received {type(data).__name__}")
    return parse(data | {name: value for name, value in changes.items() if value is not None}, str(path))


def parse(data: dict[str, Any], where: str) -> Sweep | Capacity | Mixed | Soak:
    """A scenario from plain data. Raises ScenarioError."""
    try:
        return _ADAPTER.validate_python(data)
    except ValidationError as error:
        raise ScenarioError("\n".join(f"{where}: {_describe(fault)}" for fault in error.errors()[:8])) from error


def _describe(fault: Any) -> str:
    place = ".".join(str(part) for part in fault["loc"] if part not in ("sweep", "capacity", "mixed", "soak"))
    message = fault["msg"].removeprefix("Value error, ")
    received = "" if fault["type"] in ("missing", "value_error") else f", received {fault['input']!r:.80}"
    return f"{place}: {message}{received}" if place else f"{message}{received}"


def fingerprint(scenario: Common) -> str:
    """What tells two scenarios apart: a hash of all their fields."""
    text = json.dumps(scenario.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
