"""What a service exports, by a real one that has done everything once; and Debian's Prometheus, where it is installed."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.config import EngineConfig, ServiceConfig, UserConfig
from service.plain import listening
from service.replica import Replica
from tests.http.client import Client
from tests.test_app_ray import service as service  # the fixture, once for a module here too

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
SWITCH = {"default": "dense", "backends": {"dense": {}, "performer": {}}}


@pytest.fixture(scope="session")
def exported() -> Mapping[str, frozenset[str]]:
    """Names of all series, each with its labels."""
    families = text_string_to_metric_families(asyncio.run(_everything()))
    return {sample.name: frozenset(sample.labels) for family in families for sample in family.samples}


async def _everything() -> str:
    """The metrics of a replica that has switched, answered, embedded and refused."""
    replica = Replica(ServiceConfig(threads=1, engine=EngineConfig(memory_sample_share=1)))
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
        ):
            assert (await asyncio.to_thread(client.post, path, body)).status == status
        return await asyncio.to_thread(client.metrics)


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
