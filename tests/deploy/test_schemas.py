"""What deploys the service elsewhere is well-formed: each file is read by whoever would take it, or held to their own schema.

hadolint, systemd-analyze and kubectl read theirs; the Kubernetes API's schemas, the Prometheus operator's and the Compose
specification's are packages; KubeRay's, of which there is none, stands here as far as it is used. Each check is shown to
refuse a file that is broken in one place.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.prometheus_operator import v1, v1alpha1
from compose_pydantic import ComposeSpecification

from tests.deploy.conftest import DEPLOY
from tests.deploy.test_manifests import KUBERNETES, OBJECTS, PODS, UNIT

BUILT_IN = ("v1", "policy/v1", "networking.k8s.io/v1")  # whose schemas the Kubernetes API has
MONITORS = {"PodMonitor": v1.PodMonitor, "ScrapeConfig": v1alpha1.ScrapeConfig}
EXPOSED = 2.5  # of 10, by systemd's own count; what is left is the network and the kernels written at run time
STRING, NUMBER, OBJECT = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "object"}


def fields(*required: str, **types: Any) -> Any:
    """The schema of an object that has these fields and no others."""
    return {"type": "object", "properties": types, "required": list(required), "additionalProperties": False}


# KubeRay's ray-operator/apis/ray/v1/{rayservice,raycluster}_types.go (Apache-2.0), from which its own is generated: names,
# types and what is required of the fields that may be used here. What Ray runs in is Kubernetes' and checked by that.
GROUP = {"rayStartParams": {"type": "object", "additionalProperties": STRING}, "template": OBJECT}
KUBERAY = fields(
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayService"},
    metadata=fields("name", name=STRING, namespace=STRING, labels=OBJECT, annotations=OBJECT),
    spec=fields(
        "rayClusterConfig",
        serveConfigV2=STRING,
        excludeHeadPodFromServeSvc={"type": "boolean"},
        serveService=OBJECT,
        upgradeStrategy=OBJECT,
        rayClusterConfig=fields(
            "headGroupSpec",
            rayVersion=STRING,
            authOptions=fields(mode=STRING),
            gcsFaultToleranceOptions=OBJECT,
            headGroupSpec=fields("rayStartParams", "template", **GROUP, serviceType=STRING, headService=OBJECT),
            workerGroupSpecs={
                "type": "array",
                "items": fields(
                    *("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
                    **GROUP,
                    groupName=STRING,
                    replicas=NUMBER,
                    minReplicas=NUMBER,
                    maxReplicas=NUMBER,
                ),
            },
        ),
    ),
)
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


class Faulty(Exception):
    """A file is refused."""


def kubernetes(found: Any) -> None:
    try:
        kubernetes_validate.validate(found, "1.37", strict=True)
    except kubernetes_validate.ValidationError as error:
        raise Faulty(str(error)) from error


def monitor(found: Any) -> None:
    """By the operator's model, which passes over fields that it does not know: they are missing from what it gives back."""
    try:
        read = MONITORS[found["kind"]].model_validate(found).model_dump(mode="json", by_alias=True, exclude_unset=True)
    except ValueError as error:
        raise Faulty(str(error)) from error
    if lost := unknown(found, read):
        raise Faulty(f"unknown: {lost}")


def unknown(found: Any, read: Any) -> list[str]:
    """Paths of what stands in one and not in the other."""
    if isinstance(found, dict):
        return [f"{key}.{path}" for key, value in found.items() for path in unknown(value, read.get(key) if read else None)]
    if isinstance(found, list):
        pairs = zip(found, read or [None] * len(found), strict=True)
        return [path for value, other in pairs for path in unknown(value, other)]
    return [] if read is not None else [""]


def kuberay(found: Any) -> None:
    try:
        jsonschema.validate(found, KUBERAY)
    except jsonschema.ValidationError as error:
        raise Faulty(f"{error.json_path}: {error.message}") from error


def compose(found: Any) -> None:
    try:
        ComposeSpecification.model_validate(found)
    except ValueError as error:
        raise Faulty(str(error)) from error


def pod(part: str) -> Any:
    """What Ray runs in, as a Pod of its own."""
    return {"apiVersion": "v1", "kind": "Pod", **PODS[part], "metadata": {"name": part, **PODS[part]["metadata"]}}


