"""Tests of what schemas cannot check: the parts of a composition fit each other and the programs that they run."""

import re
from typing import Any

import pytest
import yaml

from labelmint.gateway.process.settings import ServeSettings
from labelmint.gateway.rest.middleware import ALIVE_PATH, READY_PATH
from tests.k8s.conftest import COMPOSITIONS, JOBS, K8S, OVERLAYS, Rendered, deployment, together
from tests.support.kubernetes import Object, containers, quantity

pytestmark = pytest.mark.unit


TRITON_PATHS = {"/v2/health/live", "/v2/health/ready"}
ZEROS = "sha256:" + "0" * 64
# Two batches: one running and one waiting.
SAMPLES_PER_TRITON = 32


def selected(manifests: Rendered, selector: dict[str, str]) -> list[Object]:
    """Return the pod templates with these labels."""
    return [
        template for _, template in manifests.workloads() if selector.items() <= template["metadata"]["labels"].items()
    ]


def ports(template: Object) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for each in containers(template) for port in each.get("ports", [])}


def seconds(manifests: Rendered, setting: str) -> float:
    """Return a setting of the gateway, parsed as the gateway parses it."""
    spec, gateway = deployment(manifests, "gateway")
    environment = manifests.environment(spec, gateway)
    found: float = getattr(ServeSettings(**{setting: environment[f"LABELMINT_{setting.upper()}"]}), setting)
    return found


@pytest.fixture(params=["base", *OVERLAYS])
def service(request: pytest.FixtureRequest, render: Any) -> Rendered:
    """Yield each composition that serves."""
    found: Rendered = render(request.param)
    return found


