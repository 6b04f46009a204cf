"""docs/training.md: its ten lines, run as they stand but for the address and the number of steps."""

import re
import subprocess
import sys
from pathlib import Path

from labelmint_client import Client
from tests.conftest import ROOT, Service


def test_ten_lines_train(service: Service, tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
    assert len([line for line in script.splitlines() if line]) == 10
    with Client(service.grpc) as client:
        assert f"Conv2d(3, {len(client.get_model('faces').class_names)}," in script
    for before, after in (("localhost:50051", service.grpc), ("range(1000)", "range(4)")):
        assert before in script
        script = script.replace(before, after)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(losses) == 4 and all(0 < loss < 20 for loss in losses)
