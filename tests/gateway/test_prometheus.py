"""The metrics: judged by Prometheus' own linter, and comparable with the calibration."""

import asyncio
import math
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from labelmint.calibrate import calibrate_repository
from labelmint.core.calibration import calibrate
from labelmint.gateway.sampling.metrics import Metrics, _quantile_of
from tests.conftest import need_program, start_service

pytestmark = [pytest.mark.triton, pytest.mark.torch]


def samples_of(http: httpx.Client, **labels: str) -> dict[str, float]:
    """The values of all series that have these labels, by name and, of a histogram, bucket."""
    return {
        f"{sample.name} {sample.labels.get('le', '')}".strip(): sample.value
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
        if labels.items() <= sample.labels.items()
    }


def test_metrics_pass_promtool(http: httpx.Client) -> None:
    need_program("promtool", "prometheus")
    assert http.get("/v1/models/faces/samples/1?max_js=1e9").status_code == 200
    text = http.get("/metrics").text
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_metric_has_help_and_ours_a_prefix(http: httpx.Client) -> None:
    families = list(text_string_to_metric_families(http.get("/metrics").text))
    assert {"labelmint_samples", "labelmint_requests", "process_cpu_seconds"} <= {family.name for family in families}
    for family in families:
        assert family.documentation, family.name
        assert family.name.startswith(("labelmint_", "process_", "python_", "http_server_", "rpc_server_")), family.name


def test_a_model_is_described_with_its_calibration(http: httpx.Client) -> None:
    model = http.get("/v1/models/faces").json()
    found = samples_of(http, model="faces", version="1")
    assert found["labelmint_calibration_threshold_nats"] == model["calibration"]["threshold"]
    assert found["labelmint_calibration_acceptance_ratio"] == 0.9
    described = {"model": "faces", "digest": model["digest"], "calibration_id": model["calibration"]["id"]}
    assert samples_of(http, **described)["labelmint_model_info"] == 1


def test_scores_are_placed_in_the_calibration() -> None:
    calibration = calibrate(
        [float(score) for score in range(1001)], model_digest="", score_kind="sum", truncation_psi=1.0, first_seed=0
    )
    quantile = calibration.threshold_quantile
    assert _quantile_of(calibration, calibration.threshold) == quantile
    assert _quantile_of(calibration, math.nextafter(calibration.threshold, math.inf)) == quantile + 0.01
    assert [_quantile_of(calibration, score) for score in (-1.0, 0.0, 5.0, 500.0, 1000.0, 2000.0)] == [
        0.0,
        0.0,
        0.01,
        0.5,
        1.0,
        1.0,
    ]


def test_the_largest_score_of_every_kind_has_a_bucket() -> None:
    """Above the last bucket, quantiles of a histogram say nothing."""
    metrics = Metrics(CollectorRegistry())
    largest = 1024**2 * math.log(255)  # nats: the sum of entropies of 255 classes that are equally probable
    metrics.js_score.labels("large", "1").observe(largest)
    buckets = {
        float(sample.labels["le"]): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "labelmint_js_score_nats_bucket"
    }
    assert min(bound for bound, count in buckets.items() if count) < math.inf


def test_served_acceptance_is_the_calibrated_one(tmp_path: Path, tiny_repository: Path) -> None:
    """The samples of the calibration's own seeds: the share in the bucket of the gate is what it accepted then."""
    repository = Path(shutil.copytree(tiny_repository, tmp_path / "repository"))
    (calibration,) = asyncio.run(calibrate_repository(repository, "tiny", 0, count=1000, truncation_psi=1.0))
    service = start_service(tmp_path / "serve.log", repository=repository)
    try:
        with httpx.Client(base_url=service.http, timeout=60.0) as http:
            for first in range(0, 1000, 50):
                body = {"seeds": list(range(first, first + 50))}
                assert http.post("/v1/models/tiny/samples:batchGet", json=body).status_code == 200
            # These say nothing of the calibration: another truncation, and mixing.
            for options in ("truncation_psi=0.5&max_js=1e9", "style_seed=1&crossover=2&max_js=1e9"):
                assert http.get(f"/v1/models/tiny/samples/1?{options}").status_code == 200
            found = samples_of(http, model="tiny", version="1")
            name = "labelmint_js_score_calibration_quantile_ratio"
            assert found[f"{name}_count"] == 1000
            accepted = found[f"{name}_bucket {calibration.threshold_quantile}"]
            assert accepted / 1000 == pytest.approx(found["labelmint_calibration_acceptance_ratio"], abs=0.002)
            assert accepted == samples_of(http, model="tiny", outcome="accepted")["labelmint_samples_total"] - 2
            for tenth in range(1, 10):
                assert found[f"{name}_bucket {tenth / 10}"] == pytest.approx(100 * tenth, abs=3)
    finally:
        service.stop()


def test_a_flood_of_names_does_not_grow_the_metrics(http: httpx.Client) -> None:
    for _ in range(2):
        before = len(http.get("/metrics").text.splitlines())
        for index in range(20):
            http.get(f"/v1/models/nonesuch{index}/samples/{index}?model_version={index}")
    assert len(http.get("/metrics").text.splitlines()) == before
