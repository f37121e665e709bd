"""BigBird: the laws, transformers' own module over an equal pattern, and what the drawn blocks may be."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from attention import HeadShape, Segments, build
from attention.backends.bigbird import BigBird
from tests.attention.laws import Laws, largest, tokens


def pattern(**options: int) -> BigBird:
    backend = build("bigbird", options, HeadShape(2, 2, 16))
    assert isinstance(backend, BigBird)
    return backend


class TestBigBird(Laws):
    name = "bigbird"
    variants = (
        {"block": 8},
        {"block": 64, "random_blocks": 1},
        {"block": 4, "global_blocks": 1, "closing_blocks": 1},
        {"block": 5, "window_blocks": 1, "global_blocks": 0},
        {"block": 300, "random_blocks": 1},
        {"block": 4, "random_blocks": 1, "full_blocks": 11},
        {"block": 3, "window_blocks": 5, "random_blocks": 0, "global_blocks": 1, "closing_blocks": 2},
    )

    def test_globals_over_the_whole_input_equal_dense(self) -> None:
        shape = HeadShape(4, 2, 16)
        q, k, v = tokens(shape, 200)
        for causal in (True, False):
            ours = build("bigbird", {"block": 50, "global_blocks": 4}, shape).attend(q, k, v, Segments((200,)), causal=causal)
            dense = build("dense", None, shape).attend(q, k, v, Segments((200,)), causal=causal)
            assert largest(ours - dense) <= 2e-6

    def test_a_block_sees_as_many_others_as_the_options_say_none_twice(self) -> None:
        backend = pattern(global_blocks=2, window_blocks=3, random_blocks=3)
        for block in range(10, 30):
            seen = backend.seen(block, 40)
            assert list(seen) == sorted(set(seen)) and len(seen) == 2 + 3 + 3
            assert {0, 1, block - 1, block, block + 1} <= set(seen)

    def test_the_drawn_blocks_are_spread_over_the_sequence_and_not_all_block_zero(self) -> None:
        backend = pattern(global_blocks=1, window_blocks=1, random_blocks=2)
        drawn = Counter(b for block in range(1, 400) for b in backend.seen(block, 400) if b not in (0, block))
        # 798 draws of 398 blocks, 2 each on average: Poisson, so 86 % are drawn at least once and none 12 times (p < 1e-3)
        assert sum(drawn.values()) == 2 * 399 and len(drawn) > 0.8 * 399 and max(drawn.values()) < 12
        assert min(drawn) <= 20 and max(drawn) >= 380

    def test_short_sequences_see_everything_and_longer_ones_do_not(self) -> None:
        backend = pattern(full_blocks=12)
        for count in (1, 9, 12):
            assert all(backend.seen(block, count) == tuple(range(count)) for block in range(count))
        assert len(backend.seen(8, 13)) == 2 + 3 + 3

    def test_a_seed_draws_the_same_blocks_again_and_another_seed_others(self) -> None:
        one, again, other = (pattern(seed=seed) for seed in (1, 1, 2))
        rows = range(5, 100)
        assert [one.seen(r, 100) for r in rows] == [again.seen(r, 100) for r in rows] != [other.seen(r, 100) for r in rows]

    def test_the_answer_is_that_of_transformers_over_an_equal_pattern(self, monkeypatch: pytest.MonkeyPatch) -> None:
        modeling = pytest.importorskip("transformers.models.big_bird.modeling_big_bird")
        block, count = 16, 12
        backend = pattern(block=block, global_blocks=1, closing_blocks=1)
        config = modeling.BigBirdConfig(
            hidden_size=32, num_attention_heads=2, block_size=block, num_random_blocks=3, use_bias=True
        )
        torch.manual_seed(0)
        module = modeling.BigBirdBlockSparseAttention(config).eval()
        always = {b: {0, count - 1, b - 1, b, b + 1} for b in range(1, count - 1)}
        drawn = [sorted(set(backend.seen(b, count)) - always[b]) for b in range(1, count - 1)]
        table = [np.array(drawn, dtype=np.int32)] * 2  # per head; their blocks are drawn only in training
        monkeypatch.setattr(module, "_bigbird_block_rand_mask_with_head", lambda **_: table)
        hidden = torch.randn(1, block * count, 32) * 3
        masks = modeling.BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(1, block * count), block)
        names = ("from_blocked_mask", "to_blocked_mask", "band_mask", "from_mask", "to_mask")
        blocked, band, from_mask, to_mask = masks
        given = dict(zip(names, (blocked, blocked, band, from_mask, to_mask), strict=True))
        theirs = module(hidden, **given)[0]
        q, k, v = (getattr(module, name)(hidden)[0].view(-1, 2, 16) for name in ("query", "key", "value"))
        ours = backend.attend(q, k, v, Segments((block * count,)), causal=False)
        assert largest(ours.reshape(-1, 32) - theirs[0]) <= 5e-6  # both float32

    @pytest.mark.parametrize("options", [{"block": 0}, {"window_blocks": 2}, {"random_blocks": -1}, {"global_blocks": -1}])
    def test_options_without_sense_are_refused(self, options: dict[str, int]) -> None:
        with pytest.raises(ValueError, match=next(iter(options))):
            build("bigbird", options, HeadShape(2, 2, 16))
