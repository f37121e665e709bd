"""Longformer: the laws, transformers' own module with equal weights, dense at full width, the causal form refused."""

from __future__ import annotations

import pytest
import torch

from attention import HeadShape, Segments, build
from tests.attention.laws import Laws, largest, tokens


class TestLongformer(Laws):
    name = "longformer"
    variants = (
        {"window": 5, "global_tokens": 3},
        {"window": 1, "global_tokens": 0},
        {"window": 140, "global_tokens": 130},
    )

    @pytest.mark.parametrize("options", [{"window": 199, "global_tokens": 0}, {"window": 1, "global_tokens": 200}])
    def test_a_window_or_globals_as_wide_as_the_input_equal_dense(self, options: dict[str, int]) -> None:
        shape = HeadShape(4, 2, 16)
        q, k, v = tokens(shape, 200)
        ours = build("longformer", options, shape).attend(q, k, v, Segments((200,)), causal=False)
        dense = build("dense", None, shape).attend(q, k, v, Segments((200,)), causal=False)
        assert largest(ours - dense) <= 2e-6

    @pytest.mark.parametrize("globals_", [0, 3])
    def test_the_answer_is_that_of_transformers_with_equal_weights(self, globals_: int) -> None:
        modeling = pytest.importorskip("transformers.models.longformer.modeling_longformer")
        config = modeling.LongformerConfig(hidden_size=32, num_attention_heads=2, attention_window=[16], num_hidden_layers=1)
        torch.manual_seed(0)
        module = modeling.LongformerSelfAttention(config, layer_id=0).eval()
        for name in ("query", "key", "value"):  # our globals share the projections
            getattr(module, f"{name}_global").load_state_dict(getattr(module, name).state_dict())
        hidden = torch.randn(1, 96, 32) * 3
        mask = torch.zeros(1, 96)
        mask[:, :globals_] = 1
        theirs = module(
            hidden,
            attention_mask=mask[:, None, None, :].squeeze(1).squeeze(1),
            is_index_masked=mask < 0,
            is_index_global_attn=mask > 0,
            is_global_attn=globals_ > 0,
        )[0]
        q, k, v = (getattr(module, name)(hidden)[0].view(96, 2, 16) for name in ("query", "key", "value"))
        backend = build("longformer", {"window": 8, "global_tokens": globals_}, HeadShape(2, 2, 16))
        ours = backend.attend(q, k, v, Segments((96,)), causal=False)
        assert largest(ours.reshape(96, 32) - theirs[0]) <= 5e-6  # both float32
