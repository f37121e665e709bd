"""What the HTTP layer stands on: one replica's model, engine and facts. `service/replica.py` is one; tests need no other.

Types of the engine are named for the checker only: this package runs without torch and without Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from service.config import AttentionConfig, HttpConfig

if TYPE_CHECKING:
    from service.engine.engine import Engine
    from service.engine.request import Task
    from service.exposition import Format
    from service.http.reader import Reader
    from service.model.chat import ChatTemplate


class Tokenizer(Protocol):
    """Text to tokens and back. Called from several threads."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def leading(self) -> int: ...

    @property
    def trailing(self) -> int: ...

    @property
    def longest_token_bytes(self) -> int | None: ...

    @property
    def chat(self) -> ChatTemplate:
        """Raises NoTemplate. For one thread only."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def encode_pair(self, first: str, second: str) -> tuple[list[int], int, int | None]: ...

    def spans(self, text: str, add_special_tokens: bool, size: int) -> Sequence[tuple[int, int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def bytes_of(self, ids: Iterable[int]) -> bytes: ...

    def token_bytes(self, token: int) -> bytes: ...

    def stranger(self, ids: Sequence[int]) -> int | None: ...


@dataclass(frozen=True)
class ModelCard:
    """What callers may know of the model."""

    id: str
    created: int  # seconds since 1970 at which this replica had it ready
    max_length: int  # most tokens of prompt and answer together
    width: int  # numbers in an embedding
    tasks: tuple[Task, ...] = ("completion", "embedding")  # what may be asked for
    labels: tuple[str, ...] = ()  # of a classifier
    is_normalized: bool = True  # embeddings have length one unless somebody asks for others
    prompts: Mapping[str, str] = field(default_factory=dict)  # by name: what stands before a text that is embedded
    default_prompt: str | None = None  # the name of the one that stands there unasked


class Admin(Protocol):
    """What an operator may do over HTTP, to all replicas of the application at once."""

    async def states(self) -> Sequence[Mapping[str, Any]]:
        """Each replica's switch, with its history."""

    async def switch(self, attention: AttentionConfig) -> Sequence[Mapping[str, Any]]:
        """Put another switch in force for good. Returns the states when each replica has switched, or failed to.

        Raises ValueError for a backend that cannot serve; nothing has changed then.
        """

    async def check_truth(self) -> Sequence[Mapping[str, Any]]:
        """Check what serves against its definition: each replica's verdicts."""


class Host(Protocol):
    """One replica, as the routes see it."""

    @property
    def admin(self) -> Admin: ...

    @property
    def config(self) -> HttpConfig: ...

    @property
    def card(self) -> ModelCard: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def reader(self) -> Reader:
        """What bodies and texts are read with."""

    @property
    def engine(self) -> Engine:
        """The engine. Raises NotReady until it has been warmed up."""

    @property
    def backends(self) -> Sequence[str]:
        """The allow-list in force. Raises NotReady as `engine` does."""

    def lossy(self, backend: str) -> str | None:
        """Why answers under a backend are not those the checkpoint was trained to give; None: they are."""

    def fault(self) -> str | None:
        """Why this replica should be replaced; None when it is alive."""

    def readiness(self) -> Mapping[str, Any]:
        """The state of the attention switch, with `ready` true when requests are answered."""

    def info(self) -> Mapping[str, Any]:
        """Facts and limits in force."""

    async def metrics(self, format: Format, is_fresh: bool) -> bytes:
        """All replicas' metrics, as they are now or were up to a second ago."""

    def responded(self, route: str, method: str, status: int) -> None:
        """Told of every response: the route's template, never the caller's path."""
