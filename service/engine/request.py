"""One request's life as data: what was asked, what comes back, what it took, and how it can fail.

The engine's face is these records and `Engine.submit`. No HTTP here: `service/http` maps the errors to statuses.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from service.model.pooling import Pooling as Pooling  # the HTTP layer knows no model
from service.model.pooling import Task as Task
from service.timing import Timings

if TYPE_CHECKING:
    from service.engine.grammar import Grammar

FinishReason = Literal["stop", "length"]

AUTO = "auto"
"""In the place of a backend's name: whichever is predicted to serve best, see `choice`."""

ROUTES: Mapping[Task, str] = {
    "completion": "/v1/completions, /v1/chat/completions",
    "embedding": "/v1/embeddings",
    "classification": "/v1/classify, /v1/score, /v1/rerank",
}
"""Where each kind is asked for."""

MOST_QUOTED = 200
"""Characters of a caller's own words in one message."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Defaults are OpenAI's, but for `max_tokens`, which the HTTP layer always states."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    stop: tuple[str, ...] = ()
    seed: int | None = None  # 64 bits, signed; None: drawn by the engine
    logprobs: int | None = None  # number of alternatives per token; None: no logprobs at all
    echo: bool = False  # the prompt's own tokens come first (with their logprobs when those are asked for)
    ignore_eos: bool = False
    min_p: float = 0.0  # a token less likely than so many times the likeliest is never drawn
    presence_penalty: float = 0.0  # off the logit of each token that the answer has had
    frequency_penalty: float = 0.0  # off it once more for each time
    repetition_penalty: float = 1.0  # of each token of prompt and answer: a logit above 0 is divided by it, else multiplied
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    stop_token_ids: tuple[int, ...] = ()  # end the answer, and are not shown
    min_tokens: int = 0  # of an answer, before any token may end it; stop strings may
    grammar: Grammar | None = None  # what the answer's text must be
    lookup_tokens: int | None = None  # most that are guessed for a step; None: as many as the config has it

    def is_end(self, token: int, eos_ids: Collection[int]) -> bool:
        """Whether a drawn token ends the answer."""
        return token in self.stop_token_ids or (token in eos_ids and not self.ignore_eos)


@dataclass(frozen=True)
class Constraint:
    """What an answer's text must be."""

    kind: Literal["json", "regex", "choice"]
    text: str  # a schema as JSON, a pattern, a list of strings as JSON
    source: str  # the caller's name for it


@dataclass
class Request:
    """One prompt under one backend. `n` samples share its prefill; a list of prompts is several requests."""

    id: str
    kind: Task
    tokens: Sequence[int]
    backend: str | None = None  # None: the config's default (which may be `auto`)
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    deadline: float | None = None  # time.monotonic() value after which nobody waits for the answer
    arrival: float = field(default_factory=time.monotonic)
    timings: Timings = field(default_factory=Timings)
    trace: Mapping[str, str] = field(default_factory=dict)  # the caller's W3C trace context, by header
    ticket: str = ""  # by which whoever sent the call here knows it
    leading: int = 0  # of the tokens: special ones that the service put in front of a text; an echo leaves them out
    pooling: Pooling | None = None  # of an embedding; None: the checkpoint's
    is_ended: bool | None = None  # an embedding at length one, scores activated; None: as the checkpoint has it
    second: int | None = None  # where a pair's second text begins
    late_chunks: int | None = None  # tokens of a text that make an embedding each; None: all of them make one
    owner: str = ""  # who asks: a prefix that was computed for one is no other's, unless the config says so
    reuses: bool = True  # may go on from a kept prefix, and leave one
    source: str | None = None  # the caller's name for what the tokens come from; None: by kind
    max_seconds: float | None = None  # to `auto`, in place of the config's
    prefer: tuple[str, ...] = ()  # the same, best first
    caller: str = ""  # by whom a share of the calls is told from the rest: whoever is the same always belongs to it

    @property
    def total_tokens(self) -> int:
        """Most tokens one sequence of it may have."""
        return len(self.tokens) + (0 if self.is_pooled else self.sampling.max_tokens)

    @property
    def is_pooled(self) -> bool:
        """Whether its answer is made of vectors: no token is drawn."""
        return self.kind != "completion"

    @property
    def param(self) -> str:
        """The caller's name for what the tokens come from."""
        return self.source or ("input" if self.is_pooled else "prompt")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability and the likeliest alternatives at its place. `logprob` is None for a first prompt token."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """One step of one sample of a completion: newly settled text and the tokens behind it.

    `text` never ends inside a UTF-8 sequence nor inside what may become a stop string. The last delta of a sample
    has a `finish_reason`. With `echo` the first delta of a sample carries the prompt. What a reader was too slow to take
    comes to it as one delta.
    """

    index: int  # which of the n samples
    text: str
    tokens: Sequence[int]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Embedding:
    """The answer to a request for an embedding, or for scores: a vector, float32, as a list of floats, of each late chunk."""

    vectors: list[list[float]]

    @property
    def vector(self) -> list[float]:
        """The only one."""
        (vector,) = self.vectors
        return vector


def quoted(value: object, most: int = MOST_QUOTED) -> str:
    """A caller's value as a message shows it, within `most` characters or so: a container only by its size."""
    if value is None or isinstance(value, bool):
        return {None: "null", False: "false", True: "true"}[value]
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)} fields"
    if not isinstance(value, str):
        return repr(value)
    whole = repr(value[:most])
    return whole if len(value) <= most and len(whole) <= most + 2 else f"{whole[: most - 1]}... ({len(value)} characters)"


