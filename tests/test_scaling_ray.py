"""A service that grows with its work and shrinks without losing any."""

from __future__ import annotations

import concurrent.futures
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.http.client import Reply, eventually
from tests.serving import Service, serving

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LONG = {"prompt": [7] * 30_000, "max_tokens": 1, "attention": "dense"}


def growing(data: Any) -> None:
    data["applications"][0]["args"] |= {"threads": 1, "http": {"workers": 1}}
    deployment = data["applications"][0]["deployments"][0]
    del deployment["num_replicas"]
    deployment["ray_actor_options"] = {"num_cpus": 0.5}
    deployment["autoscaling_config"] = {
        "min_replicas": 1,
        "max_replicas": 2,
        "upscale_delay_s": 1,
        "downscale_delay_s": 2,
        "look_back_period_s": 2,
        "metrics_interval_s": 0.5,
        "policy": {"policy_function": "service.scaling:ByWork", "policy_kwargs": {"seconds": 2.0}},
    }


def running(service: Service) -> int:
    try:
        return sum(each["state"] == "RUNNING" for each in service.status()[1])
    except json.JSONDecodeError:  # of a service that is changing just now
        return 0


def test_replicas_come_with_work_and_go_without_losing_any(tmp_path: Path) -> None:
    with serving(tmp_path / "growing.yaml", growing) as service, concurrent.futures.ThreadPoolExecutor(8) as callers:
        assert running(service) == 1
        long = [callers.submit(service.post, "/v1/completions", LONG) for _ in range(6)]
        assert eventually(lambda: running(service) == 2, 90)
        assert [each.result().status for each in long] == [200] * 6

        ended, replies = threading.Event(), list[Reply]()

        def ask() -> None:
            while not ended.wait(0.2):
                replies.append(service.complete("import os", max_tokens=4, ignore_eos=True))

        asking = callers.submit(ask)
        assert eventually(lambda: running(service) == 1, 90)
        ended.set()
        asking.result()
        assert {reply.status for reply in replies} == {200}
