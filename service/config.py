"""Every knob of the service, typed. An unknown key or a value out of range is refused at start-up, named in the message.

A config file is a Ray Serve config: what a replica is made of stands in an application's `args`, the attention switch in
its deployment's `user_config`. Ray Serve itself passes over keys it does not know, so the whole file is checked here first.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

DEPLOYMENT: Literal["longserve"] = "longserve"
"""The deployment's name in every application."""

MOST_FILE_BYTES = 2**20
"""Of a config file: it is read by YAML's Python, a MiB in some seconds."""

IMPORT_PATH: Literal["service.app:build"] = "service.app:build"
"""What makes an application of these."""


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ShadowConfig(Settings):
    """Which answers are scored again, when the replica is idle, under a reference (service/engine/shadow.py)."""

    share: float = Field(default=0, ge=0, le=1)  # of the answers; 0: none
    reference: str | None = None  # the backend they are held to; None: the checkpoint's own, native where it has windows
    max_tokens: int = Field(default=16384, gt=0)  # of prompt and answer; a longer one is passed over
    max_positions: int = Field(default=64, gt=0)  # of an answer, spread over it, that are compared
    kept_bytes: int = Field(default=2**20, gt=0)  # of answers that wait for it; beyond it the oldest goes
    bound_nats: float = Field(default=0.25, gt=0)  # mean divergence above which LongserveShadowDiverges fires

    @field_validator("reference")
    @classmethod
    def _reference_is_a_backend(cls, name: str | None) -> str | None:
        if name is not None:
            import attention  # here, for it brings torch

            attention.backend_class(name)  # ValueError names the backends there are
        return name


class LookupConfig(Settings):
    """Prompt lookup (service/engine/lookup.py): tokens to come are guessed from the text itself, looked over in one step."""

    tokens: int = Field(default=0, ge=0, le=32)  # most that are guessed for a step; 0: none
    ngram: int = Field(default=3, ge=1, le=16)  # last tokens of a text that must stand in it before for a guess


class EngineConfig(Settings):
    """How the engine batches, admits and queues (service/engine)."""

    memory_budget_bytes: int | None = Field(default=None, gt=0)  # for all requests of a replica; None: by memory_share
    memory_share: float = Field(default=0.5, gt=0, le=1)  # of what container and machine have left, for all their replicas
    max_sequences: int = Field(default=64, gt=0)  # that hold state at once, each of `n` samples counted
    max_waiting_requests: int = Field(default=256, gt=0)  # beyond it 429
    max_waiting_tokens: int = Field(default=1_048_576, gt=0)  # beyond it 429
    chunk_tokens: int = Field(default=512, ge=16)  # of a prompt that pass a layer at once; of an encoder's texts 4 times it
    slice_seconds: float = Field(default=0.001, gt=0)  # of prefill before running streams get their turn
    decode_share: float = Field(default=0.5, ge=0, lt=1)  # of the time, for running streams while prompts wait
    patience: float = Field(default=4, gt=0)  # wait, in its own predicted seconds, after which none may overtake it
    prefix_share: float = Field(default=0.1, ge=0, le=1)  # of the budget, for states of prompts' beginnings; 0: none is kept
    prefix_shared: bool = False  # a kept prefix serves every API key: faster, and times tell what others have asked
    memory_sample_share: float = Field(default=0.01, ge=0, le=1)  # of the time, for measuring what steps take; 1: every step
    prompt_lookup: LookupConfig = LookupConfig()
    shadow: ShadowConfig = ShadowConfig()


class LineConfig(Settings):
    """How long and how much one connection may keep a server waiting (service/http/line.py)."""

    max_connections: int = Field(default=1000, gt=0)  # beyond it 503
    max_head_bytes: int = Field(default=2**16, gt=0)  # request line and headers; above it 431
    head_timeout_seconds: float = Field(default=10, gt=0)  # from the connection or the first byte to the last header; then 408
    rest_timeout_seconds: float = Field(default=10, gt=0)  # for what still comes of a body after its refusal
    send_timeout_seconds: float = Field(default=60, gt=0)  # in which a client reads nothing of its answer


