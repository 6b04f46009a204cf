"""Tests of scalers, rules and the dashboard with a real Prometheus that scrapes a real gateway and a real Triton.

Rules of this file:
- There is no list of metrics here: the metrics that exist are those that Prometheus has scraped.
- An expression passes if it has data under a little load. Other tests check the numbers.
- The numbers of the panels on a sample's time come from the gateway's own metrics under a clock of the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import math
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
import yaml
from prometheus_client import CollectorRegistry, start_http_server

from labelmint.gateway.sampling.metrics import _PART_SECONDS, Metrics
from labelmint.triton.server import TritonServer, wait_until_ready
from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import REPOSITORY, need_program, start_service
from tests.k8s.conftest import K8S, Rendered
from tests.support.waiting import wait_for

pytestmark = pytest.mark.triton


METRIC = re.compile(r"\b(?:labelmint_|nv_|process_|http_server_|rpc_server_)\w+")
RECORDED = re.compile(r"\blabelmint:[\w:]+")
SECONDS = 180
# The time that nine of ten samples of a model take in each part; the tenth takes SLOWER times as long.
TIMES = {
    "Wait for a slot": {"ants": 0.002, "bees": 0.7},
    "Answer of Triton": {"ants": 0.2, "bees": 2.0},
    "Encoding": {"ants": 0.02, "bees": 0.07},
}
SLOWER = 20
TIMED = "timed"  # the namespace of these samples


@dataclass
class Prometheus:
    http: httpx.Client

    def query(self, expression: str) -> list[dict[str, Any]]:
        answer = self.http.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", f"{expression}: {answer}"
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def without_data(self, expressions: list[str]) -> list[str]:
        """Return the expressions that still have no data after a wait."""
        left = expressions

        def all_have_data() -> bool:
            nonlocal left
            left = [each for each in left if not self.query(each)]
            return not left

        with contextlib.suppress(AssertionError):
            wait_for(all_have_data, SECONDS)
        return left


@pytest_asyncio.fixture(scope="module")
async def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Yield the addresses of a gateway's and its Triton's metrics, after some work of every kind."""
    directory = tmp_path_factory.mktemp("loaded")
    triton = TritonServer(REPOSITORY, ["faces"])
    await triton.start()
    try:
        await wait_until_ready(triton)
        service = await asyncio.to_thread(
            start_service, directory / "serve.log", "--triton-url", triton.grpc_url, repository=directory
        )
        try:
            yield service, triton
        finally:
            await asyncio.to_thread(service.stop)
    finally:
        await triton.stop()


@pytest.fixture(scope="module")
def timed() -> Iterator[str]:
    """Yield the address of the metrics of samples that take TIMES, and more and more of them."""
    now, done = 0.0, threading.Event()
    metrics = Metrics(CollectorRegistry(), lambda: now)
    parts = dict(zip(TIMES, (metrics.slot_wait, metrics.triton, metrics.encoding), strict=True))

    def take_time() -> None:
        nonlocal now
        while not done.wait(0.1):
            for title, seconds in TIMES.items():
                for model, each in seconds.items():
                    for taken in (*9 * [each], each * SLOWER):
                        with parts[title](model):
                            now += taken

    server, serving = start_http_server(0, "127.0.0.1", metrics.registry)
    working = threading.Thread(target=take_time)
    working.start()
    yield f"http://127.0.0.1:{server.server_port}"
    done.set()
    working.join()
    server.shutdown()
    server.server_close()
    serving.join()


