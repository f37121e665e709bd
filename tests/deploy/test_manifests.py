"""What deploys the service elsewhere agrees with it: image, containers, unit of systemd, Kubernetes.

Nothing is built or started: what the files say twice, or what the service's code says too, is compared. Whether each is
well-formed `test_schemas.py` asks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from service import cluster, config
from service.machine import BESIDE_BUDGET_BYTES
from tests.deploy.conftest import DEPLOY

KUBERNETES = DEPLOY / "kubernetes"
UNIT = DEPLOY / "systemd" / "longserve.service"
SERVED = config.read(KUBERNETES / "serve.yaml")
MIB = 1 << 20


def objects() -> Iterator[tuple[str, Any]]:
    """Every object of the kustomization's resources, by kind and name."""
    for name in yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]:
        for found in yaml.safe_load_all((KUBERNETES / name).read_text()):
            yield f"{found['kind']} {found['metadata']['name']}", found


OBJECTS = dict(objects())
RAY = OBJECTS["RayService longserve"]["spec"]
HEAD = RAY["rayClusterConfig"]["headGroupSpec"]
(WORKERS,) = RAY["rayClusterConfig"]["workerGroupSpecs"]
PODS = {"head": HEAD["template"], "worker": WORKERS["template"]}


def container(template: Any) -> Any:
    (only,) = template["spec"]["containers"]
    return only


def in_bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([MG]i)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Mi": 1 << 20, "Gi": 1 << 30}[unit]


@pytest.mark.parametrize("file", ["deploy/Dockerfile", "docs/deploy.md"])
def test_a_ray_that_is_started_otherwise_gets_what_longserve_serve_would_give_it(file: str) -> None:
    image = dict(re.findall(r"(RAY_\w+)=([^\s`]+)", (DEPLOY.parent / file).read_text()))
    alone = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "grpc_proxy", "RAY_DISABLE_DOCKER_CPU_WARNING", "RAY_SERVE_LOG_TO_STDERR"}
    alone |= {"RAY_ENABLE_AUTO_CONNECT", "RAY_SERVE_PROXY_USE_GRPC", "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"}
    alone |= {"RAY_gcs_rpc_server_reconnect_timeout_s"}
    assert image == {name: value for name, value in cluster.ENVIRONMENT.items() if name not in alone}