class KeyConfig(Settings):
    """One API key of a key file: who shows it, and what it may take of each replica."""

    name: str = Field(min_length=1)
    key: str | None = Field(default=None, min_length=1)  # as callers show it
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")  # or only its digest: printf %s KEY | sha256sum
    requests_per_minute: int | None = Field(default=None, gt=0)  # that compute; None: no limit
    tokens_per_minute: int | None = Field(default=None, gt=0)  # of prompts and answers
    memory_share: float | None = Field(default=None, gt=0, le=1)  # of the memory budget, by its requests at once

    @property
    def digest(self) -> bytes:
        """What a shown key is compared by."""
        return bytes.fromhex(self.sha256) if self.sha256 else hashlib.sha256((self.key or "").encode()).digest()


class KeysFile(Settings):
    """A file of API keys, which is read again when it changes."""

    keys: list[KeyConfig]

    @field_validator("keys")
    @classmethod
    def _each_is_one(cls, keys: list[KeyConfig]) -> list[KeyConfig]:
        for each in keys:
            if (each.key is None) == (each.sha256 is None):
                raise ValueError(f"{each.name} must have either key or sha256")
        for what, found in (("name", [each.name for each in keys]), ("key", [each.digest.hex() for each in keys])):
            if len(set(found)) < len(found):
                raise ValueError(f"two entries have the same {what}")
        return keys


class HttpConfig(Settings):
    """What the HTTP layer lets in (service/http)."""

    api_keys_env: str | None = None  # environment variable that holds the API keys, comma-separated
    api_keys_file: str | None = None  # YAML, `keys:` with name, key, limits (KeyConfig); without either no key is asked for
    admin_keys_env: str | None = None  # environment variable with the keys that let into /admin; None: there is no /admin
    cors_origins: tuple[str, ...] = ()  # pages that may call from a browser, as https://host; "*": all; none: no page may
    max_body_bytes: int = Field(default=16 * 2**20, gt=0)  # counted while reading; above it 413
    max_bodies_bytes: int = Field(default=256 * 2**20, gt=0)  # of all bodies whose answer has not begun; above it 429
    body_timeout_seconds: float = Field(default=60, gt=0)  # for the whole of a body to arrive; then 408
    max_prompts: int = Field(default=64, gt=0)  # prompts or inputs in one call
    max_samples: int = Field(default=16, gt=0)  # `n` of one prompt
    request_timeout_seconds: float = Field(default=600, gt=0)  # longest a caller is kept waiting; a header may shorten it
    stream_ping_seconds: float = Field(default=10, gt=0)  # silence after which a stream sends a comment, for proxies' sake
    workers: int = Field(default=2, gt=0)  # processes that read what is large, some 70 MB each
    line: LineConfig = LineConfig()
    max_waiting_reads: int = Field(default=64, gt=0)  # bodies and texts that wait for one of them; beyond it 429

    @property
    def asks_for_keys(self) -> bool:
        """Whether callers must show a key."""
        return self.api_keys_env is not None or self.api_keys_file is not None


class ServiceConfig(Settings):
    """One application's `args`: what a replica is made of. A change restarts the replicas; the attention switch is no part."""

    model: str = "embedded"  # `embedded`, or a directory in Hugging Face format (relative to the file that names it)
    name: str | None = None  # the id under /v1/models; None: the checkpoint's own
    max_length: int | None = Field(default=None, gt=0)  # tokens of a sequence, at most; None: the checkpoint's context
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    weights: Literal["auto", "bf16", "int8", "int4"] = "auto"  # of matrices; auto: the dtype's; fewer bits are lossy
    kv: Literal["auto", "bf16", "int8"] = "auto"  # of a decoder's keys and values; auto: the dtype's; int8 is lossy
    device: str = "cpu"
    threads: int | None = Field(default=None, gt=0)  # torch threads; None: this replica's part of the CPUs
    float32_matmul_precision: Literal["highest", "high", "medium"] = "highest"
    log_level: Literal["debug", "info", "warning", "error"] = "warning"  # info: one JSON line per request
    log_file: str | None = None  # takes the log lines of all replicas of a machine; None: stderr
    traces: str | None = Field(default=None, pattern="^https?://")  # OTLP/HTTP: takes a trace per request; None: off
    stall_seconds: float = Field(default=60, gt=0)  # work waits and no step ends for so long: the replica is unhealthy
    truth_check_seconds: float | None = Field(default=3600, gt=0)  # between two checks of what serves, when idle; None: none
    drain_seconds: float = Field(default=30, ge=0)  # what runs may take so long to end when the service stops
    engine: EngineConfig = EngineConfig()
    http: HttpConfig = HttpConfig()


