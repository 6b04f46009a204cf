"""Finds what a rendered set of Kubernetes objects refers to and does not contain.

Rules of this file:
- It knows how Kubernetes refers from one object to another, and nothing of labelmint's own objects.
- A reference resolves only within the namespace of the object that holds it, as in a cluster.
- `given` is what the documentation tells the operator to provide. Whatever else is missing is a problem.
- An object kind or a field whose references are unknown here is a problem too, so that a new kind cannot go unchecked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

Object = dict[str, Any]

CLUSTER_SCOPED = {"Namespace", "NodePool", "RuntimeClass", "EC2NodeClass"}
WITH_PODS = {"Deployment", "Job"}
# Kinds that refer to other objects only in ways that this file follows, or not at all.
KNOWN = CLUSTER_SCOPED | WITH_PODS
KNOWN |= {"ConfigMap", "HorizontalPodAutoscaler", "NetworkPolicy", "PersistentVolumeClaim", "PodDisruptionBudget"}
KNOWN |= {"PodMonitor", "PrometheusRule", "ScaledObject", "Secret", "Service", "ServiceAccount"}
ADDRESS = re.compile(r"(?:s3://)?(?:https?://)?([a-z0-9-]+)(?:\.([a-z0-9-]+)\.svc(?:\.cluster\.local)?)?:(\d+)(?:/.*)?")
QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|Ki|M|Mi|G|Gi|T|Ti)?")
UNITS = {None: 1, "m": Decimal("0.001"), "k": 10**3, "Ki": 2**10, "M": 10**6, "Mi": 2**20}
UNITS |= {"G": 10**9, "Gi": 2**30, "T": 10**12, "Ti": 2**40}
QUERIED_NAMESPACE = re.compile(r'namespace="([^"]*)"')


@dataclass(frozen=True)
class Given:
    """Objects that the operator provides: by kind, their names, and for Secrets and ConfigMaps the keys they hold."""

    objects: Mapping[tuple[str, str], frozenset[str]]
    namespaces: frozenset[str] = frozenset()
    services: frozenset[tuple[str, str, int]] = frozenset()  # namespace, name, port


@dataclass(frozen=True)
class Cluster:
    """The rendered objects, and how to look them up."""

    objects: list[Object]
    given: Given

    def named(self, namespace: str, kind: str, name: str) -> Object | None:
        for each in self.objects:
            if each["kind"] == kind and each["metadata"]["name"] == name and namespace_of(each) == namespace:
                return each
        return None

    def has(self, namespace: str, kind: str, name: str, key: str = "") -> bool:
        """Whether an object of that name is rendered or given; with `key`, also that it holds this key."""
        if (found := self.named(namespace, kind, name)) is not None:
            return not key or key in found.get("data", {})
        keys = self.given.objects.get((kind, name))
        return keys is not None and (not key or key in keys)

    def pods(self, namespace: str, selector: Object | None) -> list[Object]:
        """Return the templates of the pods in a namespace that a label selector chooses; {} chooses all."""
        wanted = (selector or {}).get("matchLabels", {})
        return [
            each["spec"]["template"]
            for each in self.objects
            if each["kind"] in WITH_PODS
            and namespace_of(each) == namespace
            and wanted.items() <= each["spec"]["template"]["metadata"].get("labels", {}).items()
        ]


def namespace_of(each: Object) -> str:
    """Return the namespace that a cluster would put the object into; "" if its kind has none."""
    return "" if each["kind"] in CLUSTER_SCOPED else str(each["metadata"].get("namespace", "default"))


def containers(template: Object) -> list[Object]:
    """Return the containers of a pod template, including init containers."""
    return list(template["spec"].get("initContainers", []) + template["spec"]["containers"])


def ports_of(templates: Iterable[Object]) -> set[str | int]:
    """Return names and numbers of the ports that pods open."""
    opened = [port for each in templates for one in containers(each) for port in one.get("ports", [])]
    return {port["name"] for port in opened} | {port["containerPort"] for port in opened}


def quantity(text: str) -> Decimal:
    """Parse a Kubernetes quantity. Raises AssertionError if it is not one."""
    match = QUANTITY.fullmatch(text)
    assert match is not None, f"{text!r} is not a quantity"
    return Decimal(match[1]) * UNITS[match[2]]


def walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every mapping inside `node` with its path."""
    if isinstance(node, dict):
        yield path, node
        for key, value in node.items():
            yield from walk(value, f"{path}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from walk(value, f"{path}[{index}]")


def problems(objects: list[Object], given: Given) -> list[str]:
    """Return one line for each reference that does not resolve."""
    cluster = Cluster(objects, given)
    found: list[str] = []
    for each in objects:
        kind, name = each["kind"], each["metadata"]["name"]
        where = f"{kind} {namespace_of(each)}/{name}"
        if kind not in KNOWN:
            found.append(f"{where}: references of this kind are unknown; add them to tests/support/kubernetes.py")
        checks = [_placement, _names, _selectors, _networks, _addresses]
        found += [f"{where}: {problem}" for check in checks for problem in check(cluster, each)]
    seen: set[tuple[str, str, str]] = set()
    for each in objects:
        key = (each["kind"], namespace_of(each), each["metadata"]["name"])
        if key in seen:
            found.append(f"{key[0]} {key[1]}/{key[2]}: rendered twice")
        seen.add(key)
    return found


def _placement(cluster: Cluster, each: Object) -> Iterator[str]:
    """The namespace exists, and objects of the cluster have none."""
    if each["kind"] in CLUSTER_SCOPED:
        if "namespace" in each["metadata"]:
            yield "belongs to the cluster, but has a namespace"
        return
    namespace = namespace_of(each)
    if cluster.named("", "Namespace", namespace) is None and namespace not in cluster.given.namespaces:
        yield f"namespace {namespace!r} is neither rendered nor given"


def _names(cluster: Cluster, each: Object) -> Iterator[str]:
    """Every field that names another object names one that is there, with the key that is read from it."""
    namespace = namespace_of(each)
    for path, node in walk(each.get("spec", {})):
        for kind, name, key, optional in _references(path.rsplit(".", 1)[-1], node):
            scope = "" if kind in CLUSTER_SCOPED else namespace
            if not optional and not cluster.has(scope, kind, name, key):
                yield f"{path} names {kind} {name!r}{f' with key {key!r}' if key else ''}, which is not there"
    if each["kind"] in WITH_PODS:
        template = each["spec"]["template"]
        volumes = {volume["name"] for volume in template["spec"].get("volumes", [])}
        mounted = {mount["name"] for one in containers(template) for mount in one.get("volumeMounts", [])}
        for missing in sorted(volumes ^ mounted):
            yield f"volume {missing!r} is {'mounted but not there' if missing in mounted else 'there but not mounted'}"
        for one in containers(template):
            known = {port["name"] for port in one.get("ports", [])}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                port = one.get(probe, {}).get("httpGet", {}).get("port")
                if isinstance(port, str) and port not in known:
                    yield f"{probe} of {one['name']} names port {port!r}, which the container does not open"


def _references(field: str, node: Object) -> Iterator[tuple[str, str, str, bool]]:
    """Yield (kind, name, key, optional) of each object that a mapping refers to. `field` is the mapping's own key."""
    optional = bool(node.get("optional", False))
    if field in ("scaleTargetRef", "nodeClassRef", "authenticationRef"):
        yield node.get("kind", "TriggerAuthentication"), node["name"], "", optional
    elif field in ("configMapRef", "secretRef"):
        yield {"configMapRef": "ConfigMap", "secretRef": "Secret"}[field], node["name"], "", optional
    elif field in ("configMapKeyRef", "secretKeyRef"):
        yield {"configMapKeyRef": "ConfigMap", "secretKeyRef": "Secret"}[field], node["name"], node["key"], optional
    elif field in ("secret", "credentials", "keySecret") and "name" in node:  # of a PodMonitor
        yield "Secret", node["name"], node["key"], optional
    elif field == "secret" and "secretName" in node:  # a volume
        for item in node.get("items", [{"key": ""}]):
            yield "Secret", node["secretName"], item["key"], optional
    elif field == "configMap" and "name" in node:
        for item in node.get("items", [{"key": ""}]):
            yield "ConfigMap", node["name"], item.get("key", ""), optional
    elif field == "persistentVolumeClaim":
        yield "PersistentVolumeClaim", node["claimName"], "", False
    for key, kind in (("serviceAccountName", "ServiceAccount"), ("runtimeClassName", "RuntimeClass")):
        if key in node:
            yield kind, node[key], "", False


def _selectors(cluster: Cluster, each: Object) -> Iterator[str]:
    """Every selector chooses a pod of the set, and the ports that are reached through it are open there."""
    namespace, spec, kind = namespace_of(each), each.get("spec", {}), each["kind"]
    if kind == "Service":
        chosen = cluster.pods(namespace, {"matchLabels": spec["selector"]})
        wanted = [port.get("targetPort", port["port"]) for port in spec["ports"]]
    elif kind == "PodMonitor":
        chosen = cluster.pods(namespace, spec["selector"])
        wanted = [endpoint["port"] for endpoint in spec["podMetricsEndpoints"]]
        if "namespaceSelector" in spec:
            yield "has a namespaceSelector, which this file does not follow"
    elif kind == "PodDisruptionBudget":
        chosen, wanted = cluster.pods(namespace, spec["selector"]), []
    elif kind in WITH_PODS:
        for spread in spec["template"]["spec"].get("topologySpreadConstraints", []):
            if spec["template"] not in cluster.pods(namespace, spread["labelSelector"]):
                yield "a topologySpreadConstraint does not choose its own pod"
        if kind == "Deployment" and spec["template"] not in cluster.pods(namespace, spec["selector"]):
            yield "the selector does not choose its own pods"
        return
    else:
        return
    if not chosen:
        yield f"the selector chooses no pod in {namespace!r}"
    for port in wanted:
        if chosen and port not in ports_of(chosen):
            yield f"port {port!r} is open in none of its pods"


def _networks(cluster: Cluster, each: Object) -> Iterator[str]:
    """A NetworkPolicy chooses pods that exist, its peers exist, and named ports are open where the connection ends."""
    if each["kind"] != "NetworkPolicy":
        return
    namespace, spec = namespace_of(each), each["spec"]
    own = cluster.pods(namespace, spec["podSelector"])
    if not own:
        yield f"podSelector chooses no pod in {namespace!r}"
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        if spec.get(direction) and direction.capitalize() not in spec["policyTypes"]:
            yield f"{direction} rules without the policy type"
        for rule in spec.get(direction, []):
            called: list[Object] = own if direction == "ingress" else []
            for peer in rule.get(peers, []):
                there = peer.get("namespaceSelector", {}).get("matchLabels", {}).get("kubernetes.io/metadata.name")
                if there is not None and there != namespace:
                    if there not in cluster.given.namespaces:
                        yield f"{direction}: namespace {there!r} is not given"
                elif "podSelector" in peer:
                    chosen = cluster.pods(namespace, peer["podSelector"])
                    if not chosen:
                        yield f"{direction}: a peer chooses no pod in {namespace!r}"
                    called = called if direction == "ingress" else called + chosen
            for port in rule.get("ports", []):
                if isinstance(port["port"], str) and port["port"] not in ports_of(called):
                    yield f"{direction}: port {port['port']!r} is open in none of the called pods"


def _addresses(cluster: Cluster, each: Object) -> Iterator[str]:
    """Addresses in settings and triggers are Services with that port; queries ask for the namespace of the set."""
    namespace = namespace_of(each)
    texts: list[str] = [str(value) for value in each.get("data", {}).values()] if each["kind"] == "ConfigMap" else []
    for _, node in walk(each.get("spec", {}).get("triggers", [])):
        texts += [value for value in node.values() if isinstance(value, str)]
    for text in texts:
        for asked in QUERIED_NAMESPACE.findall(text):
            if each["kind"] == "ScaledObject" and asked != namespace:
                yield f"a query asks for namespace {asked!r}"
        if (match := ADDRESS.fullmatch(text)) is None or match[1] == "localhost":
            continue
        name, there, port = match[1], match[2] or namespace, int(match[3])
        service = cluster.named(there, "Service", name)
        opened = {one["port"] for one in service["spec"]["ports"]} if service else set()
        if port not in opened and (there, name, port) not in cluster.given.services:
            yield f"the address {text!r} leads to no Service"