def test_selectors_match_labels(manifests: Rendered) -> None:
    for each in manifests.of_kind("Deployment"):
        labels = each["spec"]["template"]["metadata"]["labels"]
        assert each["spec"]["selector"]["matchLabels"].items() <= labels.items()
    for each in manifests.of_kind("Service"):
        assert selected(manifests, each["spec"]["selector"]), each["metadata"]["name"]
    for each in manifests.of_kind("PodDisruptionBudget", "PodMonitor"):
        assert selected(manifests, each["spec"]["selector"]["matchLabels"]), each["metadata"]["name"]
    whole = Rendered(manifests.name, together(manifests))  # a job's policies are also about pods of the service
    for each in manifests.of_kind("NetworkPolicy"):
        chosen = each["spec"]["podSelector"].get("matchLabels")
        assert chosen is None or selected(whole, chosen), each["metadata"]["name"]
    for _, template in manifests.workloads():
        for spread in template["spec"].get("topologySpreadConstraints", []):
            assert spread["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


def test_ports_exist(manifests: Rendered) -> None:
    for each in manifests.of_kind("Service"):
        for template in selected(manifests, each["spec"]["selector"]):
            for port in each["spec"]["ports"]:
                number = ports(template)[port["targetPort"]]
                if each["spec"].get("clusterIP") == "None":
                    assert port["port"] == number, "a headless service does not translate"
    for each in manifests.of_kind("PodMonitor"):
        (template,) = selected(manifests, each["spec"]["selector"]["matchLabels"])
        assert {endpoint["port"] for endpoint in each["spec"]["podMetricsEndpoints"]} <= set(ports(template))
    whole = Rendered(manifests.name, together(manifests))
    for each in manifests.of_kind("NetworkPolicy"):
        for rule in each["spec"].get("ingress", []):
            (template,) = selected(whole, each["spec"]["podSelector"]["matchLabels"])
            assert {port["port"] for port in rule["ports"]} <= set(ports(template)), each["metadata"]["name"]


def test_addresses_lead_somewhere(render: Any) -> None:
    """Triton's address for gateways and the index job, and the gateway's for the pull job, are services with a port."""
    base, job, indexing = render("base"), render("jobs/pull"), render("jobs/index")
    spec, gateway = deployment(base, "gateway")
    (pull, _) = next(job.workloads())[1]["spec"]["initContainers"]
    (index,) = next(indexing.workloads())[1]["spec"]["containers"]
    urls = (
        base.environment(spec, gateway)["LABELMINT_TRITON_URL"],
        job.environment(job, pull)["ENDPOINT"],
        indexing.environment(indexing, index)["TRITON_URL"],
    )
    for url in urls:
        name, _, port = url.partition(":")
        found = base.named("Service", name)["spec"]
        assert found["clusterIP"] == "None", "gRPC balances over the addresses of pods"
        assert int(port) in {each["port"] for each in found["ports"]}


def test_quantities_parse_and_requests_fit_limits(manifests: Rendered) -> None:
    for each, template in manifests.workloads():
        spec = template["spec"]
        for container in containers(template):
            where = f"{each['metadata']['name']}/{container['name']}"
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert {"cpu", "memory"} <= requests.keys() and "memory" in limits, where
            for name, amount in limits.items():
                assert quantity(requests[name]) <= quantity(amount), f"{where}: {name}"
            assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu"), where
        volumes = [volume["emptyDir"] for volume in spec["volumes"] if "emptyDir" in volume]
        in_memory = [quantity(volume["sizeLimit"]) for volume in volumes if volume.get("medium") == "Memory"]
        assert all("sizeLimit" in volume for volume in volumes)
        memory = min(quantity(container["resources"]["limits"]["memory"]) for container in spec["containers"])
        assert sum(in_memory) <= memory / 4


def test_volumes_are_there(manifests: Rendered) -> None:
    for _, template in manifests.workloads():
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        mounts = {mount["name"] for each in containers(template) for mount in each.get("volumeMounts", [])}
        assert mounts == volumes
    triton = [each for each in manifests.of_kind("Deployment") if each["metadata"]["name"] == "labelmint-triton"]
    for each in triton:
        mounts = {mount["mountPath"] for mount in each["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]}
        assert {"/dev/shm", "/tmp"} <= mounts


def test_pods_are_restricted(manifests: Rendered) -> None:
    """Pods meet the Pod Security Standards, level restricted, and have a read-only root file system."""
    for each, template in manifests.workloads():
        spec, name = template["spec"], each["metadata"]["name"]
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False, name
        account = manifests.named("ServiceAccount", spec["serviceAccountName"])
        assert account["automountServiceAccountToken"] is False
        allowed = {"name", "configMap", "emptyDir", "secret", "persistentVolumeClaim"}
        assert all(volume.keys() <= allowed for volume in spec["volumes"]), name
        for container in containers(template):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, f"{name}/{container['name']}"


def test_the_namespace_lets_only_restricted_pods_in(service: Rendered) -> None:
    (namespace,) = service.of_kind("Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_images_are_named_by_digest(manifests: Rendered) -> None:
    for _, template in manifests.workloads():
        for container in containers(template):
            assert re.fullmatch(r"[a-z0-9./-]+@sha256:[0-9a-f]{64}", container["image"]), container["image"]


def test_digests_that_nobody_can_know_yet_are_in_one_place() -> None:
    holders = [
        path for path in K8S.rglob("*") if path.is_file() and path.suffix != ".pyc" and ZEROS in path.read_text()
    ]
    assert [path.relative_to(K8S).as_posix() for path in holders] == ["components/images/kustomization.yaml"]
    images = yaml.safe_load(holders[0].read_text())["images"]
    assert {each["name"] for each in images if each["digest"] == ZEROS} == {
        "labelmint-gateway",
        "labelmint-models",
        "labelmint-client",
        "labelmint-triton",
    }


def test_probes_mean_different_things_and_hit_routes(service: Rendered) -> None:
    _, gateway = deployment(service, "gateway")
    _, triton = deployment(service, "triton")
    found = {
        name: [container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "readiness", "liveness")]
        for name, container in (("gateway", gateway), ("triton", triton))
    }
    # A gateway must start without Triton: a scaler starts a Triton only for demand, which only a gateway can report.
    assert found["gateway"] == [ALIVE_PATH, READY_PATH, ALIVE_PATH]
    assert found["triton"] == ["/v2/health/ready", "/v2/health/ready", "/v2/health/live"]
    tls = "LABELMINT_TLS_CERTIFICATE" in service.environment({}, gateway)
    for container in (gateway, triton):
        for probe in ("startup", "readiness", "liveness"):
            request = container[f"{probe}Probe"]["httpGet"]
            assert request["port"] in {port["name"] for port in container["ports"] if port["name"] == "http"}
            assert request.get("scheme", "HTTP") == ("HTTPS" if tls and container is gateway else "HTTP")


def test_the_end_of_a_gateway_fits_its_grace_period(service: Rendered) -> None:
    spec, gateway = deployment(service, "gateway")
    own = seconds(service, "drain_seconds") + seconds(service, "grace_seconds") + 2  # two pauses of a second at the end
    assert own < spec["terminationGracePeriodSeconds"]
    assert "lifecycle" not in gateway, "drain_seconds is the pause; a preStop pause would be added to it"
    probe = gateway["readinessProbe"]
    assert seconds(service, "drain_seconds") > probe["periodSeconds"] * probe["failureThreshold"]


def test_the_end_of_a_triton_fits_its_grace_period(service: Rendered) -> None:
    spec, triton = deployment(service, "triton")
    (exit_timeout,) = [int(each.split("=")[1]) for each in triton["args"] if each.startswith("--exit-timeout-secs=")]
    pause = triton["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pause + exit_timeout + 5 <= spec["terminationGracePeriodSeconds"]


def test_a_rollout_of_triton_needs_no_spare_gpu(service: Rendered) -> None:
    spec = service.named("Deployment", "labelmint-triton")["spec"]
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}
    # The gateways keep requests waiting while the old pod ends and the next one starts.
    assert seconds(service, "capacity_wait_seconds") > 2 * spec["template"]["spec"]["terminationGracePeriodSeconds"]


def test_a_gpu_is_asked_for_where_it_should_be(render: Any) -> None:
    for name in OVERLAYS:
        spec, triton = deployment(render(name), "triton")
        gpu = name != "dev-cpu"
        assert ("nvidia.com/gpu" in triton["resources"]["limits"]) is gpu
        assert (spec.get("runtimeClassName") == "nvidia") is gpu
        assert ("nvidia.com/gpu" in {each["key"] for each in spec.get("tolerations", [])}) is gpu
        _, gateway = deployment(render(name), "gateway")
        assert "nvidia.com/gpu" not in gateway["resources"]["limits"]
    pool = render("gpu-scale-to-zero").named("NodePool", "labelmint-gpu")["spec"]["template"]
    spec, _ = deployment(render("gpu-scale-to-zero"), "triton")
    assert spec["nodeSelector"].items() <= pool["metadata"]["labels"].items()
    assert {taint["key"] for taint in pool["spec"]["taints"]} <= {each["key"] for each in spec["tolerations"]}


@pytest.mark.parametrize("name", [name for name in COMPOSITIONS if name not in JOBS])
def test_environment_variables_are_settings(render: Any, name: str) -> None:
    """The gateway's variables are settings of `labelmint serve`, and it accepts their values together."""
    manifests: Rendered = render(name)
    spec, gateway = deployment(manifests, "gateway")
    environment = manifests.environment(spec, gateway)
    fields = {f"LABELMINT_{field.upper()}": field for field in ServeSettings.model_fields}
    assert environment.keys() <= fields.keys()
    settings = ServeSettings.model_validate({fields[key]: value for key, value in environment.items()})
    assert settings.host == "0.0.0.0" and settings.triton_url
    assert settings.insecure is (settings.tokens_file is None)
    mounted = {mount["mountPath"] for mount in gateway["volumeMounts"]}
    for path in (settings.tokens_file, settings.tls_certificate, settings.tls_key):
        assert path is None or str(path.parent) in mounted
    assert settings.index is None or str(settings.index) in mounted
    open_ports = {port["name"]: port["containerPort"] for port in gateway["ports"]}
    assert open_ports == {"http": settings.http_port, "grpc": settings.grpc_port}


def test_arguments_name_variables_that_are_there(manifests: Rendered) -> None:
    for _, template in manifests.workloads():
        for container in containers(template):
            known = manifests.environment(template, container).keys() | {
                each["name"] for each in container.get("env", [])
            }
            used = re.findall(r"\$\((\w+)\)", " ".join(container.get("args", []) + container.get("command", [])))
            assert set(used) <= known, container["name"]


def scalers(manifests: Rendered) -> dict[str, tuple[int, int]]:
    """Return the smallest and largest number of pods of each scaled deployment."""
    found = {}
    for each in manifests.of_kind("HorizontalPodAutoscaler"):
        spec = each["spec"]
        found[spec["scaleTargetRef"]["name"]] = (spec["minReplicas"], spec["maxReplicas"])
    for each in manifests.of_kind("ScaledObject"):
        spec = each["spec"]
        found[spec["scaleTargetRef"]["name"]] = (spec["minReplicaCount"], spec["maxReplicaCount"])
    return found


def test_scalers_own_the_number_of_pods(service: Rendered) -> None:
    scaled = scalers(service)
    assert len(scaled) == len(service.of_kind("HorizontalPodAutoscaler", "ScaledObject"))
    assert scaled.keys() == ({"labelmint-gateway", "labelmint-triton"} if "gpu" in service.name else set())
    for name, (smallest, largest) in scaled.items():
        assert smallest <= largest, name
    for each in service.of_kind("Deployment"):
        assert ("replicas" in each["spec"]) is (each["metadata"]["name"] not in scaled)
    if service.name == "gpu-scale-to-zero":
        assert scaled["labelmint-triton"][0] == 0
        assert scaled["labelmint-gateway"][0] >= 1, "a gateway must report the demand"


def test_disruption_budgets_let_nodes_be_drained(service: Rendered) -> None:
    scaled, budgets = scalers(service), service.of_kind("PodDisruptionBudget")
    assert {each["metadata"]["name"] for each in budgets} == {"labelmint-gateway", "labelmint-triton"}
    for each in budgets:
        name = each["metadata"]["name"]
        smallest = scaled[name][0] if name in scaled else service.named("Deployment", name)["spec"]["replicas"]
        spec = each["spec"]
        assert spec.get("maxUnavailable", 0) > 0 or 0 < spec["minAvailable"] < smallest, name


def test_gateways_have_slots_for_every_triton(service: Rendered) -> None:
    """The slots of the fewest gateways suffice for two batches per Triton at the largest scale. Otherwise some idle."""
    scaled = scalers(service)
    gateways = (
        scaled.get("labelmint-gateway", (0, 0))[0]
        or service.named("Deployment", "labelmint-gateway")["spec"]["replicas"]
    )
    tritons = scaled.get("labelmint-triton", (1, 1))[1]
    slots = seconds(service, "triton_slots")
    assert gateways * slots >= min(SAMPLES_PER_TRITON, 16 * gateways) * tritons


def test_the_node_pool_has_room_for_the_largest_scale(render: Any) -> None:
    zero = render("gpu-scale-to-zero")
    pool = zero.named("NodePool", "labelmint-gpu")["spec"]
    assert int(pool["limits"]["nvidia.com/gpu"]) >= scalers(zero)["labelmint-triton"][1]


def test_models_come_from_one_place(render: Any) -> None:
    for store, start in (
        ("base", "/models"),
        ("base+model-store/s3", "s3://"),
        ("base+model-store/minio", "s3://http://"),
        ("base+model-store/gcs", "gs://"),
        ("base+model-store/pvc", "/models"),
    ):
        manifests = render(store)
        spec, triton = deployment(manifests, "triton")
        assert manifests.environment(spec, triton)["MODEL_REPOSITORY"].startswith(start)
        assert bool(spec.get("initContainers")) is (store == "base")
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert ("models" in volumes) is (start == "/models")
        assert ("persistentVolumeClaim" in volumes.get("models", {})) is (store == "base+model-store/pvc")
        leaves = manifests.of_kind("NetworkPolicy")
        remote = "labelmint-triton-model-store" in {each["metadata"]["name"] for each in leaves}
        assert remote is (start not in "/models")


def test_prometheus_may_ask_where_tokens_are_wanted(render: Any) -> None:
    for name in ("gpu", "gpu-scale-to-zero"):
        (endpoint,) = render(name).named("PodMonitor", "labelmint-gateway")["spec"]["podMetricsEndpoints"]
        assert endpoint["authorization"]["credentials"]["name"] == "labelmint-prometheus-token"
        assert endpoint["scheme"] == "https" and endpoint["tlsConfig"]["serverName"] == "labelmint-gateway"
