"""Tests of the scalers' queries with `promtool`, while pods begin and end.

Rules of this file:
- The queries are those of the rendered ScaledObject and of the values for prometheus-adapter; both must give the same.
- A case has the series of each pod, scraped every 15 seconds as the PodMonitors say, and what a query reads.
- Where values change, the times lie between two scrapes: Prometheus 2 and 3 differ in whether a range has its start.
- A pod that ends has a stale marker after its last scrape, as Prometheus writes it when a target is gone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.conftest import K8S, promtool

pytestmark = pytest.mark.unit


SCRAPE_SECONDS = 15
METRICS = {
    "demand": "labelmint_demand_samples",
    "pending": "nv_inference_pending_request_count",
    "queue-time": "nv_inference_queue_duration_us",
}
# The adapter's names of the external metrics, as the HorizontalPodAutoscaler asks for them.
EXTERNAL = {
    "demand": "labelmint_demand_samples",
    "pending": "labelmint_triton_pending_requests",
    "queue-time": "labelmint_triton_queued_requests",
}


@dataclass(frozen=True)
class Case:
    """`pods`: values of each pod from its first scrape. `reads`: seconds, and what the query gives; None: nothing."""

    name: str
    trigger: str
    pods: tuple[str, ...]
    reads: dict[int, float | None]


def life(value: float, *, first: int, scrapes: int) -> str:
    """Return the values of a pod that appears at a scrape, reports the same value, and ends."""
    before = f"_x{first} " if first else ""
    return f"{before}{value:g}x{scrapes - 1} stale"


def work(per_second: float, *, first: int, scrapes: int) -> str:
    """Return Triton's counter of queue microseconds of a pod in which `per_second` requests wait on average."""
    before = f"_x{first} " if first else ""
    return f"{before}0+{per_second * SCRAPE_SECONDS * 1e6:.0f}x{scrapes - 1} stale"


ALWAYS = 60
CASES = (
    Case("steady", "demand", (life(56, first=0, scrapes=ALWAYS),) * 2, {300: 112, 600: 112}),
    # Two gateways are replaced, one after the other. The clients move at once, and 112 samples are owed all the time.
    Case(
        "roll-out of gateways",
        "demand",
        (
            life(56, first=0, scrapes=20),
            life(56, first=0, scrapes=24),
            life(56, first=20, scrapes=ALWAYS),
            life(56, first=24, scrapes=ALWAYS),
        ),
        {295: 112, 315: 112, 375: 112, 600: 112},
    ),
    # Every second scrape one Triton ends and the next begins, and 40 requests wait all the time.
    Case(
        "chain of Tritons",
        "pending",
        tuple(life(40, first=2 * index, scrapes=2) for index in range(20)),
        {150: 40, 300: 40, 570: 40},
    ),
    Case("every Triton has ended", "pending", (life(300, first=0, scrapes=20),) * 5, {290: 1500, 420: None}),
    Case(
        "a Triton ended with many waiting, and another has few",
        "pending",
        (life(300, first=0, scrapes=20), life(5, first=20, scrapes=ALWAYS)),
        {285: 300, 420: 5},
    ),
    # A gateway that was there before owes 144 samples from one scrape on. The mean takes two minutes to read all of it,
    # but a second Triton is asked for within 45 seconds.
    Case("growth", "demand", ("0x19 144x40",), {290: 0, 320: 36, 350: 72, 410: 144}),
    Case("decline", "demand", ("144x19 0x40",), {290: 144, 350: 72, 420: 0}),
    Case("nobody has ever asked", "demand", ("0x60",), {300: 0}),
    Case("steady queue", "queue-time", (work(24, first=0, scrapes=ALWAYS),) * 2, {300: 48, 600: 48}),
    Case(
        "queue of a Triton that has ended",
        "queue-time",
        (work(48, first=0, scrapes=20), work(0, first=0, scrapes=ALWAYS)),
        {285: 48, 300: 0, 315: 0, 330: 0},
    ),
)


def queries(render: Any) -> dict[str, dict[str, str]]:
    """Return the query of each trigger, by scaler."""
    triggers = render("gpu-scale-to-zero").named("ScaledObject", "labelmint-triton")["spec"]["triggers"]
    values = yaml.safe_load((K8S / "components/autoscale-hpa/prometheus-adapter-values.yaml").read_text())
    rules = {rule["name"]["as"]: rule for rule in values["rules"]["external"]}
    adapter = {
        name: rules[EXTERNAL[name]]["metricsQuery"].replace("<<.LabelMatchers>>", 'namespace="labelmint"')
        for name in METRICS
    }
    return {"KEDA": {each["name"]: each["metadata"]["query"] for each in triggers}, "prometheus-adapter": adapter}


def case_file(case: Case, query: str) -> dict[str, Any]:
    series = [
        {"series": f'{METRICS[case.trigger]}{{namespace="labelmint", pod="pod-{index}"}}', "values": values}
        for index, values in enumerate(case.pods)
    ]
    # Somebody else's pods in another namespace, which no query may count.
    series.append({"series": f'{METRICS[case.trigger]}{{namespace="other", pod="pod-0"}}', "values": "0+1000000x80"})
    expected = [
        {
            "expr": query,
            "eval_time": f"{at}s",
            "exp_samples": [] if value is None else [{"labels": "{}", "value": value}],
        }
        for at, value in case.reads.items()
    ]
    return {"interval": f"{SCRAPE_SECONDS}s", "input_series": series, "promql_expr_test": expected}


@pytest.mark.parametrize("scaler", ["KEDA", "prometheus-adapter"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_query_counts_the_pods_that_are_there(render: Any, tmp_path: Path, case: Case, scaler: str) -> None:
    path = tmp_path / "case.yaml"
    path.write_text(yaml.safe_dump({"tests": [case_file(case, queries(render)[scaler][case.trigger])]}))
    promtool("test", "rules", str(path))


def test_both_scalers_ask_the_same(render: Any) -> None:
    keda, adapter = queries(render).values()
    assert keda == adapter
    external = [
        each["external"]
        for each in render("gpu").named("HorizontalPodAutoscaler", "labelmint-triton")["spec"]["metrics"]
    ]
    thresholds = {each["metric"]["name"]: each["target"]["averageValue"] for each in external}
    triggers = render("gpu-scale-to-zero").named("ScaledObject", "labelmint-triton")["spec"]["triggers"]
    assert thresholds == {EXTERNAL[each["name"]]: each["metadata"]["threshold"] for each in triggers}
    for query in keda.values():
        (interval,) = {
            endpoint["interval"]
            for each in render("gpu").of_kind("PodMonitor")
            for endpoint in each["spec"]["podMetricsEndpoints"]
        }
        assert interval == f"{SCRAPE_SECONDS}s"
        assert "[2m:" not in query or f"[2m:{interval}]" in query
