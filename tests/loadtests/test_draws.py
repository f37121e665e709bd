"""What is drawn before a run, arrivals, lengths, traces and prompts, follows the law it claims and the seed alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from loadtests import arrivals, lengths, plan, scenario, target, trace, workload
from loadtests.arrivals import Open
from loadtests.faults import ScenarioError, TargetError
from loadtests.scenario import Constant, FixedLength, Gamma, ListedLengths, LogNormalLengths, OnOff, Poisson, Sweep
from tests.loadtests.conftest import sweep
from tests.loadtests.stub import Stub, tokens_of

LAWS: list[Open] = [
    Constant(rate=7.0),
    Poisson(rate=7.0),
    Gamma(rate=7.0, variation=3.0),
    OnOff(rate=14.0, on_seconds=5.0, off_seconds=5.0),
]


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.kind)
def test_arrivals_ascend_within_their_time_and_come_at_their_rate(law: Open) -> None:
    times = np.array(arrivals.draw(law, 4000.0, rng()))
    assert np.all(np.diff(times) >= 0) and times[0] >= 0 and times[-1] < 4000
    spread = getattr(law, "variation", 1.0) / np.sqrt(7 * 4000)  # of a renewal process's count
    assert len(times) / 4000 == pytest.approx(7, rel=4 * spread)


@pytest.mark.parametrize(
    ("law", "variation"), [(LAWS[0], 0.0), (LAWS[1], 1.0), (LAWS[2], 3.0)], ids=["constant", "poisson", "gamma"]
)
def test_gaps_vary_as_the_law_says(law: Open, variation: float) -> None:
    gaps = np.diff(arrivals.draw(law, 20000.0, rng()))
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05, abs=1e-6)


def test_on_off_traffic_is_silent_in_its_silences_and_dense_between() -> None:
    times = np.array(arrivals.draw(LAWS[3], 1000.0, rng()))  # type: ignore[arg-type]
    phase = times % 10
    assert np.all(phase < 5)
    assert len(times) == pytest.approx(14 * 500, rel=0.05)


def test_a_constant_rate_sends_exactly_the_requests_that_fit() -> None:
    assert arrivals.draw(Constant(rate=10.0), 0.3, rng()) == (0.0, 0.1, 0.2)


def test_a_schedule_is_the_seed_s_and_nothing_else_s() -> None:
    assert arrivals.draw(LAWS[1], 10.0, rng(3)) == arrivals.draw(LAWS[1], 10.0, rng(3))  # type: ignore[arg-type]
    assert arrivals.draw(LAWS[1], 10.0, rng(3)) != arrivals.draw(LAWS[1], 10.0, rng(4))  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", lengths.PRESETS)
def test_a_preset_has_the_logarithm_it_was_published_with(preset: scenario.Preset) -> None:
    found = lengths.draw(LogNormalLengths(preset=preset, minimum=1), 50_000, 10**7, rng())
    logs = np.log(found.tokens)
    assert (logs.mean(), logs.std()) == pytest.approx(lengths.PRESETS[preset], rel=0.02)


def test_the_share_of_clipped_lengths_is_counted() -> None:
    found = lengths.draw(LogNormalLengths(ln_mean=np.log(1000), ln_sd=1.0, minimum=1), 20_000, 1000, rng())
    assert max(found.tokens) == 1000
    assert found.clipped_share == pytest.approx(0.5, abs=0.02)


def test_fixed_and_listed_lengths_are_sent_as_they_are_even_beyond_the_server_s_limit() -> None:
    assert lengths.draw(FixedLength(tokens=9), 2, 5, rng()) == lengths.Drawn((9, 9), 0.0)
    assert set(lengths.draw(ListedLengths(tokens=(3, 9)), 100, 5, rng()).tokens) == {3, 9}


TRACES = {
    "azure.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n",
    "azure_2024.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.009930+00:00,4808,10\n2024-05-10 00:00:00.061930+00:00,3180,8\n",
    "mooncake.jsonl": '{"timestamp": 27482, "input_length": 4808, "output_length": 10, "hash_ids": [1]}\n'
    '{"timestamp": 27534, "input_length": 3180, "output_length": 8, "hash_ids": []}\n',
    "burst.csv": "Timestamp,Session ID,Request tokens,Response tokens\n5,1,4808,10\n5.052,1,3180,8\n",
    "plain.jsonl": '{"at": 1.052, "input_tokens": 3180, "output_tokens": 8}\n\n'
    '{"at": 1, "input_tokens": 4808, "output_tokens": 10}\n',
}


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_of_each_format_says_the_same(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(TRACES[name])
    first, second = trace.read(path, time_scale=2.0)
    assert (first.at, first.input_tokens, first.output_tokens) == (0.0, 4808, 10)
    assert (second.input_tokens, second.output_tokens) == (3180, 8)
    assert second.at == pytest.approx(2 * 0.052, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.csv", "when,tokens\n1,2\n", "needs the columns of one of"),
        ("a.csv", "", "no rows"),
        ("a.csv", "at,input_tokens,output_tokens\n1,x,2\n", "line 2"),
        ("a.csv", "at,input_tokens,output_tokens\n1,0,2\n", "at least 1"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "line 2"),
        ("a.jsonl", "[1]\n", "must be an object"),
        ("a.jsonl", "{\n", "line 1: no JSON"),
    ],
)
def test_a_broken_trace_is_told_by_its_line(name: str, text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ScenarioError) as caught:
        trace.read(path)
    assert told in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("tokens", [1, 2, 511, 512, 513, 16_000])
async def test_a_prompt_has_exactly_the_tokens_that_the_server_counts(tokens: int, serve: Callable[[Stub], str]) -> None:
    found = await target.find(serve(Stub()), None)
    async with aiohttp.ClientSession() as session:
        cutter = await workload.cutter(found, session, "stub", "completions", None, 3, 1)
        texts = [(await cutter.prompt(tokens, index)).text for index in range(4)]
    assert cutter.method == workload.SERVER
    assert [tokens_of(text) for text in texts] == [tokens] * 4
    assert texts[3] == texts[0]  # three distinct ones were asked for
    assert tokens < 10 or len(set(texts[:3])) == 3


async def test_a_local_tokenizer_counts_where_it_is_given(serve: Callable[[Stub], str]) -> None:
    from tokenizers import Tokenizer

    path = Path("service/model/embedded/tokenizer.json")
    found = await target.find(serve(Stub(has_tokenize=False)), None)
    async with aiohttp.ClientSession() as session:
        cutter = await workload.cutter(found, session, "stub", "completions", path, 1, 1)
        text = (await cutter.prompt(300, 0)).text
    assert cutter.method == workload.LOCAL
    assert len(Tokenizer.from_file(str(path)).encode(text).ids) == 300


async def test_without_a_tokenizer_lengths_are_estimated_from_one_answer_s_usage(serve: Callable[[Stub], str]) -> None:
    found = await target.find(serve(Stub(has_tokenize=False)), None)
    async with aiohttp.ClientSession() as session:
        cutter = await workload.cutter(found, session, "stub", "completions", None, 1, 1)
        prompt = await cutter.prompt(300, 0)
    assert cutter.method == workload.ESTIMATE and not prompt.is_exact
    assert tokens_of(prompt.text) == 300  # the stub's law is the ratio


async def test_a_server_that_counts_nowhere_is_refused_with_what_helps(serve: Callable[[Stub], str]) -> None:
    found = await target.find(serve(Stub(has_tokenize=False, has_usage=False)), None)
    async with aiohttp.ClientSession() as session:
        with pytest.raises(TargetError, match="--tokenizer"):
            await workload.cutter(found, session, "stub", "completions", None, 1, 1)


def test_every_repeat_goes_through_all_cells_in_an_order_of_its_own() -> None:
    made = scenario.parse(sweep(name="t", repeats=3, lengths={"kind": "list", "tokens": list(range(1, 9))}), "here")
    assert isinstance(made, Sweep)
    planned = plan.blocks(made)
    orders = [[each.cell.tokens for each in planned if each.repeat == repeat] for repeat in range(3)]
    assert all(sorted(order) == list(range(1, 9)) for order in orders)  # type: ignore[type-var]
    assert len({tuple(order) for order in orders}) == 3
    assert plan.blocks(made) == planned


async def test_a_block_draws_the_same_whatever_ran_before_it(serve: Callable[[Stub], str]) -> None:
    fields = sweep(name="t", loads=[{"kind": "poisson", "rate": 50}], repeats=2)
    made = scenario.parse(fields, "here")
    assert isinstance(made, Sweep)
    found = await target.find(serve(Stub()), None)
    async with aiohttp.ClientSession() as session:
        cutter = await workload.cutter(found, session, "stub", "completions", None, 2, 1)
        one, two = plan.blocks(made)
        first = await plan.drawn(two, 1, found, "stub", cutter)
        await plan.drawn(one, 1, found, "stub", cutter)
        assert await plan.drawn(two, 1, found, "stub", cutter) == first
        assert await plan.drawn(one, 1, found, "stub", cutter) != first


def test_the_corpus_is_long_enough_for_any_length_that_is_asked_for() -> None:
    assert len(workload.corpus()) > 5_000_000
    assert json.dumps(workload.corpus()[:1000])
