"""Tests of the network policies: which connections each pod can make, in every composition that changes them.

Rules of this file:
- `may_leave` and `may_enter` evaluate policies as Kubernetes does: what any policy of a pod allows is allowed, and a
  pod that no policy of a direction chooses is open in that direction.
- A connection to another pod of the set needs both ends.
"""

import ipaddress
from typing import Any

import pytest

from tests.k8s.conftest import COMPOSITIONS, Rendered, together
from tests.support.kubernetes import Object, containers

pytestmark = pytest.mark.unit


NAME = "app.kubernetes.io/name"
GATEWAY, TRITON, PULL, INDEX = "labelmint-gateway", "labelmint-triton", "labelmint-pull", "labelmint-index"
# Where names are resolved: CoreDNS, NodeLocal DNSCache, OpenShift's DNS.
DNS = (("kube-system", 53), ("169.254.20.10", 53), ("openshift-dns", 5353))
IDENTITY_OF_AWS = (("169.254.170.23", 80), ("fd00:ec2::23", 80), ("169.254.169.254", 80))
IDENTITY_OF_GOOGLE = (("169.254.169.254", 80), ("169.254.169.252", 988))
# A store's addresses change, so its policy allows HTTPS to anywhere.
STORE = (("52.216.1.1", 443), ("other", 443))
MINIO = (("minio", 9000),)
COLLECTOR = (("observability", 4318),)
EVERYTHING = {
    *DNS,
    *IDENTITY_OF_AWS,
    *IDENTITY_OF_GOOGLE,
    *STORE,
    *MINIO,
    *COLLECTOR,
    ("52.216.1.1", 80),
    ("other", 443),
}

# What a pod can reach outside of the set, beside DNS. What is not here is closed.
OUTSIDE: dict[tuple[str, str], tuple[tuple[str, int], ...]] = {
    ("base+model-store/s3", TRITON): (*STORE, *IDENTITY_OF_AWS),
    ("base+model-store/gcs", TRITON): (*STORE, *IDENTITY_OF_GOOGLE),
    ("base+model-store/minio", TRITON): (*STORE, *IDENTITY_OF_AWS, *MINIO),
    ("base+tracing", GATEWAY): COLLECTOR,
    ("jobs/pull+pull/s3", PULL): (*STORE, *IDENTITY_OF_AWS),
    ("jobs/pull-secured+pull/s3", PULL): (*STORE, *IDENTITY_OF_AWS),
}


def policies(objects: list[Object], pod: str, direction: str) -> list[Object]:
    """Return the policies that choose the pod with this name label, for "Ingress" or "Egress"."""
    found = [each["spec"] for each in objects if each["kind"] == "NetworkPolicy"]
    return [
        spec
        for spec in found
        if direction in spec["policyTypes"] and spec["podSelector"].get("matchLabels", {NAME: pod}) == {NAME: pod}
    ]


def ports(rule: Object, opened: dict[str, int]) -> set[int]:
    return {opened.get(each["port"], 0) if isinstance(each["port"], str) else each["port"] for each in rule["ports"]}


def is_peer(peer: Object, place: str) -> bool:
    """Whether a peer of a rule is `place`: an IP address, a namespace, or the name label of a pod of the set."""
    if "ipBlock" in peer:
        return place[0].isdigit() or ":" in place if peer["ipBlock"]["cidr"] == "0.0.0.0/0" else _within(peer, place)
    if "namespaceSelector" in peer:
        return bool(peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] == place)
    return bool(peer["podSelector"]["matchLabels"] == {NAME: place})


def _within(peer: Object, place: str) -> bool:
    try:
        return ipaddress.ip_address(place) in ipaddress.ip_network(peer["ipBlock"]["cidr"])
    except ValueError:
        return False


def allows(rules: list[Object], peers: str, place: str, *, port: int, opened: dict[str, int]) -> bool:
    return any(
        port in ports(rule, opened) and (peers not in rule or any(is_peer(peer, place) for peer in rule[peers]))
        for rule in rules
    )


def may_leave(objects: list[Object], pod: str, place: str, *, port: int, opened: dict[str, int]) -> bool:
    chosen = policies(objects, pod, "Egress")
    rules = [rule for spec in chosen for rule in spec.get("egress", [])]
    return not chosen or allows(rules, "to", place, port=port, opened=opened)


def may_enter(objects: list[Object], pod: str, place: str, *, port: int, opened: dict[str, int]) -> bool:
    chosen = policies(objects, pod, "Ingress")
    rules = [rule for spec in chosen for rule in spec.get("ingress", [])]
    return not chosen or allows(rules, "from", place, port=port, opened=opened)


def pods(objects: list[Object]) -> dict[str, dict[str, int]]:
    """Return the ports by name of each pod of the set, by its name label."""
    found = {}
    for each in objects:
        if each["kind"] in ("Deployment", "Job"):
            template = each["spec"]["template"]
            opened = [port for one in containers(template) for port in one.get("ports", [])]
            found[template["metadata"]["labels"][NAME]] = {port["name"]: port["containerPort"] for port in opened}
    return found


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_pods_reach_what_they_need_outside_and_nothing_else(render: Any, name: str) -> None:
    manifests: Rendered = render(name)
    objects = together(manifests)
    for pod in pods(objects):
        reached = {(place, port) for place, port in EVERYTHING if may_leave(objects, pod, place, port=port, opened={})}
        assert reached == {*DNS, *OUTSIDE.get((name, pod), ())}, pod


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_pods_of_the_set_reach_each_other_only_along_the_path_of_a_sample(render: Any, name: str) -> None:
    objects = together(render(name))
    found = pods(objects)
    reached = set()
    for caller in found:
        for called, opened in found.items():
            for port, number in opened.items():
                out = may_leave(objects, caller, called, port=number, opened=opened)
                if out and may_enter(objects, called, caller, port=number, opened=opened):
                    reached.add((caller, called, port))
    wanted = {(GATEWAY, TRITON, "grpc")}
    if PULL in found:
        wanted.add((PULL, GATEWAY, "grpc"))
    if INDEX in found:
        wanted.add((INDEX, TRITON, "grpc"))
    assert reached == wanted


@pytest.mark.parametrize("name", [name for name in COMPOSITIONS if not name.startswith("jobs/")])
def test_who_may_enter(render: Any, name: str) -> None:
    """Clients reach the gateways from everywhere. Triton has no authentication: only its metrics can be read."""
    objects = together(render(name))
    for pod, opened in pods(objects).items():
        for place in ("training", "monitoring", "10.0.0.1"):
            entered = {
                port for port, number in opened.items() if may_enter(objects, pod, place, port=number, opened=opened)
            }
            scraped = {"metrics"} if place == "monitoring" and name.startswith("gpu") else set()
            assert entered == ({"http", "grpc"} if pod == GATEWAY else scraped), (pod, place)


def test_everything_is_denied_that_no_policy_allows(render: Any) -> None:
    denied = render("base").named("NetworkPolicy", "default-deny")["spec"]
    assert denied == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