def test_the_image_copies_what_is_there_and_is_not_kept_out() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    let_in = re.findall(r"^!(.+)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert sorted(path for line in copied for path in line.split()) == sorted(let_in)
    assert all((DEPLOY.parent / path).exists() for path in let_in)


def test_the_containers_root_is_read_only_and_what_is_written_is_a_volume_of_the_image() -> None:
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["longserve"]
    volumes = re.search(r"^VOLUME \[(.+)\]$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert volumes is not None and service["read_only"]
    written = {path.strip(' "') for path in volumes[1].split(",")}
    assert {each.partition(":")[0] for each in service["tmpfs"]} == written
    for name, pod in PODS.items():
        mounts = {each["mountPath"]: each.get("readOnly", False) for each in container(pod)["volumeMounts"]}
        assert container(pod)["securityContext"]["readOnlyRootFilesystem"], name
        assert {path for path, read_only in mounts.items() if not read_only} == written | {"/dev/shm"}, name


def test_the_switch_is_written_once_and_reaches_ray_and_the_command_line() -> None:
    kustomization = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    (generated,) = kustomization["configMapGenerator"]
    (copied,) = kustomization["replacements"]
    assert generated["files"] == ["serve.yaml"] and copied["source"]["name"] == generated["name"]
    assert copied["source"]["fieldPath"] == "data.[serve.yaml]"
    assert copied["targets"] == [{"select": {"kind": "RayService", "name": "longserve"}, "fieldPaths": ["spec.serveConfigV2"]}]
    assert kustomization["generatorOptions"]["disableNameSuffixHash"], "a switch would change the pods"
    for pod in PODS.values():
        assert {"name": "config", "configMap": {"name": generated["name"]}} in pod["spec"]["volumes"]


def test_every_replica_has_a_worker_with_its_cpus_and_none_is_left_without() -> None:
    (application,) = SERVED.applications
    (deployment,) = application.deployments
    assert deployment.ray_actor_options is not None
    cpus = str(application.args.threads)
    assert WORKERS["replicas"] == WORKERS["minReplicas"] == deployment.num_replicas, "a worker without a replica is never ready"
    assert deployment.max_replicas_per_node == 1
    assert f"{deployment.ray_actor_options.num_cpus:g}" == WORKERS["rayStartParams"]["num-cpus"] == cpus
    assert container(PODS["worker"])["resources"]["requests"]["cpu"] == cpus
    assert HEAD["rayStartParams"]["num-cpus"] == "0"


def test_a_worker_has_the_memory_that_its_replica_may_take() -> None:
    numbers = [int(each.replace(",", "")) for each in re.findall(r"[\d,]*\d", _sum())]
    *parts, total = numbers
    assert sum(parts) == total
    assert parts[0] * MIB == SERVED.applications[0].args.engine.memory_budget_bytes
    assert parts[1] * MIB == BESIDE_BUDGET_BYTES
    assert parts[5] * MIB == int(WORKERS["rayStartParams"]["object-store-memory"])
    limits = container(PODS["worker"])["resources"]
    assert total * MIB <= in_bytes(limits["requests"]["memory"]) == in_bytes(limits["limits"]["memory"])


def test_callers_need_keys_and_the_pods_get_them_from_the_secret() -> None:
    http = SERVED.applications[0].args.http
    assert not SERVED.http_options.is_loopback
    for pod in PODS.values():
        (variable,) = container(pod)["env"]
        assert variable["name"] == http.api_keys_env
        secret = variable["valueFrom"]["secretKeyRef"]["name"]
        (mount,) = [each for each in container(pod)["volumeMounts"] if each["name"] == "keys"]
        assert str(Path(str(http.api_keys_file)).parent) == mount["mountPath"]
        assert secret in [each["secret"]["secretName"] for each in pod["spec"]["volumes"] if each["name"] == "keys"]


def test_policies_and_monitors_select_pods_and_ports_that_there_are() -> None:
    labels = {name: pod["metadata"]["labels"] for name, pod in PODS.items()}
    assert {tuple(each.items()) for each in labels.values()} == {(("app", "longserve"),)}
    assert OBJECTS["NetworkPolicy longserve"]["spec"]["podSelector"]["matchLabels"] == labels["head"]
    assert OBJECTS["PodMonitor longserve-ray"]["spec"]["selector"]["matchLabels"] == labels["head"]
    for pod in PODS.values():
        ports = {each["name"]: each["containerPort"] for each in container(pod)["ports"]}
        assert ports["serve"] == SERVED.http_options.port
        assert {each["port"] for each in OBJECTS["PodMonitor longserve-ray"]["spec"]["podMetricsEndpoints"]} <= ports.keys()
    (scraped,) = OBJECTS["ScrapeConfig longserve"]["spec"]["staticConfigs"]
    assert scraped["targets"] == [f"longserve-serve-svc.longserve.svc:{SERVED.http_options.port}"]


def test_what_is_admitted_may_end_before_the_end_of_unit_container_and_pod() -> None:
    (deployment,) = SERVED.applications[0].deployments
    grace = PODS["worker"]["spec"]["terminationGracePeriodSeconds"]
    assert SERVED.applications[0].args.drain_seconds < deployment.graceful_shutdown_timeout_s < grace
    (local,) = config.read(DEPLOY / "local.yaml").applications
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["longserve"]["stop_grace_period"]
    unit = re.search(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)
    assert unit is not None
    assert local.args.drain_seconds < min(int(compose.removesuffix("s")), int(unit[1])) - cluster.END_SECONDS


def test_the_files_for_many_calls_and_for_one_machine_serve_the_same() -> None:
    local, many = (config.read(DEPLOY / name) for name in ("local.yaml", "throughput.yaml"))
    assert many == local


def test_the_unit_signals_the_service_alone() -> None:
    lines = UNIT.read_text().splitlines()
    assert "KillMode=mixed" in lines  # by default systemd signals Ray's daemons too, and nothing drains
    assert "ExecReload=/opt/longserve/bin/longserve apply /etc/longserve/local.yaml" in lines


def _sum() -> str:
    """The sum of a worker's memory in the manifest's comment: its parts, then the total."""
    lines = (KUBERNETES / "rayservice.yaml").read_text().splitlines()
    text = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
    return text.partition("MiB: ")[2].partition(", given as")[0]
