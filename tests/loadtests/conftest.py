"""What the tests of this folder share: a stub on a socket, and the command line run against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from loadtests import result
from loadtests.result import Report
from loadtests.run import main
from tests.loadtests.stub import Stub, serving


@pytest.fixture
def serve() -> Iterator[Callable[[Stub], str]]:
    """Serves stubs for as long as a test lasts; returns the URL of each."""
    with ExitStack() as stack:
        yield lambda stub: stack.enter_context(serving(stub))


Run = Callable[..., tuple[int, Report]]


@pytest.fixture
def measure(tmp_path: Path) -> Run:
    """Runs a scenario given as fields against a URL; returns the exit status and the report."""

    def run(url: str, *options: str, **fields: Any) -> tuple[int, Report]:
        scenario = tmp_path / "scenario.yaml"
        scenario.write_text(yaml.safe_dump({"name": "trial", "warm_up_requests": 1} | fields))
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        status = main([fields["kind"], str(scenario), "--url", url, "--out", str(out), *options])
        (path,) = out.glob("*/report.json")
        return status, result.load(path)

    return run


def sweep(**fields: Any) -> dict[str, Any]:
    """A short sweep of one length, one request at a time."""
    return {
        "kind": "sweep",
        "lengths": {"kind": "fixed", "tokens": 100},
        "loads": [{"kind": "in_flight", "requests": 1}],
        "seconds": 0.2,
    } | fields
