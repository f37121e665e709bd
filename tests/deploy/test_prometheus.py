"""A real Prometheus over a real service of two replicas under load: what an operator reads is what happened.

One service and one Prometheus for the whole module, on loopback; the last test kills a replica.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import json
import math
import os
import signal
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.metrics import REQUEST_SECONDS
from tests.deploy.conftest import DEPLOY
from tests.deploy.test_observability import PANELS, RULES
from tests.http.client import eventually
from tests.serving import Service, free_port
from tests.test_app_ray import BACKENDS

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LENGTHS = {"2048": 1500, "8192": 6000}  # tokens by length class
REPEATS = 8
SHARES = (0.5, 0.75)  # two callers of the eight may have waited for a CPU themselves
SCRAPE_SECONDS = 2  # and as long may a scrape take
RATE_SECONDS = 20  # over which rates are taken while a replica dies
MAY_BE_EMPTY = {"Last switch: age, seconds it took", "Worker processes, mean"}  # nothing of it has happened here


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus, asked over its HTTP API."""

    url: str

    def ask(self, path: str, **parameters: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=30) as reply:
            answer = json.load(reply)
        assert answer["status"] == "success", answer
        return answer["data"]

    def value(self, expression: str) -> float:
        """An expression's one value now; NaN when there is none."""
        found = self.ask("query", query=expression)["result"]
        return float(found[0]["value"][1]) if found else float("nan")

    def target(self) -> Any:
        """What Prometheus knows of the service: lastScrape, lastError, ..."""
        return self.ask("targets")["activeTargets"][0]

    def curve(self, expression: str, start: float, end: float) -> list[float]:
        """An expression's values from start to end, a second apart."""
        found = self.ask("query_range", query=expression, start=str(start), end=str(end), step="1")["result"]
        return [float(value) for series in found for _, value in series["values"]]


@dataclass
class Load:
    """What was sent, and how long its callers waited."""

    sent: int = 0
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))