class AutoConfig(Settings):
    """How `auto` picks a backend, and what becomes of a request that cannot fit under the default."""

    prefer: tuple[str, ...] = ()  # the only ones picked from, best answers first; none: the fastest of all
    max_seconds: float | None = Field(default=None, gt=0)  # predicted, queue included; who takes longer is passed over
    spill: bool = False  # what cannot fit under the default is offered under the next of `prefer` (or `backends`) that it fits


class AttentionConfig(Settings):
    """The switch: the allow-list of backends with their options, in order, and which one serves when none is asked for.

    A checkpoint with windows of its own is always offered under them, as `native`, see `for_checkpoint`.
    """

    default: str | None = None  # None: the checkpoint's own, which is native where it has windows, else dense
    backends: dict[str, dict[str, Any] | None] = Field(default={"dense": {}}, min_length=1)
    auto: AutoConfig = AutoConfig()
    weights: dict[str, float] = {}  # of the calls without a wish, the share that a candidate answers in the default's place

    @field_validator("backends")
    @classmethod
    def _options_fit_their_backend(cls, backends: dict[str, dict[str, Any] | None]) -> dict[str, dict[str, Any] | None]:
        import attention  # here, for it brings torch: `longserve status` reads no options

        faults: list[str] = []
        for name, options in backends.items():
            model = attention.backend_class(name).Options  # ValueError names the backends there are
            try:
                model.model_validate(options or {})
            except ValidationError as error:
                faults += [f"{name}.{fault}" for fault in explain(error, model)]
        if faults:
            raise ValueError("; ".join(faults))
        return backends

    @model_validator(mode="after")
    def _default_is_allowed(self) -> AttentionConfig:
        if (self.default or "dense") not in (*self.backends, "auto", "native"):
            wanted = f"default must be auto, native or one of backends ({', '.join(self.backends)})"
            raise ValueError(f"{wanted}, received {self.default or 'none, which is dense'!r}")
        prefer = self.auto.prefer
        if len(set(prefer)) < len(prefer) or not {*prefer} <= {*self.backends, "native"}:
            raise ValueError(f"auto.prefer must name some of backends ({', '.join(self.backends)}), each once")
        shares = self.weights.values()
        if not {*self.weights} <= {*self.backends, "native"} or not all(share >= 0 for share in shares) or sum(shares) > 1:
            raise ValueError(f"weights must name some of backends ({', '.join(self.backends)}), with shares of 1 in all")
        return self

    def for_checkpoint(self, native: Mapping[str, Any] | None) -> AttentionConfig:
        """The switch as it serves a checkpoint: its default named, the checkpoint's own backend `native` filled in.

        native: the options of `native` that the checkpoint says, None where its own backend is dense.

        Raises:
            ValueError: it names `native` where that is dense; or it says of `native` what is the checkpoint's to say.
        """
        backends = dict(self.backends)
        if native is None:
            if "native" in (self.default, *self.auto.prefer, *self.weights, *backends):
                raise ValueError("native: this checkpoint sees everything in every layer, which is dense")
            return self.model_copy(update={"default": self.default or "dense"})
        options = backends.pop("native", None) or {}
        if strange := [name for name in native if options.get(name, native[name]) != native[name]]:
            raise ValueError(f"native.{strange[0]}: that is the checkpoint's to say, {native[strange[0]]}")
        backends = {"native": {**options, **native}, **backends}
        return self.model_copy(update={"default": self.default or "native", "backends": backends})


class UserConfig(Settings):
    """`user_config` of the deployment: all that `longserve apply` changes while replicas go on."""

    attention: AttentionConfig = AttentionConfig()


class ActorOptions(Settings):
    """What Ray reserves for one replica: bookkeeping for placement, no limit."""

    num_cpus: float | None = Field(default=None, ge=0)
    num_gpus: float | None = Field(default=None, ge=0)
    memory: float | None = Field(default=None, ge=0)
    resources: dict[str, float] | None = None
    accelerator_type: str | None = None
    runtime_env: dict[str, Any] | None = None


