"""FAVOR+: the laws over its own quadratic form, and the paper's theory of the estimate, at w <= 2 where a sample shows it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attention import HeadShape, Segments, build
from attention.backends.performer import Performer
from attention.kernels.features import LIMIT
from attention.projection import projection
from attention.truth import BOUNDS, check
from tests.attention.laws import Laws, extend_in, largest, tokens

WIDTH, FEATURES, DRAWS = 16, 64, 4000


def pair(w: float) -> tuple[Tensor, Tensor]:
    """q', k' (already divided by D^(1/4)) with |q' + k'|^2 = w, in general position."""
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, WIDTH, generator=generator, dtype=torch.float64)
    return (x * math.sqrt(w) / (q + k).norm() for x in (q, k))  # type: ignore[return-value]


def estimates(rows: Tensor, q: Tensor, k: Tensor, hyperbolic: bool = False) -> Tensor:
    """phi(q).phi(k) / exp(q'.k') for each draw of rows (draws, m, D)."""
    exponents = rows.double() @ (q + k)
    both = torch.stack([exponents, -exponents]) if hyperbolic else exponents[None]
    return (both - (q.square().sum() + k.square().sum()) / 2 - q @ k).exp().mean((0, 2))


def haar(draws: int = DRAWS, features: int = FEATURES) -> Tensor:
    return torch.stack([projection(features, WIDTH, seed) for seed in range(draws)])


def iid() -> Tensor:
    return torch.randn(DRAWS, FEATURES, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class TestPerformer(Laws):
    name = "performer"
    variants = ({"features": 48}, {"features": 20, "hyperbolic": True, "seed": 3}, {"features": 48, "local_chunk": 70})

    @pytest.mark.parametrize("w", [0.5, 1.0, 2.0])
    def test_the_estimate_of_the_softmax_kernel_is_unbiased(self, w: float) -> None:
        q, k = pair(w)
        ratio = estimates(haar(), q, k)
        assert abs(ratio.mean() - 1) <= 4 * ratio.std() / math.sqrt(DRAWS)  # four standard errors

    def test_rows_from_a_bare_qr_would_be_biased(self) -> None:
        q = k = torch.eye(WIDTH, dtype=torch.float64)[0] * math.sqrt(2.0) / 2  # the sign that LAPACK fixes is seen on an axis
        generator = torch.Generator().manual_seed(1)
        blocks = torch.linalg.qr(torch.randn(DRAWS, WIDTH, WIDTH, generator=generator, dtype=torch.float64))[0].mT
        norms = torch.randn(DRAWS, WIDTH, WIDTH, generator=generator, dtype=torch.float64).norm(dim=2)
        ratio = estimates(blocks * norms[..., None], q, k)
        assert abs(ratio.mean() - 1) > 4 * ratio.std() / math.sqrt(DRAWS)

    @pytest.mark.parametrize("w", [0.5, 1.0, 2.0])
    def test_the_variance_of_independent_rows_is_that_of_lemma_two_and_orthogonal_rows_have_no_more(self, w: float) -> None:
        q, k = pair(w)
        theory = (math.exp(w) - 1) / FEATURES
        independent, orthogonal = estimates(iid(), q, k).var(), estimates(haar(), q, k).var()
        # a sample variance of 4,000 draws of means of 64 log-normals has a relative standard error below 5 %
        assert abs(independent / theory - 1) <= 0.15
        assert orthogonal <= independent

    def test_the_hyperbolic_variance_is_that_of_lemma_two(self) -> None:
        w = 1.0
        q, k = pair(w)
        theory = (1 - math.exp(-w)) / 2 * (math.exp(w) - 1) / FEATURES
        assert abs(estimates(iid(), q, k, hyperbolic=True).var() / theory - 1) <= 0.15

    def test_twice_the_features_have_half_the_variance(self) -> None:
        q, k = pair(1.0)
        one, two = (estimates(haar(1500, m), q, k).var() for m in (64, 128))
        assert 1.6 <= one / two <= 2.5  # two sample variances of 1,500 draws, each within 8 %

    @pytest.mark.parametrize("hyperbolic", [False, True])
    def test_the_backend_weighs_keys_by_the_kernel_that_the_theory_is_about(self, hyperbolic: bool) -> None:
        options = {"features": FEATURES, "seed": 7, "hyperbolic": hyperbolic}
        backend = build("performer", options, HeadShape(1, 1, WIDTH, torch.float64))
        assert isinstance(backend, Performer)
        q, k = (x * WIDTH**0.25 for x in torch.randn(2, 5, WIDTH, dtype=torch.float64) * 0.3)
        at = torch.arange(5)
        ours = backend.kernel(q, k, k, at[:, None], at)
        rows = projection(FEATURES, WIDTH, 7)[None]
        theirs = torch.stack(
            [torch.cat([estimates(rows, a, b, hyperbolic) * (a @ b).exp() for b in k / WIDTH**0.25]) for a in q / WIDTH**0.25]
        )
        assert largest(ours / ours.sum(1, keepdim=True) - theirs / theirs.sum(1, keepdim=True)) <= 1e-6  # rows are float32

    def test_more_features_come_nearer_to_dense(self) -> None:
        q, k, v = tokens(HeadShape(4, 2, WIDTH), 200, scale=0.5)
        k = k * 0.5
        dense = build("dense", None, HeadShape(4, 2, WIDTH)).attend(q, k, v, Segments((200,)), causal=True)
        errors = {}
        for features in (64, 1024):
            options = [{"features": features, "seed": seed} for seed in range(8)]
            answers = [
                build("performer", o, HeadShape(4, 2, WIDTH)).attend(q, k, v, Segments((200,)), causal=True) for o in options
            ]
            errors[features] = float((torch.stack(answers) - dense).square().mean())
        # the squared error falls as 1 / m, sixteenfold here; half of that is asked for
        assert errors[64] > 8 * errors[1024]

    def test_near_keys_taken_out_of_the_estimate_are_exact_and_bring_the_rest_nearer_to_dense(self) -> None:
        shape = HeadShape(4, 2, WIDTH)
        q, k, v = tokens(shape, 400)
        dense = build("dense", None, shape).attend(q, k, v, Segments((400,)), causal=True)
        errors = {}
        for local_chunk in (0, 64, 128):
            options = {"features": 256, "local_chunk": local_chunk}
            answer = build("performer", options, shape).attend(q, k, v, Segments((400,)), causal=True)
            errors[local_chunk] = float((answer - dense).square().mean())
            assert torch.allclose(answer[: 2 * local_chunk], dense[: 2 * local_chunk], atol=1e-5)
        assert errors[0] > 1.5 * errors[64] > 1.5 * errors[128]

    def test_far_keys_weigh_against_near_ones_what_they_weigh_in_softmax(self) -> None:
        # at small norms 4,096 features estimate exp well: what is left is the balance between the two parts
        shape = HeadShape(4, 2, WIDTH, torch.float64)
        q, k, v = tokens(shape, 600, scale=0.5)
        v[:100] += 10.0
        dense = build("dense", None, shape).attend(q, k * 0.5, v, Segments((600,)), causal=True)
        options = {"features": 4096, "local_chunk": 64}
        answer = build("performer", options, shape).attend(q, k * 0.5, v, Segments((600,)), causal=True)
        assert largest(answer - dense) <= 0.3 and float((answer - dense).mean().abs()) <= 0.01

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_late_key_of_enormous_weight_leaves_earlier_rows_alone_and_is_heard_afterwards(self, dtype: torch.dtype) -> None:
        # exp(W k') of this key overflows float32 and passes every scale before it: the sums must be rescaled on the way
        backend = build("performer", {"features": 64}, HeadShape(1, 1, WIDTH, dtype))
        assert isinstance(backend, Performer)
        q, k, v = tokens(backend.shape, 300)
        before = backend.attend(q, k, v, Segments((300,)), causal=True)
        longest = projection(64, WIDTH, 0).double()
        longest = longest[longest.norm(dim=1).argmax()] * WIDTH**0.25
        k[:200] *= 6.0
        plain = backend.attend(q, k, v, Segments((300,)), causal=True)
        k[200], q[200:] = longest.to(dtype) * 2, longest.to(dtype) * 3
        after = backend.attend(q, k, v, Segments((300,)), causal=True)
        assert torch.equal(after[:200], plain[:200]) and not torch.equal(before, plain)
        assert after.isfinite().all()
        assert largest(after[200] - v[200]) <= 0.05

    @pytest.mark.parametrize("impl", ["torch", "auto"])
    def test_a_key_of_enormous_weight_is_heard_by_steps_as_by_a_prefill(self, impl: str) -> None:
        backend = build("performer", {"features": 64, "impl": impl}, HeadShape(2, 1, 32))
        assert isinstance(backend, Performer)
        q, k, v = tokens(backend.shape, 30)
        longest = projection(64, 32, 0)
        k[20] = longest[longest.norm(dim=1).argmax()] * 32**0.25 * 1.5
        k[0] = -k[20]
        assert float(((k[20, 0] - k[0, 0]) @ backend.weights).amax()) > LIMIT  # it raises a level: the two are of one norm
        whole = backend.attend(q, k, v, Segments((30,)), causal=True)
        assert largest(extend_in(backend, q, k, v, [1] * 30) - whole) <= BOUNDS[torch.float32]
        assert largest(whole[21:].amax(0) - whole[21:].amin(0)) <= 0.5  # all rows behind it hear little else

    @pytest.mark.parametrize("width", [96, 128, 256])
    def test_the_served_truth_holds_for_wide_heads(self, width: int) -> None:
        for seed in range(3):
            truth = check(build("performer", {"impl": "torch"}, HeadShape(8, 2, width, torch.bfloat16)), seed)
            assert truth.passed, truth

    def test_the_rows_are_those_of_the_seed_whatever_was_drawn_before(self) -> None:
        first = projection(48, WIDTH, 11)
        torch.randn(100)
        assert torch.equal(projection(48, WIDTH, 11), first)
        assert not torch.equal(projection(48, WIDTH, 12), first)

    def test_the_rows_of_a_block_are_orthogonal_with_the_norms_of_gaussian_rows(self) -> None:
        rows = projection(512, WIDTH, 0).double()
        products = (rows.view(32, 16, 16) @ rows.view(32, 16, 16).mT).abs()
        assert (products - products.diagonal(dim1=1, dim2=2).diag_embed()).amax() <= 1e-5
        assert abs(rows.square().sum(1).mean() / WIDTH - 1) <= 0.06  # chi-squared: standard error sqrt(2 / 16 / 512) = 1.6 %

    def test_the_state_is_the_same_at_1k_and_at_64k_tokens(self) -> None:
        backend = build("performer", {"features": 256}, HeadShape(4, 2, 64, torch.bfloat16))
        assert backend.state_bytes(1024) == backend.state_bytes(65536) == 2 * 256 * 66 * 4
        backend = build("performer", {"local_chunk": 256}, HeadShape(4, 2, 64, torch.bfloat16))
        assert backend.state_bytes(1024) == backend.state_bytes(65536) == 2 * 256 * 66 * 4 + 2 * 2 * 512 * 64 * 2

    @pytest.mark.parametrize(
        "options", [{"features": 0}, {"features": 10**6}, {"seed": -1}, {"local_chunk": 63}, {"local_chunk": -64}]
    )
    def test_options_without_sense_are_refused(self, options: dict[str, int]) -> None:
        with pytest.raises(ValueError, match=next(iter(options))):
            build("performer", options, HeadShape(2, 2, 16))
