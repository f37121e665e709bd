"""Who may run: the allow-list of backends, and the verdict on one request before anything is computed.

Admission is by bytes: a request's state and workspace are known from its backend's cost law before it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from attention import AttentionBackend

AUTO = "auto"


@dataclass(frozen=True)
class Backends:
    """The allow-list: backends by name in the operator's order, and the default, one of them or `auto`.

    Raises:
        ValueError: an empty list, or a default that is not in it.
    """

    by_name: Mapping[str, AttentionBackend]
    default: str

    def __post_init__(self) -> None:
        if not self.by_name:
            raise ValueError("attention.backends must name at least one backend")
        if self.default not in (*self.by_name, AUTO):
            raise ValueError(f"attention.default must be {AUTO} or one of {', '.join(self.by_name)}, received {self.default!r}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.by_name)


@dataclass(frozen=True)
class Plan:
    """What a request would cost and whether it would be admitted now."""

    backend: str
    why: str
    prompt_tokens: int
    total_tokens: int  # prompt and max_tokens
    terms: Mapping[str, int]  # bytes by term: state, workspace, ...
    needed_bytes: int  # the sum of the terms
    budget_bytes: int
    free_bytes: int
    verdict: Literal["runs", "queues", "refused"]
    reason: str | None  # the refusal's code; None unless refused
    longest_tokens: int  # longest total that fits the whole budget under this backend, at most the model's context
    backends_that_fit: tuple[str, ...]
    predicted_seconds: Mapping[str, float]  # queue, prefill, decode
