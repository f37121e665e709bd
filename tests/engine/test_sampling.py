"""Drawing: the distribution that the settings name, and the same token for the same seed in any company."""

from __future__ import annotations

import math
from array import array
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.engine.meter import StorageCounter
from service.engine.request import Sampling
from service.engine.sampling import PIECE, Past, bytes_per_logit, draw, likeliest, logprobs, uniform

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


@given(
    st.lists(
        st.lists(st.sampled_from((0.0, -0.0, 1.0, 2.0, -3.0, math.inf, -math.inf, math.nan)), min_size=1, max_size=70),
        min_size=1,
        max_size=5,
    )
)
def test_the_likeliest_is_what_torch_says_of_equals_and_of_no_numbers(rows: list[list[float]]) -> None:
    width = max(map(len, rows))
    logits = torch.tensor([row + [-math.inf] * (width - len(row)) for row in rows])
    assert torch.equal(likeliest(logits), logits.argmax(-1))


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


SMALL = 12  # ids of a vocabulary in which texts repeat themselves
ENDS = (3,)
TEXTS = st.lists(st.integers(0, SMALL - 1), max_size=30)
ADJUSTING = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.7]),
    top_k=st.sampled_from([0, 4]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    presence_penalty=st.sampled_from([0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.4, -1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.6]),
    logit_bias=st.dictionaries(st.integers(0, SMALL - 1), st.sampled_from([-100.0, -1.0, 2.5, 100.0]), max_size=4).map(
        lambda found: tuple(found.items())
    ),
    stop_token_ids=st.lists(st.integers(0, SMALL - 1), max_size=2).map(tuple),
    min_tokens=st.integers(0, 20),
)


def adjusted(logits: list[float], settings: Sampling, past: Past) -> list[float]:
    """The logits that are drawn from, by the definition of each field, one token at a time."""
    biases, found = dict(settings.logit_bias), []
    for token, logit in enumerate(logits):
        if token in past.prompt or token in past.output:
            logit = logit / settings.repetition_penalty if logit > 0 else logit * settings.repetition_penalty
        logit += biases.get(token, 0.0)
        logit -= settings.frequency_penalty * past.output.count(token) + settings.presence_penalty * (token in past.output)
        is_early_end = token in (*ENDS, *settings.stop_token_ids) and len(past.output) < settings.min_tokens
        found.append(-math.inf if is_early_end else logit)
    return found


def chances(logits: list[float], settings: Sampling) -> list[float]:
    """Each token's chance at a temperature, after min_p, top_k and top_p in this order."""
    best = max(logits)
    weights = [math.exp((logit - best) / settings.temperature) for logit in logits]
    weights = [weight if weight >= settings.min_p else 0.0 for weight in weights]
    ranked = sorted(range(len(weights)), key=lambda i: -weights[i])
    ranked, kept, reached = ranked[: settings.top_k or None], [], 0.0
    for i in ranked:
        if kept and settings.top_p < 1 and reached >= settings.top_p - 1e-12:
            break
        kept.append(i)
        reached += weights[i] / sum(weights[j] for j in ranked)
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


@given(ADJUSTING, TEXTS, TEXTS, st.integers(0, 99), st.floats(0, 0.999))
def test_every_field_does_what_its_definition_says(
    settings: Sampling, prompt: list[int], output: list[int], seed: int, number: float
) -> None:
    logits = torch.randn(1, SMALL, generator=torch.Generator().manual_seed(seed)) * 3
    past = Past(array("i", prompt), array("i", output))
    (drawn,) = draw(logits, [settings], [number], [past], ENDS)
    wanted = adjusted(logits[0].tolist(), settings, past)
    if settings.temperature == 0:
        assert wanted[drawn.token] == pytest.approx(max(wanted), abs=1e-4)  # float32 rounds a bias of 100 to 1e-5
        return
    shares = chances(wanted, settings)
    ranked = settings.top_k > 0 or settings.top_p < 1  # a cumulative weight over tokens by rank, else by id
    order = sorted(range(SMALL), key=lambda i: -wanted[i]) if ranked else list(range(SMALL))
    before = sum(shares[i] for i in order[: order.index(drawn.token)])
    assert before - 1e-4 <= number <= before + shares[drawn.token] + 1e-4
    assert shares[drawn.token] > 0