CHECKS: dict[str, tuple[Callable[[Any], None], Any]] = {
    **{name: (kubernetes, found) for name, found in OBJECTS.items() if found["apiVersion"] in BUILT_IN},
    **{f"pod of the {part}": (kubernetes, pod(part)) for part in PODS},
    **{name: (monitor, found) for name, found in OBJECTS.items() if found["kind"] in MONITORS},
    **{name: (kuberay, found) for name, found in OBJECTS.items() if found["kind"] == "RayService"},
    "compose.yaml": (compose, COMPOSE),
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_file_has_its_own_schema(name: str) -> None:
    check, found = CHECKS[name]
    check(found)


@pytest.mark.parametrize("name", CHECKS)
def test_a_field_that_there_is_not_is_refused(name: str) -> None:
    check, found = CHECKS[name]
    broken = copy.deepcopy(found)
    inside = next(value for key, value in broken.items() if key in ("spec", "services", "metadata") and isinstance(value, dict))
    (inside["longserve"] if name == "compose.yaml" else broken["metadata"] if "spec" not in broken else inside)["prots"] = 1
    with pytest.raises(Faulty):
        check(broken)


def test_a_value_of_another_kind_is_refused() -> None:
    for name, where in (("PodMonitor longserve-ray", "podMetricsEndpoints"), ("ScrapeConfig longserve", "staticConfigs")):
        broken = copy.deepcopy(OBJECTS[name])
        broken["spec"][where] = "x"
        with pytest.raises(Faulty):
            monitor(broken)


def test_every_object_has_a_check() -> None:
    assert OBJECTS.keys() <= CHECKS.keys()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["workerGroupSpecs", 0, "replicas"], "2"),
        (["workerGroupSpecs", 0, "groupName"], None),
        (["workerGroupSpecs", 0, "rayStartParams", "num-cpus"], 2),
        (["headGroupSpec", "templates"], {}),
        (["headGroupSpec", "template"], None),
        (["rayversion"], "2.60.0"),
    ],
)
def test_a_rayservice_that_is_broken_in_one_place_is_refused(path: list[Any], value: Any) -> None:
    broken = copy.deepcopy(OBJECTS["RayService longserve"])
    *way, last = path
    inside = reduce(lambda part, key: part[key], way, broken["spec"]["rayClusterConfig"])
    if value is None:
        del inside[last]
    else:
        inside[last] = value
    with pytest.raises(Faulty, match=str(last)):
        kuberay(broken)


def kustomized(folder: Path) -> subprocess.CompletedProcess[str]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not here, which puts the objects together")
    return subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, timeout=60)


def test_kubectl_puts_the_objects_together_with_the_switch_in_the_rayservice() -> None:
    done = kustomized(KUBERNETES)
    assert done.returncode == 0, done.stderr
    (ray,) = [each for each in yaml.safe_load_all(done.stdout) if each["kind"] == "RayService"]
    assert yaml.safe_load(ray["spec"]["serveConfigV2"]) == yaml.safe_load((KUBERNETES / "serve.yaml").read_text())


def test_kubectl_refuses_a_kustomization_that_names_what_is_not_there(tmp_path: Path) -> None:
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    (tmp_path / "kubernetes" / "podmonitor.yaml").unlink()
    assert kustomized(tmp_path / "kubernetes").returncode != 0


def linted(file: Path) -> subprocess.CompletedProcess[str]:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    assert linter is not None, "hadolint is one of the dev extra's packages"
    return subprocess.run([linter, file], capture_output=True, text=True)


def test_the_image_has_no_fault_that_hadolint_knows(tmp_path: Path) -> None:
    done = linted(DEPLOY / "Dockerfile")
    assert done.returncode == 0, done.stdout
    broken = tmp_path / "Dockerfile"
    broken.write_text((DEPLOY / "Dockerfile").read_text() + "\nRUN cd /tmp && sudo true\n")
    assert linted(broken).returncode != 0


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a command that is on this machine."""
    found = tmp_path / UNIT.name
    found.write_text(UNIT.read_text().replace("/opt/longserve/bin/longserve", "/bin/true"))
    return found


def analyzed(asked: list[str], unit: Path) -> str:
    """What systemd-analyze has against a unit; it warns of a key that it does not know, and ends well."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here: it comes with systemd")
    done = subprocess.run(["systemd-analyze", *asked, unit], capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode or unit.name in done.stderr else ""


ASKED = {"verify": ["verify"], "security": ["security", "--offline=true", f"--threshold={EXPOSED * 10:.0f}"]}


@pytest.mark.parametrize("asked", ASKED)
def test_systemd_takes_the_unit_and_finds_it_closed(unit: Path, asked: str) -> None:
    assert analyzed(ASKED[asked], unit) == ""


def test_systemd_finds_fault_with_a_misspelt_key_and_with_an_open_unit(unit: Path) -> None:
    text = unit.read_text()
    unit.write_text(text.replace("[Service]", "[Service]\nRestrat=always"))
    assert analyzed(ASKED["verify"], unit) != ""
    closing = ("Protect", "Private", "Restrict", "NoNew", "Capability", "SystemCall")
    unit.write_text("\n".join(line for line in text.splitlines() if not line.startswith(closing)))
    assert analyzed(ASKED["security"], unit) != ""
