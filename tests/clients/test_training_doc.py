"""The ten lines of docs/training.md and the client's README, run as they stand but for the address and the steps."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from labelmint_client import Client
from tests.conftest import ROOT, Service

pytestmark = pytest.mark.triton


def run(script: str, service: Service, tmp_path: Path, steps: str = "") -> list[str]:
    """The lines that a script prints."""
    for before, after in (("localhost:50051", service.grpc), (steps, "range(2)")):
        assert before in script
        script = script.replace(before, after) if before else script
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def test_ten_lines_train(service: Service, tmp_path: Path) -> None:
    (script,) = blocks("docs/training.md")
    assert len([line for line in script.splitlines() if line]) == 10
    with Client(service.grpc) as client:
        assert f"Conv2d(3, {len(client.get_model('faces').class_names)}," in script
    losses = [float(line.split()[1]) for line in run(script, service, tmp_path, "range(1000)")]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)


def test_the_readme_streams(service: Service, tmp_path: Path) -> None:
    (script,) = blocks("clients/python/README.md")
    lines = run(script, service, tmp_path)
    assert len(lines) == 4 and all("(128, 128, 3)" in line for line in lines)
