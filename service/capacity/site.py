"""What a replica is made of when it is only thought of: the lanes, budget and limits of a real one, as that tells them.

Everything comes from what `/info` says of a replica, one that runs somewhere or one that was started here for a moment, and
from the config of its model; no weights are loaded for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import attention
from service.config import AutoConfig, EngineConfig, ServiceConfig
from service.engine.allowlist import Backends, Lane, paced
from service.engine.forecast import Drift, Ramp
from service.model import checkpoint
from service.model.pooling import Task
from service.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Surroundings:
    """What a replica shares with others: measured by `probe`, nothing where it was not."""

    call_seconds: float = 0.0  # of HTTP, proxy included, for each call
    token_seconds: float = 0.0  # the same for each token of a stream
    crowding: float = 1.0  # times as long that a step takes when all replicas of its machine compute


@dataclass(frozen=True)
class Site:
    """A replica's parts that never change; any number of replicas share them."""

    lanes: Mapping[str, Lane]
    rules: Backends
    config: EngineConfig
    budget: int
    packs: bool  # prompts may share a step
    vocab_size: int
    max_length: int
    tasks: Collection[Task]
    tokenizer: Tokenizer
    threads: int
    cpus: int  # of the machine that it was told on
    around: Surroundings = field(default_factory=Surroundings)


class Steady(Drift):
    """A drift that stays as it was told."""

    def __init__(self, told: Mapping[str, float]) -> None:
        super().__init__()
        self._told = dict(told)

    def __call__(self, kind: str) -> float:
        return self._told.get(kind, 1.0)


def told(info: Mapping[str, Any], args: ServiceConfig, auto: AutoConfig | None = None) -> Site:
    """The site of a replica that tells `info`; `args` names its model.

    Raises:
        ValueError: the model that `args` names is another, or the replica tells no laws.
    """
    directory = checkpoint.EMBEDDED if args.model == "embedded" else Path(args.model)
    config = checkpoint.read_config(directory).up_to(info["max_model_len"]).keeping(info["kv"])
    if "laws" not in info or config.max_length != info["max_model_len"]:
        what = "tells no laws" if "laws" not in info else f"has a context of {info['max_model_len']} tokens"
        raise ValueError(f"the replica {what}, and {directory} is not what it serves or its version is another")
    laws, engine = info["laws"], _engine(info["engine"])
    model = checkpoint.outline(config).to(checkpoint.DTYPES[info["dtype"]])
    for layer in model.stack:
        layer.is_native = info["impl"] == "native"
    shape, budget = config.head_shape(model.dtype, "cpu"), info["memory_budget_bytes"]
    backends = {each["name"]: attention.build(each["name"], _options(each), shape) for each in info["attention"]["backends"]}
    lanes, paces = {}, (Ramp(*laws["model"][0]), Ramp(*laws["model"][1]))
    for name, backend in backends.items():
        law = laws["backends"][name]
        lines = [Ramp(*line) for line in law["lines"]]
        lanes[name] = paced(name, backend, model, paces, lines, engine.chunk_tokens, budget)
        lanes[name].drift = Steady(law["drift"])
    rules = Backends(backends, info["attention"]["default"], auto or AutoConfig(), is_causal=config.is_causal)
    tokenizer = Tokenizer.load(directory, config.eos_token_id, config.vocab_size)
    vocabulary, longest, tasks = config.vocab_size, config.max_length, config.tasks
    threads, cpus = info["threads"], laws["cpus"]
    return Site(lanes, rules, engine, budget, laws["packs"], vocabulary, longest, tasks, tokenizer, threads, cpus)


def _engine(told: Mapping[str, Any]) -> EngineConfig:
    """Its limits. No two calls of a simulation begin alike, so no prefix is kept."""
    return EngineConfig.model_validate({**told, "prefix_share": 0.0})


def _options(told: Mapping[str, Any]) -> dict[str, Any]:
    """Of a backend: who computes it is settled where it serves, and the same laws hold here."""
    return {name: value for name, value in told["options"].items() if name != "impl"}
