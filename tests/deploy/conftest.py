"""What a service exports, by a real one that has done everything once; and Debian's Prometheus, where it is installed."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.config import EngineConfig, ServiceConfig, ShadowConfig, UserConfig
from service.plain import listening
from service.replica import Replica
from tests.http.client import Client
from tests.serving import Service, serving

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
SWITCH = {"default": "dense", "backends": {"dense": {}, "performer": {}}}


@pytest.fixture(scope="session")
def exported() -> Mapping[str, frozenset[str]]:
    """Names of all series, each with its labels."""
    families = text_string_to_metric_families(asyncio.run(_everything()))
    return {sample.name: frozenset(sample.labels) for family in families for sample in family.samples}


async def _everything() -> str:
    """The metrics of a replica that has switched, answered, embedded, refused, and scored an answer again."""
    engine = EngineConfig(memory_sample_share=1, shadow=ShadowConfig(share=1))
    replica = Replica(ServiceConfig(threads=1, engine=engine))
    async with listening(replica, UserConfig()) as url:
        client = Client(url, replica)
        replica.retarget({"attention": SWITCH})
        while "performer" not in replica.backends:
            await asyncio.sleep(0.01)
        for path, body, status in (
            ("/v1/completions", {"prompt": "import os", "max_tokens": 4}, 200),
            ("/v1/completions", {"prompt": [7] * 40_000}, 400),
            ("/v1/completions", {"prompt": "import os\n" * 1000, "max_tokens": 1}, 200),  # long enough for a worker process
            ("/v1/embeddings", {"input": "import os"}, 200),
            ("/v1/completions", {"prompt": "import os", "max_tokens": 4, "attention": "performer"}, 200),
        ):
            assert (await asyncio.to_thread(client.post, path, body)).status == status
        while "longserve_shadow_agreed_total{" not in await asyncio.to_thread(client.metrics):
            await asyncio.sleep(0.01)
        return await asyncio.to_thread(client.metrics)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two replicas that measure what every step takes and score every answer again, so that what is read once has numbers."""

    def two_replicas(data: Any) -> None:
        data["applications"][0]["args"]["threads"] = 1
        data["applications"][0]["args"]["engine"]["memory_sample_share"] = 1
        data["applications"][0]["args"]["engine"]["shadow"]["share"] = 1
        data["applications"][0]["deployments"][0]["num_replicas"] = 2

    with serving(tmp_path_factory.mktemp("serve") / "two.yaml", two_replicas) as service:
        yield service


@pytest.fixture(scope="session")
def prometheus() -> str:
    """The server's path; `promtool` stands beside it."""
    return _installed("prometheus")


@pytest.fixture(scope="session")
def promtool() -> str:
    return _installed("promtool")


def _installed(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not here: `make prometheus` fetches it")
    return found
