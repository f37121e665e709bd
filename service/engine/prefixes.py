"""Prefix states: what was computed of a prompt's beginning is kept, and the next request that begins alike goes on from there.

A chunk of a prompt always begins at a multiple of `chunk_tokens`, so the state behind whole chunks is the same whoever computed
it, and an answer with it is the same to the bit. A beginning is known by its mark: the SHA-256 of the mark of the chunks before
and the chunk's tokens, the first of them that of who asked and on which side of `Transformer.border`; backend and options stand
in the lane, whose pool keeps it.

Kept are the state at the end of a prompt's last whole chunk and of the one before, for the question behind a text may have
begun in between, and at the last place up to which an earlier prompt was the same. Where a state holds each of its beginnings
(dense), the last is enough.

Kept states have what no request has reserved of the memory budget, up to `prefix_share` of it. Which one goes first is told by
GreedyDual-Size (Cao and Irani, USITS 1997): the seconds per byte that it saves, counted from its last use. Owned by the event
loop between steps and by the model thread during one, as jobs are; `find` may be asked at any time. What a caller has pinned
goes last: see `pins`.
"""

from __future__ import annotations

import hashlib
import logging
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from service.engine.admission import Ledger
from service.engine.allowlist import Lane
from service.engine.pins import Pin, Pins
from service.engine.request import InvalidRequest, Request

MOST_REMEMBERED = 1 << 14  # marks of earlier prompts, some 150 bytes each

logger = logging.getLogger(__name__)

Marks = tuple[bytes, ...]


@dataclass(eq=False)
class Kept:
    """The state of a prompt's beginning: a slot that no request owns."""

    lane: Lane
    slot: int
    tokens: int
    num_bytes: int
    marks: Marks  # of the beginnings that it serves
    worth: float = 0.0  # the least goes first

    @property
    def state(self) -> tuple[Lane, bytes]:
        """What it is the state of: its lane, and the mark at its end."""
        return self.lane, self.marks[-1]


@dataclass(frozen=True)
class Found:
    """What a request can go on from: the first `tokens` of its prompt."""

    kept: Kept
    tokens: int


