"""Dense attention: the laws, and torch's own softmax attention as a second oracle."""

from __future__ import annotations

from torch.nn import functional

from attention import HeadShape, Segments, build
from tests.attention.laws import Laws, largest, tokens


class TestDense(Laws):
    name = "dense"
    variants = ({},)

    def test_the_answer_is_that_of_torch_attention(self) -> None:
        backend = build("dense", None, HeadShape(4, 2, 16))
        q, k, v = tokens(backend.shape, 333)
        for causal in (True, False):
            ours = backend.attend(q, k, v, Segments((333,)), causal=causal)
            batched = (x.transpose(0, 1)[None] for x in (q, k, v))
            theirs = functional.scaled_dot_product_attention(*batched, is_causal=causal, enable_gqa=True)
            assert largest(ours - theirs[0].transpose(0, 1)) <= 2e-6  # both float32: some epsilons of values up to 4

    def test_a_long_history_is_answered_head_by_head_as_in_one_product(self) -> None:
        backend = build("dense", None, HeadShape(4, 2, 16))
        q, k, v = tokens(backend.shape, 4100)
        pool = backend.new_pool(1, 1 << 30)
        slot = pool.allocate(5000)  # larger than the history, so that its keys are no tight block
        backend.extend(q[:-1], k[:-1], v[:-1], Segments((4099,)), pool, 0, [slot])
        step = backend.extend(q[-1:], k[-1:], v[-1:], Segments((1,), (4099,)), pool, 0, [slot])
        whole = backend.attend(q, k, v, Segments((4100,)), causal=True)
        assert largest(step - whole[-1:]) <= 2e-6