@pytest.fixture(scope="module")
def prometheus(render: Any, loaded: Any, timed: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Run a Prometheus with the rendered rules. Gateway and Triton have the labels that PodMonitors give them."""
    service, triton = loaded
    directory: Path = tmp_path_factory.mktemp("prometheus")
    rules = copy.deepcopy(render("gpu").named("PrometheusRule", "labelmint")["spec"])
    for group in rules["groups"]:
        group["interval"] = "1s"
    (directory / "rules.yaml").write_text(yaml.safe_dump(rules))
    targets = {"gateway": service.http, "triton": triton.metrics_url.removesuffix("/metrics")}
    scrapes = [
        {
            "job_name": f"labelmint/labelmint-{name}",
            "static_configs": [
                {
                    "targets": [url.removeprefix("http://")],
                    "labels": {"namespace": "labelmint", "pod": f"labelmint-{name}-0"},
                }
            ],
        }
        for name, url in targets.items()
    ]
    of_timed = {"targets": [timed.removeprefix("http://")], "labels": {"namespace": TIMED}}
    scrapes.append({"job_name": TIMED, "static_configs": [of_timed]})
    config = {"global": {"scrape_interval": "1s"}, "rule_files": ["rules.yaml"], "scrape_configs": scrapes}
    (directory / "prometheus.yaml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [need_program("prometheus", "prometheus"), f"--config.file={directory / 'prometheus.yaml'}"]
    command += [f"--storage.tsdb.path={directory / 'data'}", f"--web.listen-address={address}"]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=30.0) as http:
            found = Prometheus(http)

            def all_are_scraped() -> bool:
                assert process.poll() is None, (directory / "log").read_text()
                with contextlib.suppress(httpx.TransportError, ValueError):
                    return len(found.query("up == 1")) == len(scrapes)
                return False

            wait_for(all_are_scraped, SECONDS)
            # Send requests after the first scrape, because rates need counters that rise.
            ask(service.http, service.grpc)
            yield found
    finally:
        process.terminate()
        process.wait(60)


def ask(http: str, address: str) -> None:
    """Request samples one by one and in streams, over REST and gRPC."""
    for seed in range(4):
        httpx.get(f"{http}/v1/models/faces/samples/{seed}?include_rejected=true", timeout=60.0).raise_for_status()
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.SampleServiceStub(channel)
        options = pb.SampleOptions(include_rejected=True)
        stub.GetSample(pb.GetSampleRequest(model="faces", seed=5, options=options))
        list(stub.StreamSamples(pb.StreamSamplesRequest(model="faces", start_seed=0, count=16)))


def scaler_queries(render: Any) -> list[str]:
    """Return the queries of KEDA, and those of prometheus-adapter for the HorizontalPodAutoscaler."""
    keda: Rendered = render("gpu-scale-to-zero")
    triggers = keda.named("ScaledObject", "labelmint-triton")["spec"]["triggers"]
    values = yaml.safe_load((K8S / "components/autoscale-hpa/prometheus-adapter-values.yaml").read_text())
    selector = 'namespace="labelmint"'
    adapter = [rule["metricsQuery"].replace("<<.LabelMatchers>>", selector) for rule in values["rules"]["external"]]
    return [trigger["metadata"]["query"] for trigger in triggers] + adapter


def panels() -> list[dict[str, Any]]:
    dashboard = json.loads((K8S / "components/monitoring/dashboard.json").read_text())
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def filled_in(expression: str, namespace: str = "labelmint") -> str:
    return expression.replace("$__rate_interval", "5m").replace("$namespace", namespace)


def panel_queries() -> list[str]:
    return [filled_in(target["expr"]) for panel in panels() for target in panel["targets"]]


def rules_of(render: Any) -> list[dict[str, Any]]:
    groups = render("gpu").named("PrometheusRule", "labelmint")["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_every_panel_has_data(prometheus: Prometheus) -> None:
    assert prometheus.without_data(panel_queries()) == []


@pytest.mark.parametrize("title", TIMES)
def test_the_parts_of_a_samples_time_are_shown_by_model(prometheus: Prometheus, title: str) -> None:
    """Each panel shows its own part. A quantile is as exact as the buckets, so it must lie in the right one."""
    (panel,) = [panel for panel in panels() if panel["title"] == title]
    assert [target["legendFormat"] for target in panel["targets"]] == ["{{model}} 0.5", "{{model}} 0.95"]
    for target, factor in zip(panel["targets"], (1, SLOWER), strict=True):

        def shown(expression: str = filled_in(target["expr"], TIMED)) -> dict[str, float]:
            values = {each["metric"]["model"]: float(each["value"][1]) for each in prometheus.query(expression)}
            return {} if any(map(math.isnan, values.values())) else values

        found = wait_for(shown, SECONDS)
        assert found.keys() == TIMES[title].keys()
        for model, seconds in TIMES[title].items():
            above = next(bound for bound in _PART_SECONDS if seconds * factor <= bound)
            below = max((bound for bound in _PART_SECONDS if bound < above), default=0.0)
            assert below < found[model] <= above, f"{model}: {found[model]} is not the time {seconds * factor}"


def test_scalers_get_numbers(prometheus: Prometheus, render: Any) -> None:
    queries = scaler_queries(render)
    assert prometheus.without_data(queries) == []
    for query in queries:
        assert len(prometheus.query(query)) == 1, f"the query must return one number: {query}"


def test_recording_rules_have_data(prometheus: Prometheus, render: Any) -> None:
    # The error rules have no data as long as nothing failed.
    records = [rule["record"] for rule in rules_of(render) if "record" in rule]
    assert prometheus.without_data([name for name in records if "request_errors" not in name]) == []


def test_metrics_that_are_named_are_exported(prometheus: Prometheus, render: Any) -> None:
    exported = set(prometheus.http.get("/api/v1/label/__name__/values").json()["data"])
    rules = rules_of(render)
    recorded = {rule["record"] for rule in rules if "record" in rule}
    expressions = [rule["expr"] for rule in rules] + scaler_queries(render) + panel_queries()
    for expression in expressions:
        bare = re.sub(r'"[^"]*"', "", expression)
        assert set(METRIC.findall(bare)) <= exported, expression
        assert set(RECORDED.findall(bare)) <= recorded, expression
    hpa = render("gpu").named("HorizontalPodAutoscaler", "labelmint-triton")["spec"]["metrics"]
    values = yaml.safe_load((K8S / "components/autoscale-hpa/prometheus-adapter-values.yaml").read_text())
    assert [each["external"]["metric"]["name"] for each in hpa] == [
        rule["name"]["as"] for rule in values["rules"]["external"]
    ]
    series = {rule["seriesQuery"].split("{")[0] for rule in values["rules"]["external"]}
    assert series <= exported


def test_both_scalers_follow_the_same_numbers(render: Any) -> None:
    """KEDA's triggers are complete, and their thresholds are those of the HorizontalPodAutoscaler."""
    keda = render("gpu-scale-to-zero").named("ScaledObject", "labelmint-triton")["spec"]
    hpa = render("gpu").named("HorizontalPodAutoscaler", "labelmint-triton")["spec"]
    for trigger in keda["triggers"]:
        assert trigger["type"] == "prometheus" and trigger["metricType"] == "AverageValue"
        assert {"serverAddress", "query", "threshold", "activationThreshold", "ignoreNullValues"} == set(
            trigger["metadata"]
        )
        assert trigger["metadata"]["serverAddress"].startswith("http://")
    thresholds = [trigger["metadata"]["threshold"] for trigger in keda["triggers"]]
    assert thresholds == [each["external"]["target"]["averageValue"] for each in hpa["metrics"]]
    # Only the gateways' metrics can start the first Triton, because Triton's own metrics do not exist without it.
    for trigger in keda["triggers"]:
        own = "labelmint_" in trigger["metadata"]["query"]
        assert trigger["metadata"]["ignoreNullValues"] == ("false" if own else "true")
    assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
    assert (keda["maxReplicaCount"], hpa["minReplicas"]) == (hpa["maxReplicas"], 1)


def test_panels_are_laid_out_and_named() -> None:
    taken: set[tuple[int, int]] = set()
    titles = [panel["title"] for panel in panels()]
    assert len(set(titles)) == len(titles)
    for panel in panels():
        place = panel["gridPos"]
        cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
        assert all(target["legendFormat"] for target in panel["targets"])
