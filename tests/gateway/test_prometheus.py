"""The metrics, judged by Prometheus' own linter."""

import subprocess

import httpx

from tests.conftest import need_program


def test_metrics_pass_promtool(http: httpx.Client) -> None:
    need_program("promtool", "prometheus")
    assert http.get("/v1/models/faces/samples/1?max_js=1e9").status_code == 200
    text = http.get("/metrics").text
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
