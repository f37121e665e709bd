"""Keys and values in a state: a ring against a plain list of what was written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attention import HeadShape
from attention.history import STEP, Ring, append, append_step, keys_and_values, put

SHAPE = HeadShape(2, 1, 4)


def numbered(start: int, end: int) -> Tensor:
    """(C, G, D): every element is its position, plus one."""
    return torch.arange(start + 1.0, end + 1.0).view(-1, 1, 1).expand(-1, 1, 4).contiguous()


def state_of(ring: Ring, tokens: int) -> dict[str, Tensor]:
    return {name: spec.new(torch.device("cpu")) for name, spec in ring.state(SHAPE, tokens).items()}


@given(st.integers(0, 5), st.integers(1, 7), st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_a_ring_keeps_the_first_and_the_last_whatever_the_chunks(first: int, length: int, chunks: list[int]) -> None:
    ring, past = Ring(first, length), 0
    state = state_of(ring, sum(chunks))
    for count in chunks:
        new = numbered(past, past + count)
        base = max(min(first, past), past - length + 1)
        in_order, _ = ring.in_order(state, new, new, base, past)
        assert in_order[:, 0, 0].tolist() == list(range(base + 1, past + count + 1))
        ring.write(state, new, new, past)
        past += count
        kept = [p for p in range(past) if p < first or p >= past - length]
        assert all(state["k"][ring.place(p), 0] == p + 1 == state["v"][ring.place(p), 0] for p in kept)
        assert len({ring.place(p) for p in kept}) == len(kept)


@given(st.integers(0, 5), st.integers(1, 7), st.integers(0, 30), st.integers(0, 30))
def test_runs_cover_each_position_once_where_it_stands(first: int, length: int, start: int, count: int) -> None:
    ring = Ring(first, length)
    found = [(at + n, position + n) for at, position, size in ring.runs(start, start + count) for n in range(size)]
    assert found == [(ring.place(p), p) for p in range(start, start + count)]


@pytest.mark.parametrize("past", [0, STEP - 1, STEP, STEP + 7])
def test_what_stands_behind_the_last_token_up_to_a_whole_step_is_a_number(past: int) -> None:
    specs = keys_and_values(SHAPE, 3 * STEP)
    state = {name: torch.full(spec.shape, float("nan")) for name, spec in specs.items()}
    if past:
        append(state, numbered(0, past), numbered(0, past), 0)
    append_step([state], numbered(past, past + 1), numbered(past, past + 1), [past])
    end = -(-(past + 1) // STEP) * STEP
    assert state["v"][: past + 1, 0].tolist() == list(range(1, past + 2)) and (state["v"][past + 1 : end] == 0).all()


def test_a_token_is_put_into_each_state_at_its_own_place() -> None:
    states = [state_of(Ring(1, 3), 9) for _ in range(2)]
    put(states, numbered(4, 6), numbered(4, 6), [0, 3])
    assert states[0]["k"][0, 0] == 5 and states[1]["v"][3, 0] == 6
