"""Tests that every reference of every composition resolves within what a cluster would get."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.k8s.conftest import Rendered, together
from tests.support.kubernetes import CLUSTER_SCOPED, Given, Object, problems

pytestmark = pytest.mark.unit


# What docs/deploying.md tells the operator to provide.
GIVEN = Given(
    objects={
        ("Secret", "labelmint-tokens"): frozenset({"tokens"}),
        ("Secret", "labelmint-prometheus-token"): frozenset({"token"}),
        ("Secret", "labelmint-tls"): frozenset({"tls.crt", "tls.key", "ca.crt"}),
        ("Secret", "labelmint-pull-token"): frozenset({"token"}),
        ("Secret", "labelmint-model-store"): frozenset({"key.json"}),
        ("PersistentVolumeClaim", "labelmint-index"): frozenset(),
        ("PersistentVolumeClaim", "labelmint-models"): frozenset(),
        ("RuntimeClass", "nvidia"): frozenset(),
        ("EC2NodeClass", "labelmint-gpu"): frozenset(),
    },
    namespaces=frozenset({"kube-system", "openshift-dns", "monitoring", "observability", "minio"}),
    services=frozenset(
        {
            ("monitoring", "prometheus-operated", 9090),
            ("observability", "otel-collector", 4318),
            ("minio", "minio", 9000),
        }
    ),
)


def test_every_reference_resolves(manifests: Rendered) -> None:
    assert problems(together(manifests), GIVEN) == []


def test_every_object_is_in_the_namespace_and_has_the_label(manifests: Rendered) -> None:
    for each in manifests.objects:
        where = f"{each['kind']} {each['metadata']['name']}"
        assert each["metadata"]["labels"]["app.kubernetes.io/part-of"] == "labelmint", where
        if each["kind"] not in CLUSTER_SCOPED:
            assert each["metadata"].get("namespace") == "labelmint", where
    for each, template in manifests.workloads():
        assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "labelmint", each["metadata"]["name"]


def test_what_is_given_is_documented() -> None:
    text = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    text += "".join(path.read_text() for path in (ROOT / "k8s").rglob("*.yaml"))
    for _, name in GIVEN.objects:
        assert name in text, name
    for name in GIVEN.namespaces:
        assert name in text, name


def set_in(path: str, value: Any) -> Callable[[Object], None]:
    """Return a change of the field at `path`, in which numbers are indices of lists. None removes the field."""
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]

    def change(each: Object) -> None:
        node: Any = each
        for part in parents:
            node = node[part]
        if value is None:
            del node[last]
        else:
            node[last] = value

    return change


POD = "spec/template/spec"
WRONG: dict[str, tuple[str, str, Callable[[Object], None]]] = {
    "scaler elsewhere": ("ScaledObject", "labelmint-triton", set_in("metadata/namespace", None)),
    "scaler of nothing": ("ScaledObject", "labelmint-triton", set_in("spec/scaleTargetRef/name", "triton")),
    "query elsewhere": (
        "ScaledObject",
        "labelmint-triton",
        set_in("spec/triggers/0/metadata/query", 'sum(x{namespace="default"})'),
    ),
    "prometheus elsewhere": (
        "ScaledObject",
        "labelmint-triton",
        set_in("spec/triggers/0/metadata/serverAddress", "http://prometheus.monitoring.svc:9090"),
    ),
    "monitor of nothing": ("PodMonitor", "labelmint-triton", set_in("spec/selector/matchLabels", {"a": "b"})),
    "monitor of a closed port": (
        "PodMonitor",
        "labelmint-triton",
        set_in("spec/podMetricsEndpoints/0/port", "prometheus"),
    ),
    "monitor without its token": (
        "PodMonitor",
        "labelmint-gateway",
        set_in("spec/podMetricsEndpoints/0/authorization/credentials/key", "tokens"),
    ),
    "budget of nothing": ("PodDisruptionBudget", "labelmint-triton", set_in("spec/selector/matchLabels", {"a": "b"})),
    "service of nothing": ("Service", "labelmint-triton", set_in("spec/selector", {"a": "b"})),
    "service of a closed port": ("Service", "labelmint-triton", set_in("spec/ports/0/targetPort", "h2")),
    "policy of nothing": ("NetworkPolicy", "labelmint-triton", set_in("spec/podSelector/matchLabels", {"a": "b"})),
    "policy for nobody": (
        "NetworkPolicy",
        "labelmint-triton",
        set_in("spec/ingress/0/from/0/podSelector/matchLabels", {"a": "b"}),
    ),
    "policy of a closed port": ("NetworkPolicy", "labelmint-gateway", set_in("spec/egress/0/ports/0/port", "http2")),
    "no settings": ("Deployment", "labelmint-gateway", set_in(f"{POD}/containers/0/envFrom/0/configMapRef/name", "x")),
    "no account": ("Deployment", "labelmint-gateway", set_in(f"{POD}/serviceAccountName", "default-gateway")),
    "no secret": ("Deployment", "labelmint-gateway", set_in(f"{POD}/volumes/0/secret/secretName", "tokens")),
    "no volume": ("Deployment", "labelmint-triton", set_in(f"{POD}/containers/0/volumeMounts/0/name", "model")),
    "no runtime class": ("Deployment", "labelmint-triton", set_in(f"{POD}/runtimeClassName", "nvidia-legacy")),
    "no port for a probe": (
        "Deployment",
        "labelmint-triton",
        set_in(f"{POD}/containers/0/livenessProbe/httpGet/port", "rest"),
    ),
    "no nodes": ("NodePool", "labelmint-gpu", set_in("spec/template/spec/nodeClassRef/name", "default")),
    "a pool in a namespace": ("NodePool", "labelmint-gpu", set_in("metadata/namespace", "labelmint")),
    "an unknown kind": ("NodePool", "labelmint-gpu", set_in("kind", "Ingress")),
    "no namespace": ("Namespace", "labelmint", set_in("metadata/name", "mint")),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_reference_is_found(render: Any, name: str) -> None:
    objects = copy.deepcopy(render("gpu-scale-to-zero").objects)
    kind, which, change = WRONG[name]
    (found,) = [each for each in objects if each["kind"] == kind and each["metadata"]["name"] == which]
    change(found)
    assert problems(objects, GIVEN)
