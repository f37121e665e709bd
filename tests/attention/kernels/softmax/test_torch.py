"""The streaming softmax on its own: bands, pieces, ranges of scores and rows that see nothing, against plain softmax."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from attention import history
from attention.kernels.softmax import decode, streaming
from attention.parts import finish
from attention.truth import BOUNDS
from tests.attention.laws import largest


def plain(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """Softmax in float64 of q (C, H, D) over k, v (G, N, D), one query head per key head; zeros where all is hidden."""
    scores = q.double().transpose(0, 1) @ k.double().mT / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num()
    return (weights @ v.double()).transpose(0, 1)


def drawn(count: int, keys: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count * 1000 + keys)
    q = torch.randn(count, 2, 16, generator=generator)
    k, v = (torch.randn(2, keys, 16, generator=generator) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


BANDS = [
    streaming.Band(),
    streaming.Band(high=0),
    streaming.Band(low=-3),
    streaming.Band(-2, 5),
    streaming.Band(4, 9, free=3),
    streaming.Band(40, 50),
]


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("most", [1, 7, 30, 100])
def test_pieces_of_any_size_answer_as_the_whole(band: streaming.Band, most: int) -> None:
    q, k, v = drawn(20, 30)
    out = torch.empty_like(q)
    finish(streaming.answer(q, streaming.split(streaming.Piece(k, v, band), most), out, streaming.Room(q)))
    assert largest(out - plain(q, k, v, band.hidden(20, 30, q.device))) <= BOUNDS[torch.float32]


@pytest.mark.parametrize("band", BANDS)
def test_clearing_a_band_zeroes_what_the_band_hides_and_nothing_else(band: streaming.Band) -> None:
    weights = torch.ones(2, 3, 20, 30)
    band.clear(weights)
    assert torch.equal(weights == 0, band.hidden(20, 30, weights.device).expand(2, 3, 20, 30))


def test_a_row_that_sees_nothing_is_zeros_and_its_neighbours_are_right() -> None:
    q, k, v = drawn(20, 30)
    out = torch.empty_like(q)
    piece = streaming.Piece(k, v, streaming.Band(low=20))  # row i sees columns from i + 20: the last ten none
    finish(streaming.answer(q, [piece], out, streaming.Room(q)))
    assert (out[10:] == 0).all() and (out[:10] != 0).all()
    assert largest(out - plain(q, k, v, streaming.Band(low=20).hidden(20, 30, q.device))) <= BOUNDS[torch.float32]


@pytest.mark.parametrize("shift", [-400.0, -80.0, 80.0, 400.0])
def test_scores_that_are_all_huge_or_all_tiny_are_answered_like_others(shift: float) -> None:
    q, k, v = drawn(20, 30)
    q[..., 0], k[..., 0] = (
        math.sqrt(abs(shift) * 4),
        math.copysign(math.sqrt(abs(shift) * 4), shift),
    )  # adds shift to each score
    out = torch.empty_like(q)
    finish(streaming.answer(q, [streaming.Piece(k, v)], out, streaming.Room(q)))
    assert largest(out - plain(q, k, v, torch.zeros(20, 30, dtype=torch.bool))) <= 400 * 2**-20  # a score's own rounding


def test_one_row_out_of_range_changes_no_other_row_by_a_bit() -> None:
    q, k, v = drawn(20, 30)
    before, after = torch.empty_like(q), torch.empty_like(q)
    finish(streaming.answer(q, [streaming.Piece(k, v)], before, streaming.Room(q)))
    q[7] *= 1000
    finish(streaming.answer(q, [streaming.Piece(k, v)], after, streaming.Room(q)))
    others = torch.arange(20) != 7
    assert torch.equal(before[others], after[others]) and not torch.equal(before[7], after[7])


def test_float16_is_never_trusted_unshifted() -> None:
    q, k, v = drawn(20, 30, torch.float16)
    q[..., 0], k[..., 0] = 9.0, -9.0  # scores near -20: 2^s is below the smallest normal float16
    out = torch.empty_like(q)
    finish(streaming.answer(q, [streaming.Piece(k, v)], out, streaming.Room(q)))
    assert largest(out - plain(q, k, v, torch.zeros(20, 30, dtype=torch.bool))) <= 4 * BOUNDS[torch.float16]  # scores of 20


@pytest.mark.parametrize("counts", [(3, 700), (256, 256, 200), (1, 300, 299, 800)])
def test_histories_that_step_together_answer_as_plain_softmax(counts: tuple[int, ...]) -> None:
    states = [{name: drawn(n, 800)[place].transpose(0, 1).flatten(1) for name, place in (("k", 1), ("v", 2))} for n in counts]
    q = drawn(len(counts), 1)[0]
    for mode in (True, False, True):  # memory that is kept from step to step serves both
        with torch.inference_mode(mode):
            out = torch.empty_like(q)
            decode.step(q, states, counts, 2, out)
        for row, state, count in zip(range(len(counts)), states, counts, strict=True):
            k, v = (x.transpose(0, 1) for x in history.read(state, count, 2))
            assert largest(out[row : row + 1] - plain(q[row : row + 1], k, v, torch.zeros(1, count).bool())) < 1e-5


def test_threads_that_step_at_once_do_not_meet() -> None:
    counts = (1000,) * 8
    states = [
        {"k": k.transpose(0, 1).flatten(1), "v": v.transpose(0, 1).flatten(1)} for _, k, v in map(drawn, range(8), counts)
    ]

    def answer(seed: int) -> Tensor:
        q = drawn(8, 2000 + seed)[0]
        out = torch.empty_like(q)
        decode.step(q, states, counts, 2, out)
        return out

    wanted = [answer(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for seed, found in zip(list(range(4)) * 20, threads.map(answer, list(range(4)) * 20), strict=True):
            assert torch.equal(found, wanted[seed])
