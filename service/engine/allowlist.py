"""The allow-list: the backends that requests may run under, and what each needs in order to serve.

A `Lane` is all that the engine knows of a backend: how it answers a layer's question, what it keeps of a sequence, what both
cost. Which backend answers which layer, causally or both ways, and where its states lie, is settled here and in `Course`.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from attention import AttentionBackend, Passage, Segments, StatePool, shares, whole
from service.config import AutoConfig, LookupConfig
from service.engine.forecast import Attending, Course, Drift, Pace, Ramp, measure_attention
from service.engine.profile import Profile
from service.engine.request import AUTO, Sampling, Withdrawn
from service.model.transformer import Transformer

NO_LOOKUP = LookupConfig(tokens=0)
GUESSED = ", guessed"
"""What the key of a pace ends with that was measured with the rows of guesses."""

LEAST_PRICE = 0.02  # of a guessed token's row: a forecast may be off
BOTH_WAYS = "bidirectional, for the model is an encoder; causal"


@dataclass(frozen=True)
class Backends:
    """Backends by name in the operator's order, and the default, one of them or `auto`.

    Raises:
        ValueError: an empty list, a default that is not in it, or a backend that does not answer as the model attends.
    """

    by_name: Mapping[str, AttentionBackend]
    default: str
    auto: AutoConfig = field(default_factory=AutoConfig)
    weights: Mapping[str, float] = field(default_factory=dict)
    is_causal: bool = True  # the model is a decoder

    def __post_init__(self) -> None:
        if not self.by_name:
            raise ValueError("attention.backends must name at least one backend")
        if self.default not in (*self.by_name, AUTO):
            raise ValueError(f"attention.default must be {AUTO} or one of {', '.join(self.by_name)}, received {self.default!r}")
        if others := [name for name, backend in self.by_name.items() if self.is_causal not in backend.directions]:
            wanted = "causal, for the model is a decoder; bidirectional" if self.is_causal else BOTH_WAYS
            raise ValueError(f"attention.backends must be {wanted} only: {', '.join(others)}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.by_name)


@dataclass(eq=False)
class Lane:
    """One backend in force, ready to serve: its forecast, how that has held, the pool of its states, which has the backend of
    each layer, and that of the prefixes that are kept."""

    name: str
    backend: AttentionBackend
    course: Course
    pool: StatePool
    kept: StatePool = field(init=False)
    drift: Drift = field(default_factory=Drift)
    withdrawn: str | None = None  # why nothing more is answered under it
    lookup: LookupConfig = NO_LOOKUP

    def __post_init__(self) -> None:
        self.kept = StatePool(self.pool.backends, self.pool.max_bytes)

    def apart(self) -> Lane:
        """The same with room for states of its own, which no level counts."""
        return Lane(self.name, self.backend, self.course, StatePool(self.pool.backends, self.pool.max_bytes))

    @property
    def is_whole(self) -> bool:
        """Whether texts are read whole, and nothing is kept of them: the model is an encoder."""
        return self.pool.slot_bytes(1) == 0

    def refusal(self) -> Withdrawn:
        """What callers are told while it is withdrawn."""
        return Withdrawn(f"attention backend {self.name} is withdrawn: {self.withdrawn}", param="attention")

    def prefill_seconds(self, tokens: int, done: int = 0, kind: str = "prefill") -> float:
        """Predicted seconds of a prompt's tokens behind the first `done`, as steps of the kind have lately gone."""
        return self.drift(kind) * (self.course.seconds(tokens) - self.course.seconds(done))

    def decode_seconds(self, length: int) -> float:
        """The same of a decode step that makes a sequence `length` tokens long."""
        return self.drift("decode") * self.course.decode_seconds(length)

    def most_guessed(self, sampling: Sampling) -> int:
        """Tokens that may be guessed for a step of one of a request's samples."""
        wish = sampling.lookup_tokens
        return self.lookup.tokens if wish is None else min(wish, self.lookup.tokens)

    def row_price(self, sequences: int, length: int) -> float:
        """What one row more of a decode step takes, in parts of what each of its sequences' tokens takes without."""
        plain, more = self.plain_seconds(sequences, length), sequences * self.lookup.tokens
        wide = self.drift("guess") * (plain + more * self.course.row_seconds(length))
        return max(LEAST_PRICE, (wide - plain) / more * sequences / plain) if plain > 0 else 1.0

    def plain_seconds(self, sequences: int, length: int) -> float:
        """Predicted seconds of a decode step of so many sequences without guesses, as such steps have lately gone."""
        one = self.course.decode_seconds(length)
        return self.drift("decode") * self.course.rows_seconds(sequences, one)

    def answering(
        self,
        layer: int,
        question: tuple[Tensor, Tensor, Tensor],
        segments: Segments,
        slots: Sequence[int],
        out: Tensor,
        by_steps: bool = False,
    ) -> Iterator[None]:
        """Answer a layer's question, q (T, H, D), k and v (T, G, D), into `out` (T, H, D), pausing about every millisecond.

        `slots`: each sequence's state, which takes its new tokens in. `by_steps`: as so many decode steps would.
        """
        return self.pool.backends[layer].extending(*question, segments, self.pool, layer, slots, out, by_steps)

    def passage(self, slots: Sequence[int], segments: Segments) -> Passage | None:
        """What answers a decode step of these slots at all layers at once; None where it goes layer by layer."""
        return Passage.of(self.pool, slots, segments)

    def take_back(self, slot: int, tokens: int) -> None:
        """Leave a state as if only the first `tokens` tokens were in it; those behind them were answered by steps."""
        self.pool.take_back(slot, tokens)

    def allocate(self, max_tokens: int) -> int:
        """A slot for the state of a sequence of up to `max_tokens` tokens. Raises PoolExhausted."""
        return self.pool.allocate(max_tokens)

    def copy(self, slot: int) -> int:
        """A slot that goes on from where `slot` stands. Raises PoolExhausted."""
        return self.pool.copy(slot)

    def release(self, slot: int) -> None:
        """Give a slot back."""
        self.pool.release(slot)

    def keep(self, slot: int, tokens: int) -> int:
        """A copy of the state of a sequence's first `tokens` tokens, among those that are kept. Raises PoolExhausted."""
        return self.kept.adopt(self.pool, slot, tokens, tokens)

    def resume(self, kept: int, tokens: int, max_tokens: int) -> int:
        """A slot that goes on from the first `tokens` of a kept state. Raises PoolExhausted."""
        return self.pool.adopt(self.kept, kept, tokens, max_tokens)

    def drop(self, kept: int) -> None:
        """Give a kept state back."""
        self.kept.release(kept)

    def state_bytes(self, max_tokens: int) -> int:
        """Bytes that such a slot takes, by the law of cost."""
        return self.pool.slot_bytes(max_tokens)

    def undo_bytes(self, max_tokens: int, count: int) -> int:
        """Bytes kept of such a slot while `count` tokens may be taken back."""
        return self.pool.undo_bytes(max_tokens, count)

    def held_bytes(self, slots: Iterable[int]) -> int:
        """Bytes that slots hold, by their tensors."""
        return sum(tensor.nbytes for slot in slots for tensor in self.pool.tensors(slot).values())

    @property
    def bytes_in_use(self) -> int:
        return self.pool.bytes_in_use

    @property
    def num_slots(self) -> int:
        return len(self.pool)


