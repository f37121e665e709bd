"""The allow-list, and how far a lane alone decides what answers a layer and what is kept of a sequence."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor

import attention
from attention import AttentionBackend, Segments, StatePool
from service.engine.allowlist import Backends, Lane
from service.engine.forecast import Course
from service.model.transformer import Transformer
from tests.engine import world
from tests.engine.world import complete, completion, embed, embedding, is_empty, prompt, running

_slots = itertools.count()


@dataclass(frozen=True, eq=False)
class Layered(Lane):
    """A lane whose layers have a backend and a state each of their own."""

    pools: tuple[StatePool, ...] = ()
    parts: dict[int, list[int]] = field(default_factory=dict)  # a slot's number in each pool

    def answering(
        self, layer: int, question: tuple[Tensor, Tensor, Tensor], segments: Segments, slots: Sequence[int], out: Tensor
    ) -> Iterator[None]:
        pool, own = self.pools[layer], [self.parts[slot][layer] for slot in slots]
        return pool.backend.extending(*question, segments, pool, 0, own, out)

    def allocate(self, max_tokens: int) -> int:
        return self._keep([pool.allocate(max_tokens) for pool in self.pools])

    def copy(self, slot: int) -> int:
        return self._keep([pool.copy(part) for pool, part in zip(self.pools, self.parts[slot], strict=True)])

    def release(self, slot: int) -> None:
        for pool, part in zip(self.pools, self.parts.pop(slot), strict=True):
            pool.release(part)

    def state_bytes(self, max_tokens: int) -> int:
        return sum(pool.slot_bytes(max_tokens) for pool in self.pools)

    def held_bytes(self, slots: Iterable[int]) -> int:
        parts = (pair for slot in slots for pair in zip(self.pools, self.parts[slot], strict=True))
        return sum(tensor.nbytes for pool, part in parts for tensor in pool.tensors(part).values())

    @property
    def bytes_in_use(self) -> int:
        return sum(pool.bytes_in_use for pool in self.pools)

    @property
    def num_slots(self) -> int:
        return len(self.parts)

    def _keep(self, parts: list[int]) -> int:
        self.parts[slot := next(_slots)] = parts
        return slot


class Whole(Lane):
    """A lane whose every token sees all of its sequence, which passes through the model at once; nothing is kept."""

    def answering(
        self, layer: int, question: tuple[Tensor, Tensor, Tensor], segments: Segments, slots: Sequence[int], out: Tensor
    ) -> Iterator[None]:
        assert not any(segments.past), "a piece of a sequence"
        out.copy_(self.backend.attend(*question, segments, causal=False))
        return iter(())


def hidden(model: Transformer, by_layer: Sequence[AttentionBackend], tokens: list[int], causal: bool) -> Tensor:
    """Last hidden states by one whole forward, without state."""
    ids, segments = torch.tensor(tokens), Segments((len(tokens),))
    attend = [partial(backend.attend, segments=segments, causal=causal) for backend in by_layer]
    return model.hidden(ids, torch.arange(len(ids)), lambda layer, q, k, v: attend[layer](q, k, v))


async def test_a_lane_may_have_a_backend_and_a_state_for_each_layer() -> None:
    model = world.make_model(torch.float64)
    backends = world.make_backends(model, dense={}, sliding_window={"window": 9, "sinks": 2})
    by_layer = list(backends.by_name.values())

    expected = prompt(70)
    for _ in range(12):
        expected.append(int(model.logits(hidden(model, by_layer, expected, causal=True)[-1:]).argmax()))
    async with running(model, backends, chunk_tokens=16) as engine:
        own = engine._admission.lanes["dense"]
        pools = tuple(backend.new_pool(1, 2**24) for backend in by_layer)
        engine._admission.lanes = {"dense": Layered("dense", own.backend, own.course, own.pool, pools)}
        deltas = await complete(engine, completion(prompt(70), n=2, max_tokens=12))
        for index in (0, 1):
            assert [t for delta in deltas if delta.index == index for t in delta.tokens] == expected[70:]
        assert is_empty(engine) and not any(pool.bytes_in_use for pool in pools)


async def test_a_lane_may_attend_both_ways_over_whole_sequences() -> None:
    model = world.make_model(torch.float64)
    backends = world.make_backends(model, dense={})

    async with running(model, backends, chunk_tokens=16) as engine:
        own = engine._admission.lanes["dense"]
        at_once = Course(model, own.course.pace, world.MAX_LENGTH, world.MAX_LENGTH)
        engine._admission.lanes = {"dense": Whole("dense", own.backend, at_once, own.pool)}
        answer = torch.tensor(await embed(engine, embedding(prompt(200))), dtype=torch.float64)
    mean = hidden(model, [own.backend] * 2, prompt(200), causal=False).mean(0)
    expected = torch.nn.functional.normalize(mean, dim=0)
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=0)  # sums are kept in float32


def test_an_allow_list_names_a_default_it_has_and_only_causal_backends() -> None:
    model = world.make_model()
    with pytest.raises(ValueError, match="dense"):
        world.make_backends(model, "performer", dense={})
    with pytest.raises(ValueError, match="at least one"):
        Backends({}, "auto")
    encoder = attention.build("longformer", None, model.head_shape())
    with pytest.raises(ValueError, match="bidirectional only: longformer"):
        Backends({"longformer": encoder}, "longformer")