@pytest.fixture(scope="module")
def watch(service: Service, prometheus: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "prometheus" / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [service.url.removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [prometheus, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--enable-feature=exemplar-storage"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        found = Prometheus(f"http://127.0.0.1:{port}")
        assert eventually(lambda: is_up(found)), (folder / "log").read_text()
        yield found
    finally:
        process.terminate()
        process.wait(30)


def is_up(prometheus: Prometheus) -> bool:
    try:
        return prometheus.value('up{job="longserve"}') == 1
    except OSError:
        return False


@pytest.fixture(scope="module")
def load(service: Service, watch: Prometheus) -> Load:
    """Requests of every backend and length, three at a time, each counted and timed by its caller. Each prompt comes twice."""
    done = Load()

    def send(text: int, backend: str, length: str) -> None:
        start = time.monotonic()
        prompt = [7 + (text + i) % 4000 for i in range(LENGTHS[length])]
        reply = service.complete(prompt, attention=backend, ignore_eos=True)
        assert reply.status == 200, reply.text
        done.seconds[backend, length].append(time.monotonic() - start)

    jobs = [(repeat // 2, backend, length) for repeat in range(REPEATS) for backend in BACKENDS for length in LENGTHS]
    with concurrent.futures.ThreadPoolExecutor(3) as callers:
        for job in [callers.submit(send, *each) for each in jobs]:
            job.result()
    done.sent = len(jobs)
    assert eventually(lambda: watch.value("sum(longserve_shadow_agreed_total)") > 0, 60)  # at rest, answers are scored again
    time.sleep(3 * SCRAPE_SECONDS)  # the page may be a second old, and the rules are a second behind it
    return done


def test_the_request_total_is_what_was_sent(watch: Prometheus, load: Load) -> None:
    assert watch.value('sum(longserve_requests_total{outcome="ok"})') == load.sent
    assert watch.value("sum(longserve_requests_total)") == load.sent
    assert watch.value('longserve_replicas{state="answered"}') == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_latency_quantiles_are_the_callers_within_a_bucket(watch: Prometheus, load: Load, backend: str, length: str) -> None:
    series = f'longserve_request_duration_seconds_bucket{{backend="{backend}", length="{length}"}}'
    waited = load.seconds[backend, length]
    assert len(waited) == REPEATS
    for share in SHARES:
        told = watch.value(f"histogram_quantile({share}, sum by (le) ({series}))")
        felt = sorted(waited)[math.ceil(share * REPEATS) - 1]
        distance = bisect.bisect_left(REQUEST_SECONDS, told) - bisect.bisect_left(REQUEST_SECONDS, felt)
        assert abs(distance) <= 1, (share, told, felt)


def test_measured_bytes_grow_with_the_input_under_dense_and_stay_under_the_others(watch: Prometheus, load: Load) -> None:
    def mean(backend: str, length: str) -> float:
        of = f'{{backend="{backend}", length="{length}"}}'
        total, count = (watch.value(f"sum(longserve_request_measured_bytes_{part}{of})") for part in ("sum", "count"))
        assert count > 0, of
        return total / count

    growth = {backend: mean(backend, "8192") / mean(backend, "2048") for backend in BACKENDS}
    assert growth["dense"] > 2  # state four times as large, beside a step's peak that is the same
    assert growth["sliding_window"] == pytest.approx(1, abs=0.05)
    assert growth["performer"] == pytest.approx(1, abs=0.05)


def test_a_bucket_has_the_id_of_a_request_that_fell_in_it(watch: Prometheus, load: Load) -> None:
    now = time.time()
    found = watch.ask("query_exemplars", query="longserve_request_duration_seconds_bucket", start=str(now - 600), end=str(now))
    assert all(exemplar["labels"]["request_id"] for series in found for exemplar in series["exemplars"])
    assert found


def test_every_rule_is_loaded_and_evaluates(watch: Prometheus, load: Load) -> None:
    groups = watch.ask("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {rule.get("alert") or rule.get("record") for rule in RULES}
    assert eventually(lambda: {rule["health"] for g in watch.ask("rules")["groups"] for rule in g["rules"]} == {"ok"})


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_is_answered_with_numbers(watch: Prometheus, load: Load, panel: Any) -> None:
    for target in panel["targets"]:
        expression = filled(target["expr"])
        found = watch.ask("query", query=expression)["result"]
        assert found or panel["title"] in MAY_BE_EMPTY, expression


def filled(expression: str) -> str:
    """A panel's expression with Grafana's variables at what they are at first."""
    for name, value in {
        "$__rate_interval": "5m",
        "$job": "longserve",
        "$backend": ".*",
        "$length": ".*",
        "$replica": ".*",
    }.items():
        expression = expression.replace(name, value)
    return expression


def test_killing_a_replica_neither_loses_the_scrape_nor_makes_a_rate_jump(
    service: Service,
    watch: Prometheus,
    load: Load,
) -> None:
    """The last test of the module: it leaves one replica young."""
    sent: list[float] = []
    errors: set[str] = set()
    stopped = threading.Event()

    def ask() -> None:
        while not stopped.is_set():
            service.complete("import os", max_tokens=1)  # the dying replica's callers may see a failure
            sent.append(time.time())
            time.sleep(0.2)

    def look() -> None:
        while not stopped.is_set():
            errors.add(watch.target()["lastError"])
            time.sleep(0.2)

    with concurrent.futures.ThreadPoolExecutor(3) as callers:
        asked = [*(callers.submit(ask) for _ in range(2)), callers.submit(look)]
        try:
            time.sleep(RATE_SECONDS + 2)
            victim, scraped = max(service.pids()), watch.target()["lastScrape"]
            assert eventually(lambda: watch.target()["lastScrape"] != scraped)  # not while it may be answering one itself
            start = time.time()
            os.kill(victim, signal.SIGKILL)
            assert eventually(lambda: watch.value("count(longserve_build_info)") == 1)
            assert eventually(lambda: watch.value("count(longserve_build_info)") == 2, 180)
            time.sleep(RATE_SECONDS)
        finally:
            stopped.set()
        for each in asked:
            each.result()
    end = time.time()
    assert errors == {""}
    assert set(watch.curve('up{job="longserve"}', start, end)) == {1.0}
    rates = watch.curve(f"sum(rate(longserve_requests_total[{RATE_SECONDS}s]))", start, end)
    most = max(sum(second <= t < second + RATE_SECONDS for t in sent) / RATE_SECONDS for second in sent)
    assert max(rates) <= 1.5 * most  # extrapolation to the window's ends adds up to a scrape at either
    assert min(rates) >= 0


def test_the_config_that_ships_scrapes_the_service_that_ships() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    shipped = yaml.safe_load((DEPLOY / "local.yaml").read_text())["http_options"]
    assert config["scrape_configs"][0]["static_configs"] == [{"targets": [f"{shipped['host']}:{shipped['port']}"]}]
    assert all((Path(DEPLOY) / "prometheus" / name).is_file() for name in config["rule_files"])