class Prefixes:
    """The kept states of all lanes."""

    def __init__(self, ledger: Ledger, chunk: int, share: float, is_shared: bool, border: int | None = None) -> None:
        """`share`: of the ledger's budget, at most; 0 keeps nothing. `is_shared`: one owner's are everybody's. `border`: as of
        `Transformer.border`: a beginning's state is another on either side."""
        self.lanes: Collection[Lane] = ()  # in force: for others nothing is kept
        self.limit = int(share * ledger.budget)
        self.pins = Pins()
        self.num_bytes = self.hits = self.misses = self.evictions = 0
        self._ledger = ledger
        self._chunk = chunk
        self._is_shared = is_shared
        self._border = border
        self._kept: list[Kept] = []
        self._serving: dict[tuple[Lane, bytes], tuple[Kept, ...]] = {}  # by mark; replaced, never changed: `find` reads beside
        self._remembered: OrderedDict[tuple[Lane, bytes], None] = OrderedDict()
        self._unwanted: list[Callable[[Kept], bool]] = []
        self._floor = 0.0  # worth of the last that had to go: age, as GreedyDual counts it

    def __len__(self) -> int:
        return len(self._kept)

    # ---- the question -----------------------------------------------------------------------------------------------

    def marks(self, request: Request, prompt: array[int]) -> Marks:
        """The marks of a prompt's whole chunks; none where the request must see all of it, or nothing is kept."""
        if not self.limit or request.is_pooled or request.sampling.echo or not request.reuses:
            return ()
        owner = b"" if self._is_shared else request.owner.encode()
        is_short = self._border is not None and request.total_tokens <= self._border
        mark, found, raw = hashlib.sha256(owner + b"\0short" * is_short).digest(), [], memoryview(prompt)
        for start in range(0, len(prompt) - self._chunk + 1, self._chunk):
            mark = hashlib.sha256(mark + raw[start : start + self._chunk].cast("B")).digest()
            found.append(mark)
        return tuple(found)

    def find(self, lane: Lane, marks: Marks, length: int) -> Found | None:
        """The longest beginning of a prompt of `length` tokens that is kept; a token is left to be processed."""
        for count in range(min(len(marks), (length - 1) // self._chunk), 0, -1):
            if serving := self._serving.get((lane, marks[count - 1])):
                return Found(serving[-1], count * self._chunk)
        return None

    # ---- what is pinned ---------------------------------------------------------------------------------------------

    def pin(self, request: Request, lane: Lane, prompt: array[int], seconds: float) -> Pin:
        """A pin of a prompt's whole chunks, whose state the next request that begins with them leaves.

        Raises:
            InvalidRequest: nothing is kept here, or the prompt has no whole chunk.
            NeverFits, PrefixNotKept, InvalidRequest: see `Pins.add`.
        """
        if not self.limit:
            raise InvalidRequest("no prefixes are kept here: engine.prefix_share is 0")
        marks = self.marks(request, prompt)
        if not marks:
            message = f"only whole chunks of {self._chunk} tokens are kept, received {len(prompt)} tokens"
            raise InvalidRequest(message, param=request.param)
        tokens, read_by = len(marks) * self._chunk, time.monotonic() if request.deadline is None else request.deadline
        pin = Pin(request.owner, lane, marks[-1], tokens, lane.state_bytes(tokens), read_by + seconds)
        self.pins.add(pin, self.limit)
        return pin

    def unpin(self, pin: Pin) -> None:
        """End a pin, and let go of its state before the next step unless another pin holds it."""
        self.pins.remove(pin)
        state = (pin.lane, pin.mark)
        self.forget(lambda kept: kept.state == state and state not in self.pins.states())

    def is_kept(self, lane: Lane, mark: bytes) -> bool:
        """Whether a state ends exactly there."""
        return any(kept.marks[-1] == mark for kept in self._serving.get((lane, mark), ()))

    # ---- what is kept -----------------------------------------------------------------------------------------------

    def enter(self, lane: Lane, marks: Marks, found: Found | None) -> frozenset[int]:
        """Note that a prompt's processing begins, behind what was found; returns at which of its tokens to keep a state."""
        if found is not None:
            self.hits += 1
            self._use(found.kept)
        elif marks:
            self.misses += 1
        wanted = self._wanted(lane, marks)
        for mark in marks:
            self._remembered[lane, mark] = None
            self._remembered.move_to_end((lane, mark))
        while len(self._remembered) > MOST_REMEMBERED:
            self._remembered.popitem(last=False)
        return wanted

    def _wanted(self, lane: Lane, marks: Marks) -> frozenset[int]:
        fitting = [n for n in range(1, len(marks) + 1) if lane.state_bytes(n * self._chunk) <= self.limit]
        if lane.backend.keeps_all:
            counts = fitting[-1:]
        else:
            counts = fitting[-2:] + [n for n in fitting if (lane, marks[n - 1]) in self._remembered][-1:]
        return frozenset(n * self._chunk for n in counts)

    def keep(self, lane: Lane, slot: int, marks: Marks, tokens: int) -> None:
        """Keep a copy of a slot's state, which is that of the first `tokens` of a prompt. That it cannot be harms nobody."""
        marks = marks[: tokens // self._chunk]
        serving, is_wished = self._serving.get((lane, marks[-1])), (lane, marks[-1]) in self.pins.states()
        if serving and (not is_wished or self.is_kept(lane, marks[-1])):
            self._use(serving[-1])
            return
        try:
            self._keep(lane, slot, marks, tokens)
        except Exception:  # memory that the machine refuses, above all: whose state it is goes on without
            logger.exception("a prefix of %d tokens could not be kept", tokens)

    def _keep(self, lane: Lane, slot: int, marks: Marks, tokens: int) -> None:
        num_bytes, room = lane.state_bytes(tokens), min(self.limit, self._ledger.free)
        wished = self.pins.states()
        pinned = [each for each in self._kept if each.state in wished]
        if lane not in self.lanes or num_bytes + sum(each.num_bytes for each in pinned) > room:
            return
        if lane.backend.keeps_all:  # serves its own beginnings, too
            for each in [each for each in self._kept if each.lane is lane and each.marks[-1] in marks and each not in pinned]:
                self._drop(each)
        self.make_room(room - num_bytes)
        kept = Kept(lane, lane.keep(slot, tokens), tokens, num_bytes, marks if lane.backend.keeps_all else marks[-1:])
        self.num_bytes += num_bytes
        self._kept.append(kept)
        for mark in kept.marks:
            self._serving[lane, mark] = (*self._serving.get((lane, mark), ()), kept)
        self._use(kept)

    def _use(self, kept: Kept) -> None:
        kept.worth = self._floor + kept.lane.course.seconds(kept.tokens) / max(1, kept.num_bytes)

    # ---- what goes --------------------------------------------------------------------------------------------------

    def make_room(self, most: int, spared: Collection[Kept] = ()) -> None:
        """Let go of kept states, pinned ones last, until they take at most `most` bytes or only spared ones are left."""
        if self.num_bytes <= most:
            return
        going, wished = [each for each in self._kept if each not in spared], self.pins.states()
        going.sort(key=lambda each: (each.state in wished, each.worth), reverse=True)
        while self.num_bytes > most and going:
            last = going.pop()
            self._floor = max(self._floor, last.worth)
            self.evictions += 1
            self._drop(last)

    def forget(self, which: Callable[[Kept], bool]) -> None:
        """Let go of all kept states of a kind before the next step. May be called at any time on the event loop."""
        self._unwanted.append(which)

    def see_off(self) -> None:
        """Let go of what is to be forgotten."""
        unwanted, self._unwanted = self._unwanted, []
        if unwanted:
            self._remembered.clear()  # else it would hold on to lanes that are gone
        for kept in list(self._kept):
            if any(which(kept) for which in unwanted):
                self._drop(kept)

    def _drop(self, kept: Kept) -> None:
        self._kept.remove(kept)
        self.num_bytes -= kept.num_bytes
        for mark in kept.marks:
            if rest := tuple(each for each in self._serving[kept.lane, mark] if each is not kept):
                self._serving[kept.lane, mark] = rest
            else:
                del self._serving[kept.lane, mark]
        kept.lane.drop(kept.slot)


def bytes_of(found: Sequence[Found]) -> int:
    """Bytes of the kept states that are found, each counted once."""
    return sum(kept.num_bytes for kept in {each.kept for each in found})