@given(st.lists(st.tuples(ADJUSTING, TEXTS, TEXTS), min_size=2, max_size=4), st.integers(0, 99))
def test_a_row_with_penalties_draws_the_same_token_in_any_company(
    rows: list[tuple[Sampling, list[int], list[int]]], seed: int
) -> None:
    logits = torch.randn(len(rows), SMALL, generator=torch.Generator().manual_seed(seed))
    settings, numbers = [row[0] for row in rows], [uniform(seed, i, 0) for i in range(len(rows))]
    pasts = [Past(array("i", prompt), array("i", output)) for _, prompt, output in rows]
    before = logits.clone()
    together = draw(logits, settings, numbers, pasts, ENDS)
    alone = [draw(logits[[i]], [settings[i]], [numbers[i]], [pasts[i]], ENDS)[0] for i in range(len(rows))]
    assert together == alone
    assert torch.equal(logits, before), "the logits themselves stay as they are, for the log-probabilities"


@pytest.mark.parametrize("length", [PIECE - 1, PIECE, PIECE + 1, 3 * PIECE])
def test_a_text_of_several_pieces_is_penalised_as_one(length: int) -> None:
    text = [i % 5 for i in range(length)]
    settings = Sampling(temperature=0, repetition_penalty=2.0, frequency_penalty=0.001, presence_penalty=1.0)
    logits = torch.tensor([[6.0, 5.9, 5.8, 5.7, 5.6, 0.5, -1.0]])
    past = Past(array("i", text), array("i", text))
    (drawn,) = draw(logits, [settings], [0.0], [past], ENDS)
    wanted = adjusted(logits[0].tolist(), settings, past)
    assert drawn.token == wanted.index(max(wanted))


def test_log_probabilities_are_told_before_penalties_and_bias() -> None:
    settings = Sampling(temperature=0, logprobs=2, logit_bias=((0, -100.0),), presence_penalty=2.0)
    (drawn,) = draw(LOGITS, [settings], [0.0], [Past(array("i"), array("i", [1]))], ENDS)
    (told,) = logprobs(LOGITS, [drawn.token], [2])
    assert drawn.logprob == told


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draw_with_penalties_takes_the_bytes_its_law_says(temperature: float) -> None:
    settings = Sampling(temperature=temperature, presence_penalty=1.0, repetition_penalty=1.1, min_p=0.1)
    weight, counter, count = torch.randn(40_960, 8).bfloat16(), StorageCounter(), 3
    past = Past(array("i", range(20_000)), array("i", range(20_000)))
    with torch.inference_mode(), counter:
        logits = torch.nn.functional.linear(torch.randn(count, 8).bfloat16(), weight).float()
        draw(logits, [settings] * count, [uniform(0, i, 0) for i in range(count)], [past] * count, ENDS)
    assert counter.peak_bytes <= 1.1 * bytes_per_logit(settings) * logits.numel()


@pytest.mark.parametrize("penalty", [5e-324, 1e-40, 1e-38])
@pytest.mark.parametrize("temperature", [0, 1, 5e-324])
def test_the_smallest_repetition_penalty_draws_what_was_there_and_nothing_forbidden(penalty: float, temperature: float) -> None:
    logits, allowed = torch.tensor([[1.0, -1.0, 3.0, 2.0, 0.5]]), torch.tensor([False, True, True, True, True]).numpy()
    settings, past = (
        Sampling(temperature=temperature, repetition_penalty=penalty),
        Past(array("i", [0, 3, 4]), array("i"), allowed),
    )
    seen = {draw(logits, [settings], [number / 16], [past])[0].token for number in range(16)}
    assert seen and seen <= {3, 4}


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_of_tokens_that_are_as_likely_the_first_are_told_whoever_asks_beside(count: int) -> None:
    logits = (torch.randn(5, 40, generator=torch.Generator().manual_seed(1)) * 2).round()
    together = logprobs(logits, [0] * 5, [count, 0, 40, 1, 7])
    for row, told in zip(logits, together, strict=True):
        ranked = sorted(range(40), key=lambda token, row=row: (-float(row[token]), token))
        assert [token for token, _ in told.top] == ranked[: len(told.top)]
        assert told == logprobs(row[None], [0], [len(told.top)])[0]
