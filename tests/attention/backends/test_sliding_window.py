"""Sliding window with sinks: the laws, dense at full width, xformers' masks, and a state constant in length."""

from __future__ import annotations

import pytest
import torch

from attention import HeadShape, Segments, build, reference
from tests.attention.laws import Laws, largest, tokens


class TestSlidingWindow(Laws):
    name = "sliding_window"
    variants = (
        {"window": 5, "sinks": 2},
        {"window": 1, "sinks": 0},
        {"window": 3, "sinks": 9},
        {"window": 150, "sinks": 4},
        {"window": 2, "sinks": 150},
    )

    def test_a_window_as_wide_as_the_input_equals_dense(self) -> None:
        shape = HeadShape(4, 2, 16)
        q, k, v = tokens(shape, 200)
        for causal in (True, False):
            ours = build("sliding_window", {"window": 199}, shape).attend(q, k, v, Segments((200,)), causal=causal)
            dense = build("dense", None, shape).attend(q, k, v, Segments((200,)), causal=causal)
            assert largest(ours - dense) <= 2e-6

    def test_a_window_one_short_of_the_input_differs_from_dense(self) -> None:
        shape = HeadShape(2, 2, 16)
        q, k, v = tokens(shape, 200)
        ours = build("sliding_window", {"window": 198, "sinks": 0}, shape).attend(q, k, v, Segments((200,)), causal=True)
        dense = build("dense", None, shape).attend(q, k, v, Segments((200,)), causal=True)
        assert largest(ours[:-1] - dense[:-1]) <= 2e-6 < largest(ours[-1] - dense[-1])

    def test_the_state_is_the_same_at_1k_and_at_64k_tokens(self) -> None:
        backend = build("sliding_window", {"window": 500, "sinks": 4}, HeadShape(4, 2, 16, torch.bfloat16))
        assert backend.state_bytes(1024) == backend.state_bytes(65536) == 2 * 2 * 505 * 16 * 2

    def test_the_mask_is_that_of_xformers(self) -> None:
        bias = pytest.importorskip("xformers.ops.fmha.attn_bias", reason="xformers is an extra; its biases work on CPU")
        backend = build("sliding_window", {"window": 6, "sinks": 0}, HeadShape(2, 2, 16))
        for length in (6, 7, 8, 40):
            rows = torch.arange(length)
            for causal, theirs in (
                (True, bias.LowerTriangularFromBottomRightLocalAttentionMask(7)),  # keys with the token itself
                (False, bias.LocalAttentionFromBottomRightMask(6, 6)),
            ):
                wanted = theirs.materialize((length, length)) == 0
                assert torch.equal(reference.visible(backend, rows, length, causal), wanted)

    @pytest.mark.parametrize("options", [{"window": 0}, {"window": -1}, {"sinks": -1}, {"window": "wide"}])
    def test_options_without_sense_are_refused(self, options: dict[str, object]) -> None:
        with pytest.raises(ValueError, match=next(iter(options))):
            build("sliding_window", options, HeadShape(2, 2, 16))
