"""Tests of the recording rules and alerts with `promtool`: each alert has a case in which it fires and one without.

Rules of this file:
- A case has series as Prometheus would scrape them, in promtool's notation, one sample per minute: `5+2x60` is 5, 7, 9.
- At the time of a case, exactly the alerts that it names fire. So every case also tests that the other alerts do not.
- One gateway is scraped and has a Triton, unless the case says otherwise.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.k8s.conftest import K8S, alerts, promtool

pytestmark = pytest.mark.triton


RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
GATEWAY = 'namespace="labelmint", pod="gateway-1", job="labelmint/labelmint-gateway"'
TRITON = 'namespace="labelmint", pod="triton-1", job="labelmint/labelmint-triton"'
MODEL = f'{GATEWAY}, model="faces", version="1"'
QUANTILE = "labelmint_js_score_calibration_quantile_ratio"
SINGLE = "/v1/models/{model}/samples/{seed}"


def requests(method: str, code: str, values: str) -> dict[str, str]:
    return {f'labelmint_requests_total{{{GATEWAY}, method="{method}", code="{code}"}}': values}


def latencies(within: str, all_of_them: str) -> dict[str, str]:
    name = "labelmint_request_duration_seconds"
    return {
        f'{name}_bucket{{{GATEWAY}, method="{SINGLE}", le="3.2"}}': within,
        f'{name}_count{{{GATEWAY}, method="{SINGLE}"}}': all_of_them,
    }


def quantiles(half: str, gate: str, count: str) -> dict[str, str]:
    return {
        f'{QUANTILE}_bucket{{{MODEL}, le="0.5"}}': half,
        f'{QUANTILE}_bucket{{{MODEL}, le="0.9"}}': gate,
        f"{QUANTILE}_count{{{MODEL}}}": count,
    }


def queue(microseconds: str, served: str) -> dict[str, str]:
    labels = f'{{{TRITON}, model="faces_generator", version="1"}}'
    return {f"nv_inference_queue_duration_us{labels}": microseconds, f"nv_inference_request_success{labels}": served}


def demand(values: str) -> dict[str, str]:
    return {f"labelmint_demand_samples{{{GATEWAY}}}": values}


def ready(values: str) -> dict[str, str]:
    return {f"labelmint_triton_ready{{{GATEWAY}}}": values}


def up(pod: str, values: str) -> dict[str, str]:
    return {f"up{{{pod}}}": values}


RUNS = {f'nv_inference_pending_request_count{{{TRITON}, model="faces"}}': "0x600"}


@dataclass(frozen=True)
class Case:
    """The alerts that fire after `minutes` of `series`."""

    name: str
    minutes: int
    series: dict[str, str]
    alerts: tuple[str, ...] = ()


CASES = (
    Case(
        "every fiftieth request fails",
        70,
        requests("GetSample", "OK", "0+98x80") | requests("GetSample", "UNAVAILABLE", "0+2x80"),
        ("LabelmintErrorBudgetFast", "LabelmintErrorBudgetSlow"),
    ),
    Case(
        "one in a thousand requests fails, probes fail, streams are renewed, callers are wrong",
        70,
        requests("GetSample", "OK", "0+998x80")
        | requests("GetSample", "UNAVAILABLE", "0+1x80")
        | requests("/readyz", "503", "0+50x80")
        | requests("StreamSamples", "UNAVAILABLE", "0+50x80")
        | requests(SINGLE, "422", "0+500x80"),
    ),
    Case(
        "it failed for an hour and is over",
        100,
        requests(SINGLE, "200", "0+100x120") | requests(SINGLE, "503", "0+10x60 600x60"),
    ),
    Case(
        "one in a hundred fails for hours",
        380,
        requests("GetSample", "OK", "0+99x400") | requests("GetSample", "INTERNAL", "0+1x400"),
        ("LabelmintErrorBudgetSlow",),
    ),
    Case(
        "one in two hundred and fifty fails for hours",
        380,
        requests("GetSample", "OK", "0+249x400") | requests("GetSample", "INTERNAL", "0+1x400"),
    ),
    Case(
        "three of the twenty requests of an hour fail",
        70,
        requests("GetSample", "OK", "0x30 17x60") | requests("GetSample", "INTERNAL", "0x30 1x20 2x12 3x30"),
    ),
    Case("every fifth sample is slow", 70, latencies("0+80x80", "0+100x80"), ("LabelmintLatencyBudget",)),
    Case("one in twenty is slow", 70, latencies("0+95x80", "0+100x80")),
    Case("two of three samples are slow", 70, latencies("0x30 1x60", "0x30 3x60")),
    Case(
        "every fifth sample is slow after a wait for a node", 70, latencies("0+80x80", "0+100x80") | ready("0x61 1x20")
    ),
    Case("the gate lets too few pass", 90, quantiles("0+50x100", "0+80x100", "0+100x100"), ("LabelmintAcceptanceOff",)),
    Case("the gate accepts the calibrated share", 90, quantiles("0+50x100", "0+89x100", "0+100x100")),
    Case("too few samples to judge", 90, quantiles("0+1x100", "0+1x100", "0+5x100")),
    Case("the lower half is empty", 90, quantiles("0+30x100", "0+90x100", "0+100x100"), ("LabelmintScoreDrift",)),
    Case("the lower half is nearly a half", 90, quantiles("0+45x100", "0+90x100", "0+100x100")),
    Case("ten seconds in Triton's queue", 20, queue("0+600000000x30", "0+60x30"), ("LabelmintQueueWait",)),
    Case("a second in Triton's queue", 20, queue("0+60000000x30", "0+60x30")),
    Case("a gateway finds no model in a Triton that runs", 10, RUNS | ready("0x20"), ("LabelmintTritonNotReady",)),
    Case("a gateway finds its model", 10, RUNS | ready("1x20")),
    Case("no requests and no Triton", 30, ready("0x40") | demand("0x40")),
    Case("owed, and no Triton", 15, ready("0x40") | demand("8x40"), ("LabelmintDemandWithoutCapacity",)),
    Case("owed, and a Triton comes", 15, ready("0x6 1x20") | demand("8x40")),
    Case(
        "owed, and a Triton dies as soon as it is ready",
        13,
        ready("0x5 1 0x4 1 0x20") | demand("8x40"),
        ("LabelmintDemandWithoutCapacity",),
    ),
    Case("no gateway is scraped", 10, ready("1x2 stale _x20"), ("LabelmintNoGateway",)),
    Case("the only gateway is replaced", 10, ready("1x3 stale _x3 1x20")),
    Case("a gateway refuses Prometheus", 15, up(GATEWAY, "1x2 0x40"), ("LabelmintGatewayUnreachable",)),
    Case("a gateway starts slowly", 15, up(GATEWAY, "0x8 1x40")),
    Case("a Triton refuses Prometheus", 30, up(TRITON, "1x2 0x40"), ("LabelmintTritonUnreachable",)),
    Case("a Triton loads its models for a quarter of an hour", 30, up(TRITON, "0x15 1x40")),
    Case(
        "a gateway starts five times",
        25,
        {f"process_start_time_seconds{{{GATEWAY}}}": "100x5 200x5 300x5 400x5 500x20"},
        ("LabelmintGatewayRestartLoop",),
    ),
    Case("a gateway starts twice", 25, {f"process_start_time_seconds{{{GATEWAY}}}": "100x5 200x40"}),
    Case(
        "a Triton comes and goes while samples are owed",
        25,
        ready("1x2 0x2 1x2 0x2 1x2 0x2 1x2 0x2 1x20") | demand("8x40"),
        ("LabelmintTritonRestartLoop",),
    ),
    Case("a Triton comes and goes with the jobs", 25, ready("1x2 0x2 1x2 0x2 1x2 0x2 1x2 0x2 1x20") | demand("0x40")),
    Case("a Triton was replaced", 25, ready("1x5 0x2 1x40") | demand("8x50")),
    Case(
        "one Triton of several comes and goes",
        25,
        up(TRITON, "1x2 0x2 1x2 0x2 1x2 0x2 1x20") | demand("8x40"),
        ("LabelmintTritonRestartLoop",),
    ),
    Case("a Triton's metrics were missed twice", 25, up(TRITON, "1x2 0 1x4 0 1x20") | demand("8x40")),
    Case(
        "the Triton that the gateway started dies repeatedly",
        25,
        {f"labelmint_triton_restarts_total{{{GATEWAY}}}": "0x2 1x4 2x4 3x4 4x20"},
        ("LabelmintTritonRestartLoop",),
    ),
)


def test_rules_are_well_formed(rules: Path) -> None:
    promtool("check", "rules", str(rules))


def test_every_alert_has_a_case_and_a_paragraph(rules: Path) -> None:
    named = {rule["alert"] for rule in alerts(rules)}
    assert named == {alert for case in CASES for alert in case.alerts}
    assert named == set(re.findall(r"^### (\w+)$", RUNBOOK, re.MULTILINE))
    for rule in alerts(rules):
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("page", "ticket")


def test_alerts_fire_when_they_should_and_not_else(rules: Path, tmp_path: Path) -> None:
    names = sorted(rule["alert"] for rule in alerts(rules))
    tests = []
    for case in CASES:
        # The number of firing series of each alert; promtool compares them all.
        firing = [
            {
                "expr": f'count by (alertname) (ALERTS{{alertstate="firing", alertname="{name}"}})',
                "eval_time": f"{case.minutes}m",
                "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1}] if name in case.alerts else [],
            }
            for name in names
        ]
        series = [{"series": key, "values": values} for key, values in (ready("1x600") | case.series).items()]
        tests.append({"name": case.name, "interval": "1m", "input_series": series, "promql_expr_test": firing})
    path = tmp_path / "cases.yaml"
    path.write_text(yaml.safe_dump({"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": tests}))
    promtool("test", "rules", str(path))


def test_filtered_samples_count_as_accepted_by_the_gate(rules: Path, tmp_path: Path) -> None:
    """The acceptance that is recorded, and the one that the dashboard draws."""
    dashboard = json.loads((K8S / "components" / "monitoring" / "dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    (drawn,) = [each for each in expressions if each.count("labelmint_samples_total") == 2]
    drawn = drawn.replace("$namespace", "labelmint").replace("$__rate_interval", "1h")
    rates = {"accepted": "0+120x120", "rejected": "0+60x120", "filtered": "0+60x120"}
    labels = 'namespace="labelmint", model="faces", version="1"'
    expected = {
        "labelmint:acceptance:ratio_rate1h": f"labelmint:acceptance:ratio_rate1h{{{labels}}}",
        drawn: '{model="faces", version="1"}',
    }
    test = {
        "interval": "1m",
        "input_series": [
            {"series": f'labelmint_samples_total{{{MODEL}, outcome="{outcome}"}}', "values": values}
            for outcome, values in rates.items()
        ],
        "promql_expr_test": [
            {"expr": expression, "eval_time": "2h", "exp_samples": [{"labels": found, "value": 0.75}]}
            for expression, found in expected.items()
        ],
    }
    path = tmp_path / "acceptance.yaml"
    path.write_text(yaml.safe_dump({"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": [test]}))
    promtool("test", "rules", str(path))
