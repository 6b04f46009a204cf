"""The metrics, judged by Prometheus' own linter."""

import os
import shutil
import subprocess

import httpx
import pytest


def test_metrics_pass_promtool(http: httpx.Client) -> None:
    if shutil.which("promtool") is None:
        message = "promtool (Debian package prometheus) is not installed"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    assert http.get("/v1/models/faces/samples/1?max_js=1e9").status_code == 200
    text = http.get("/metrics").text
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