class DeploymentSection(Settings):
    """The one deployment of an application. All keys but `user_config` are Ray Serve's own."""

    name: Literal["longserve"] = DEPLOYMENT
    num_replicas: int | Literal["auto"] | None = None
    autoscaling_config: dict[str, Any] | None = None
    max_ongoing_requests: int | None = Field(default=None, gt=0)
    max_queued_requests: int | None = Field(default=None, ge=-1)
    max_replicas_per_node: int | None = Field(default=None, gt=0)
    max_surge_percent: int | None = Field(default=None, ge=0, le=100)
    graceful_shutdown_timeout_s: float | None = Field(default=None, ge=0)
    graceful_shutdown_wait_loop_s: float | None = Field(default=None, ge=0)
    health_check_period_s: float | None = Field(default=None, gt=0)
    health_check_timeout_s: float | None = Field(default=None, gt=0)
    ray_actor_options: ActorOptions | None = None
    user_config: UserConfig = UserConfig()


class ApplicationSection(Settings):
    """One application: one model under one base URL."""

    name: str = Field(default="longserve", min_length=1)
    route_prefix: str = Field(default="/", pattern="^/")
    import_path: Literal["service.app:build"] = IMPORT_PATH
    runtime_env: dict[str, Any] | None = None
    args: ServiceConfig = ServiceConfig()
    deployments: list[DeploymentSection] = Field(default=[DeploymentSection()], min_length=1, max_length=1)

    @model_validator(mode="after")
    def _backends_take_the_kv(self) -> ApplicationSection:
        if self.args.kv == "int8":
            import attention  # here, for it brings torch

            named = self.deployments[0].user_config.attention.backends
            if others := [name for name in named if not attention.backend_class(name).takes_int8]:
                raise ValueError(f"args.kv is int8, in which these backends cannot keep keys and values: {', '.join(others)}")
        return self


class HttpOptions(Settings):
    """The Serve proxy that listens. Fixed once it runs."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    root_path: str | None = None
    request_timeout_s: float | None = Field(default=None, gt=0)
    keep_alive_timeout_s: int | None = Field(default=None, gt=0)
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect. A name other than localhost counts as public."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class ServeFile(Settings):
    """A whole Serve config file."""

    proxy_location: Literal["HeadOnly", "EveryNode"] = "HeadOnly"
    http_options: HttpOptions = HttpOptions()
    applications: list[ApplicationSection] = Field(min_length=1)

    @model_validator(mode="after")
    def _public_address_needs_keys(self) -> ServeFile:
        for index, application in enumerate(self.applications):
            if not self.http_options.is_loopback and not application.args.http.asks_for_keys:
                raise ValueError(
                    f"http_options.host {self.http_options.host} can be reached from outside, so "
                    f"applications.{index}.args.http.api_keys_env must name an environment variable with API keys, "
                    "or api_keys_file a file with them"
                )
        return self

    def to_serve(self) -> dict[str, Any]:
        """The same as plain data, for Ray Serve's own schema."""
        return self.model_dump(mode="json", exclude_none=True)


class ConfigError(ValueError):
    """The operator's file cannot be served. The message names the file, each key and what is allowed there."""


def read(path: Path) -> ServeFile:
    """Read and check a Serve config file. Raises ConfigError."""
    try:
        # As JSON has it, for so Serve hands it on: a key that is a number, as a layer's, is text there
        raw = json.loads(json.dumps(yaml.safe_load(_content(path))))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no YAML: {' '.join(str(error).split())}") from error
    except (TypeError, ValueError, RecursionError) as error:  # a date, say, a list as a key, or what holds itself
        raise ConfigError(f"{path}: not to be told as JSON: {error}") from error
    try:
        return _with_absolute_models(ServeFile.model_validate(raw), path.resolve().parent)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {fault}" for fault in explain(error, ServeFile))) from error


def _content(path: Path) -> bytes:
    """A file's bytes, for YAML says itself how they are text. Raises OSError, and ConfigError for more than a config can be."""
    with path.open("rb") as file:
        content = file.read(MOST_FILE_BYTES + 1)
    if len(content) > MOST_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MOST_FILE_BYTES >> 20} MiB, which no config is")
    return content


