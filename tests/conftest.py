"""What holds for all tests: generated examples have no time limit, for speed is measured in benchmarks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

CACHE = tempfile.TemporaryDirectory(prefix="longserve-tests-")
os.environ["XDG_CACHE_HOME"] = CACHE.name  # what was measured on this machine before is not known here
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True, scope="module")
def threads_as_found() -> Iterator[None]:
    """A replica in this process sets torch's threads; what the next module forecasts depends on how many there are."""
    yield
    torch.set_num_threads(THREADS)
