"""Linear attention: the laws over its own quadratic form, and a state constant in length."""

from __future__ import annotations

import torch
from torch.nn import functional

from attention import HeadShape, Segments, build
from tests.attention.laws import Laws, largest, tokens


class TestLinear(Laws):
    name = "linear"
    variants = ({},)

    def test_the_answer_is_equation_five_of_the_paper_word_for_word(self) -> None:
        backend = build("linear", None, HeadShape(2, 2, 16, torch.float64))
        q, k, v = tokens(backend.shape, 20)
        answer = backend.attend(q, k, v, Segments((20,)), causal=True)
        for h in range(2):
            for i in range(20):
                weights = (functional.elu(q[i, h]) + 1) @ (functional.elu(k[: i + 1, h]) + 1).T
                assert largest(answer[i, h] - weights @ v[: i + 1, h] / weights.sum()) <= 1e-12

    def test_the_state_is_the_same_at_1k_and_at_64k_tokens(self) -> None:
        backend = build("linear", None, HeadShape(4, 2, 16, torch.bfloat16))
        assert backend.state_bytes(1024) == backend.state_bytes(65536) == 2 * 18 * 16 * 4

    def test_a_sum_over_many_tokens_keeps_its_precision_in_bfloat16(self) -> None:
        backend = build("linear", None, HeadShape(1, 1, 16, torch.bfloat16))
        ones = torch.ones(4097, 1, 16, dtype=torch.bfloat16)
        pool = backend.new_pool(1, 1 << 20)
        slot = pool.allocate(4097)
        backend.extend(ones[:-1], ones[:-1], ones[:-1], Segments((4096,)), pool, 0, [slot])
        answer = backend.extend(ones[:1], ones[:1], ones[:1] * 4097, Segments((1,), (4096,)), pool, 0, [slot])
        assert (
            largest(answer.float() - (4096 + 4096) / 4097) <= 2**-7
        )  # 4097 rounds to 4096 in bfloat16; a bf16 sum ends at 256
