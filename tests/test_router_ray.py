"""Two replicas behind Serve's proxy: a call goes past the one that reads a long prompt, though it has the fewest calls."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Iterator
from typing import Any

import pytest

from service.routing import TOLD_SECONDS
from tests.http.client import eventually
from tests.serving import Service, serving

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LONG = {"prompt": [7] * 30_000, "max_tokens": 1, "attention": "dense"}
STREAM = {"prompt": "import os", "max_tokens": 60, "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    def two(data: Any) -> None:
        data["applications"][0]["args"] |= {"threads": 1, "http": {"workers": 1}}
        data["applications"][0]["deployments"][0] |= {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.5}}

    with serving(tmp_path_factory.mktemp("router") / "two.yaml", two) as service:
        yield service


def running(service: Service) -> dict[str, float]:
    """Requests by replica."""
    lines = [line for line in service.metrics().splitlines() if line.startswith("longserve_requests_running{")]
    return {line.partition('replica="')[2].partition('"')[0]: float(line.split()[-1]) for line in lines}


def answered(service: Service, replica: str) -> float:
    return sum(service.metric("longserve_requests_total", outcome="ok", replica=replica))


def test_short_calls_go_past_the_replica_that_reads_long_prompts(service: Service) -> None:
    """By calls it has fewer: one against the eight that stream at once."""
    with concurrent.futures.ThreadPoolExecutor(9) as callers:
        long = callers.submit(service.post, "/v1/completions", LONG)
        assert eventually(lambda: sum(running(service).values()) == 1)
        time.sleep(2 * TOLD_SECONDS)  # until it has told of it: by its body's length it seems less
        (busy,) = [name for name, count in running(service).items() if count]
        streams = [callers.submit(service.post, "/v1/completions", STREAM) for _ in range(12)]
        assert [stream.result().events[-1] for stream in streams] == ["[DONE]"] * 12
        assert not long.done(), "it ended too soon to tell"
        assert answered(service, busy) == 0
        assert long.result().status == 200


def test_a_long_prompt_that_is_asked_about_again_goes_where_its_state_is_kept(service: Service) -> None:
    """At once, whether another prompt comes between or not, whole or as a stream."""
    time.sleep(3 * TOLD_SECONDS)  # until what was told of the long prompt is past
    for subject in range(8):
        cached = [ask(service, subject, 0), ask(service, subject, 1)]
        ask(service, 100 + subject, 0)
        cached.append(ask(service, subject, 2))
        assert cached[0] == 0 and min(cached[1:]) > 2048, (subject, cached)


def ask(service: Service, subject: int, question: int) -> int:
    """Ask about one of some long texts; how many of its tokens were kept where that was answered. Every other is a stream."""
    text = " ".join(f"def f{number}(a, b): return a + {subject}{number} * b" for number in range(400))
    body = {"prompt": f"{text} # {question}", "max_tokens": 1}
    if subject % 2:
        told = service.post("/v1/completions", body | {"stream": True, "stream_options": {"include_usage": True}}).events[-2]
        return int(told["usage"]["prompt_tokens_details"]["cached_tokens"])
    return int(service.post("/v1/completions", body).json["longserve"]["cached_tokens"])


def test_equal_replicas_share_what_comes_at_once(service: Service) -> None:
    time.sleep(3 * TOLD_SECONDS)  # until what was told of the long prompt is past
    names = sorted(running(service))
    before = [answered(service, name) for name in names]
    with concurrent.futures.ThreadPoolExecutor(8) as callers:
        calls = [callers.submit(service.complete, "import os") for _ in range(24)]
    assert {each.result().status for each in calls} == {200}
    more = [answered(service, name) - then for name, then in zip(names, before, strict=True)]
    assert sum(more) == 24 and min(more) >= 6