class RequestError(Exception):
    """A request that gets no answer, through the caller's fault or the hour's. `code` is the machine's word for it."""

    code = "request_error"

    def __init__(self, message: str, *, param: str | None = None, details: dict[str, object] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.details = details or {}


class InvalidRequest(RequestError):
    """Something in the request is not allowed: the message says what is wrong and what is allowed."""

    code = "invalid_request"


class UnknownBackend(InvalidRequest):
    """The backend is not in the allow-list."""

    code = "unknown_backend"

    def __init__(self, asked: str, allowed: Iterable[str], param: str = "attention") -> None:
        message = f"attention backend {quoted(asked)} is not allowed here; allowed are {', '.join(allowed)}"
        super().__init__(message, param=param)


class TaskNotOffered(InvalidRequest):
    """The model was not made for this: the message names what it was made for."""

    code = "task_not_offered"


def check_task(asked: Task, offered: Collection[Task]) -> None:
    """Raise TaskNotOffered unless the model was made for what is asked."""
    if asked not in offered:
        can = " and ".join(f"{task} ({ROUTES[task]})" for task in offered)
        raise TaskNotOffered(f"this model offers {can}, not {asked}")


class ContextTooLong(InvalidRequest):
    """Prompt and max_tokens together pass the model's context; the message has both numbers."""

    code = "context_length_exceeded"


class NeverFits(InvalidRequest):
    """More bytes than the whole budget. details: needed_bytes, budget_bytes, longest_tokens, backends_that_fit."""

    code = "memory_budget_exceeded"


class QueueFull(RequestError):
    """The queue is at its bound. `retry_after_seconds` is computed from the work in front."""

    code = "queue_full"

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Draining(RequestError):
    """The service is stopping and admits nothing more, or told this request to go elsewhere."""

    code = "draining"


class DeadlineExceeded(RequestError):
    """The request's deadline passed before its answer was complete."""

    code = "deadline_exceeded"


class Withdrawn(RequestError):
    """The backend was found to answer otherwise than its definition says; the message says by how much."""

    code = "backend_withdrawn"


class OutOfMemory(RequestError):
    """The machine refused memory to this request alone, after its batch was split."""

    code = "out_of_memory"


class PrefixNotKept(RequestError):
    """There is no room now for a prefix that is to be pinned: what runs or is pinned holds it."""

    code = "prefix_not_kept"


class ModelFailed(RequestError):
    """The model call failed for this request alone. Our fault: a 500, counted."""

    code = "model_failed"
