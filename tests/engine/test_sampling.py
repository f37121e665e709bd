"""Drawing: the distribution that the settings name, and the same token for the same seed in any company."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.engine.meter import StorageCounter
from service.engine.request import Sampling
from service.engine.sampling import bytes_per_logit, draw, logprobs, uniform

LOGITS = torch.randn(1, 50, generator=torch.Generator().manual_seed(3)) * 2
SETTINGS = [
    Sampling(temperature=0.0),
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_p=0.8),
    Sampling(temperature=1.3, top_k=7),
    Sampling(temperature=1.0, top_k=9, top_p=0.5),
]


def draws(settings: Sampling, count: int, logits: torch.Tensor = LOGITS) -> Counter[int]:
    return Counter(draw(logits, [settings], [uniform(1, 0, place)])[0].token for place in range(count))


def allowed(settings: Sampling, logits: torch.Tensor = LOGITS) -> torch.Tensor:
    """The distribution by its definition, one token at a time, float64."""
    weights = (logits[0].double() / settings.temperature).softmax(0)
    ranked = sorted(range(len(weights)), key=lambda i: -float(weights[i]))[: settings.top_k or None]
    total, kept, reached = sum(float(weights[i]) for i in ranked), [], 0.0
    for i in ranked:
        if reached >= settings.top_p:
            break
        kept.append(i)
        reached += float(weights[i]) / total
    answer = torch.zeros_like(weights)
    answer[kept] = weights[kept]
    return answer / answer.sum()


@pytest.mark.parametrize("settings", SETTINGS[1:])
def test_tokens_come_as_often_as_their_probability_says(settings: Sampling) -> None:
    count = 4000
    expected, seen = allowed(settings), draws(settings, count)
    assert set(seen) <= {i for i in range(50) if expected[i] > 0}
    for token in range(50):
        p = float(expected[token])
        assert abs(seen[token] - count * p) <= 5 * (count * p * (1 - p)) ** 0.5 + 1e-9  # five standard deviations


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draws(SETTINGS[0], 3) == {int(LOGITS.argmax()): 3}


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 2**63 - 1}])
@pytest.mark.parametrize("temperature", [1e-30, 1e-46, 5e-324])
def test_a_temperature_next_to_zero_takes_the_likeliest(temperature: float, filters: dict[str, float]) -> None:
    assert draws(Sampling(temperature=temperature, **filters), 3) == {int(LOGITS.argmax()): 3}  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_has_no_chance_is_never_drawn(settings: Sampling) -> None:
    masked = LOGITS.clone()
    masked[:, ::2] = -torch.inf
    assert all(token % 2 for token in draws(settings, 200, masked))


@given(st.permutations(range(5)), st.integers(1, 5), st.integers(0, 99))
def test_a_row_draws_the_same_token_in_any_company(order: list[int], count: int, seed: int) -> None:
    rows = torch.randn(5, 50, generator=torch.Generator().manual_seed(seed))
    alone = [draw(rows[[i]], [SETTINGS[i]], [uniform(seed, i, 0)])[0] for i in range(5)]
    chosen = order[:count]
    together = draw(rows[chosen], [SETTINGS[i] for i in chosen], [uniform(seed, i, 0) for i in chosen])
    assert together == [alone[i] for i in chosen]


def test_samples_of_one_seed_differ_and_repeat() -> None:
    firsts = [uniform(5, index, 0) for index in range(4)]
    assert len(set(firsts)) == 4
    assert firsts == [uniform(5, index, 0) for index in range(4)]


def test_the_numbers_of_a_sample_are_uniform_and_independent() -> None:
    numbers = torch.tensor([uniform(seed, 0, place) for seed in (-1, 2**63 - 1) for place in range(4000)], dtype=torch.float64)
    assert numbers.min() >= 0 and numbers.max() < 1
    for values, cells in ((numbers, 16), ((numbers[1:] * 4).floor() + numbers[:-1], 64)):  # one by one, and in pairs
        counts = torch.histc(values, cells, 0, values.max().ceil().item()).double()
        expected = len(values) / cells
        chi = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi - cells) < 5 * (2 * cells) ** 0.5  # five standard deviations


def test_logprobs_are_those_of_the_plain_softmax_with_the_likeliest_first() -> None:
    (told,) = logprobs(LOGITS, [7], [3])
    plain = LOGITS[0].double().log_softmax(0)
    assert told.logprob == pytest.approx(float(plain[7]), abs=1e-5)
    assert [token for token, _ in told.top] == plain.topk(3).indices.tolist()


def test_logprobs_are_told_only_to_those_who_ask() -> None:
    rows = LOGITS.expand(2, -1)
    drawn = draw(rows, [Sampling(temperature=0.0, logprobs=2), Sampling(temperature=0.0)], [0.5, 0.5])
    assert drawn[0].logprob is not None and len(drawn[0].logprob.top) == 2
    assert drawn[1].logprob is None


@pytest.mark.parametrize("settings", [*SETTINGS, Sampling(temperature=0.0, logprobs=3), Sampling(top_p=0.5, logprobs=3)])
def test_a_draw_takes_the_bytes_its_law_says(settings: Sampling) -> None:
    weight, counter = torch.randn(4096, 8).bfloat16(), StorageCounter()
    with torch.inference_mode(), counter:
        logits = torch.nn.functional.linear(torch.randn(3, 8).bfloat16(), weight).float()
        draw(logits, [settings] * 3, [uniform(0, i, 0) for i in range(3)])
    assert counter.peak_bytes == pytest.approx(bytes_per_logit(settings) * logits.numel(), rel=0.01)  # indices beside
