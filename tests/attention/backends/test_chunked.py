"""Chunked attention: the laws, dense when one chunk holds all, and a state of one chunk."""

from __future__ import annotations

import pytest
import torch

from attention import HeadShape, Segments, build
from tests.attention.laws import Laws, largest, tokens


class TestChunked(Laws):
    name = "chunked"
    variants = ({"chunk": 1}, {"chunk": 7}, {"chunk": 130})

    def test_a_chunk_as_long_as_the_input_equals_dense(self) -> None:
        shape = HeadShape(4, 2, 16)
        q, k, v = tokens(shape, 200)
        for causal in (True, False):
            ours = build("chunked", {"chunk": 200}, shape).attend(q, k, v, Segments((200,)), causal=causal)
            dense = build("dense", None, shape).attend(q, k, v, Segments((200,)), causal=causal)
            assert largest(ours - dense) <= 2e-6

    def test_each_chunk_is_answered_as_a_sequence_of_its_own(self) -> None:
        shape = HeadShape(2, 2, 16)
        q, k, v = tokens(shape, 100)
        ours = build("chunked", {"chunk": 40}, shape).attend(q, k, v, Segments((100,)), causal=False)
        dense = build("dense", None, shape).attend(q, k, v, Segments((40, 40, 20)), causal=False)
        assert largest(ours - dense) <= 2e-6

    def test_the_state_is_the_same_at_1k_and_at_64k_tokens(self) -> None:
        backend = build("chunked", {"chunk": 512}, HeadShape(4, 2, 16, torch.bfloat16))
        assert backend.state_bytes(1024) == backend.state_bytes(65536) == 2 * 2 * 512 * 16 * 2

    def test_a_chunk_of_nothing_is_refused(self) -> None:
        with pytest.raises(ValueError, match="chunk"):
            build("chunked", {"chunk": 0}, HeadShape(2, 2, 16))