def api_keys(config: HttpConfig) -> tuple[str, ...]:
    """The keys of the environment. Raises ValueError where the config asks for keys and environment or file have none."""
    if config.api_keys_file is not None:
        read_keys(Path(config.api_keys_file))  # in vain, but for its errors: the service reads it again and again
    return () if config.api_keys_env is None else _keys_in(config.api_keys_env, "api_keys_env")


def admin_keys(config: HttpConfig) -> tuple[str, ...]:
    """The keys that let into /admin; none: nobody is. Raises ValueError where the config names them and they are not there."""
    return () if config.admin_keys_env is None else _keys_in(config.admin_keys_env, "admin_keys_env")


def _keys_in(variable: str, field: str) -> tuple[str, ...]:
    keys = tuple(key.strip() for key in os.environ.get(variable, "").split(",") if key.strip())
    if not keys:
        raise ValueError(f"http.{field} is {variable}, but that environment variable holds no key")
    return keys


def read_keys(path: Path) -> list[KeyConfig]:
    """The entries of a key file. Raises ConfigError, which shows no key."""
    try:
        raw = yaml.safe_load(path.read_bytes())
        return KeysFile.model_validate(raw).keys
    except OSError as error:
        raise ConfigError(f"http.api_keys_file: {path}: {error.strerror}") from error
    except yaml.YAMLError:
        raise ConfigError(f"http.api_keys_file: {path}: no YAML") from None
    except ValidationError as error:
        faults = "; ".join(_without_values(fault) for fault in error.errors(include_url=False, include_input=False))
        raise ConfigError(f"http.api_keys_file: {path}: {faults}") from None


def _without_values(fault: ErrorDetails) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    return f"{where}: {fault['msg'].removeprefix('Value error, ')}"


WORDS = {
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "dict_type": "must be an object",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "too_short": "must hold at least {min_length}",
    "too_long": "may hold {max_length} at most",
    "string_too_short": "must be at least {min_length} long",
    "string_too_long": "may be at most {max_length} long",
    "union_tag_invalid": "type must be {expected_tags}",
    "union_tag_not_found": "must have a type",
}
"""Faults that pydantic tells in words of Python's, by its name for them."""


def worded(fault: ErrorDetails) -> str:
    """What is wrong with a value, in words of JSON's and ours."""
    told = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return WORDS.get(fault["type"], "{0}").format(told, **fault.get("ctx", {}))


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line per fault: the key's path, what is wrong, and for an unknown key the keys allowed there."""
    return [_explain_one(fault, model) for fault in error.errors(include_url=False)]


def _explain_one(fault: ErrorDetails, model: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key, allowed here: {', '.join(_keys_at(model, fault['loc'][:-1]))}"
    message, found = worded(fault), fault["input"]
    received = "" if isinstance(found, (dict, list)) or "received" in message else f", received {found!r:.200}"
    return f"{where}: {message}{received}" if where else f"{message}{received}"


def _keys_at(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """The fields of the settings that stand at a path inside `model`."""
    for part in path:
        if isinstance(part, str):
            model = _settings_in(model.model_fields[part].annotation)
    return list(model.model_fields)


def _settings_in(annotation: Any) -> type[BaseModel]:
    """The settings class in an annotation such as `X`, `list[X]` or `X | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [inner for inner in get_args(annotation) if inner is not type(None)]
    assert len(found) == 1, f"no single settings class in {annotation}"
    return _settings_in(found[0])


def _with_absolute_models(file: ServeFile, folder: Path) -> ServeFile:
    """The file with its model directories and key files made absolute: replicas run elsewhere."""

    def absolute(args: ServiceConfig) -> ServiceConfig:
        http, keys = args.http, args.http.api_keys_file
        if keys is not None:
            http = http.model_copy(update={"api_keys_file": str(folder / keys)})
        model = args.model if args.model == "embedded" else str(folder / args.model)
        return args.model_copy(update={"model": model, "http": http})

    changed = [app.model_copy(update={"args": absolute(app.args)}) for app in file.applications]
    return file.model_copy(update={"applications": changed})