def unmeasured(name: str, backend: AttentionBackend, model: Transformer, chunk: int, budget: int) -> Lane:
    """A lane that can be asked for bytes only: no pace was measured. Room is for states of `budget` bytes."""
    none, serving = Ramp(0.0, 0.0), _serving(backend, model)
    attending = dict.fromkeys(shares(serving), Attending(none, none, none))
    pace = Pace(model.config.num_hidden_layers, none, none, attending, serving)
    return _lane(name, backend, model, pace, chunk, budget)


def check_room(lane: Lane, budget: int) -> None:
    """Raise ValueError where so many bytes do not hold the shortest request under a backend."""
    if (needed := lane.state_bytes(1) + lane.course.prefill_bytes(1)) > budget:
        raise ValueError(f"{lane.name} needs {needed} bytes for a request of one token, a replica's budget is {budget}")


def _serving(backend: AttentionBackend, model: Transformer) -> AttentionBackend:
    """What answers the layers: an encoder reads a text at once, whatever its length, and keeps nothing of it."""
    return backend if model.config.is_causal else whole(backend)


def _lane(
    name: str,
    backend: AttentionBackend,
    model: Transformer,
    pace: Pace,
    chunk: int,
    budget: int,
    lookup: LookupConfig = NO_LOOKUP,
) -> Lane:
    longest = model.config.max_length
    course = Course(model, pace, longest, chunk if model.config.is_causal else longest)
    return Lane(name, backend, course, pace.backend.new_pool(model.config.num_hidden_layers, budget), lookup=lookup)


def lane_for(
    name: str,
    backend: AttentionBackend,
    model: Transformer,
    paces: tuple[Ramp, Ramp],
    profile: Profile,
    chunk: int,
    budget: int,
    lookup: LookupConfig,
) -> Generator[None, None, Lane]:
    """Make a backend ready to serve, in parts: its pace beside the model's, and room for states of `budget` bytes.

    The pace is the profile's; what is not in it is measured and kept there.
    """
    serving = _serving(backend, model)
    kinds = list(shares(serving))
    has_guesses = lookup.tokens > 0
    key = json.dumps(backend.describe(), sort_keys=True, default=str) + GUESSED * has_guesses
    lines = profile.recall(key, 3 * len(kinds))
    if lines is None:
        longest, has_history = model.config.max_length, model.config.is_causal
        measured = yield from measure_attention(serving, longest, chunk, has_guesses, has_history)
        lines = [line for kind in kinds for line in (measured[kind].many, measured[kind].one, measured[kind].more)]
        profile.keep(key, lines)
    return paced(name, backend, model, paces, lines, chunk, budget, lookup)


def paced(
    name: str,
    backend: AttentionBackend,
    model: Transformer,
    paces: tuple[Ramp, Ramp],
    lines: Sequence[Ramp],
    chunk: int,
    budget: int,
    lookup: LookupConfig = NO_LOOKUP,
) -> Lane:
    """A lane whose pace is known: the model's, and the lines of its layers' attention as `lines_of` has them."""
    serving = _serving(backend, model)
    attending = dict(zip(shares(serving), map(Attending, lines[::3], lines[1::3], lines[2::3]), strict=True))
    pace = Pace(model.config.num_hidden_layers, *paces, attending, serving)
    return _lane(name, backend, model, pace, chunk, budget, lookup)


def lines_of(lane: Lane) -> list[Ramp]:
    """The pace of a lane's attention: three lines of each kind of layer."""
    return [line for each in lane.course.pace.attention.values() for line in (each.many, each.one, each.more)]
