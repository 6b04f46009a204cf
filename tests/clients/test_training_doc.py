"""The programs of docs/training.md and the client's README, run as they stand but for the address and the steps."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from labelmint_client import Client
from tests.conftest import ROOT, Service, need_program

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
    script, *_ = blocks("docs/training.md")
    assert len([line for line in script.splitlines() if line]) == 10
    with Client(service.grpc) as client:
        assert f"Conv2d(3, {len(client.get_model('faces').class_names)}," in script
    losses = [float(line.split()[1]) for line in run(script, service, tmp_path, "range(1000)")]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)


def test_the_readme_streams(service: Service, tmp_path: Path) -> None:
    (script,) = blocks("clients/python/README.md")
    lines = run(script, service, tmp_path)
    assert len(lines) == 4 and all("(128, 128, 3)" in line for line in lines)


RECIPES = ("torchvision", "albumentations")


@pytest.mark.parametrize("library", RECIPES)
def test_image_and_label_are_augmented_together(library: str, service: Service) -> None:
    """The recipe trains, and `augmented_together.py` sees what it does to a pair that tells where each pixel went."""
    python = need_program(str(ROOT / ".venv-readers" / "bin" / "python"), "the readers, by `make readers`")
    (recipe,) = (block for block in blocks("docs/training.md") if re.search(f"^(import|from) {library}", block, re.M))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "tests" / "support" / "readers"),
        "NO_ALBUMENTATIONS_UPDATE": "1",
    }
    done = subprocess.run(
        [python, str(Path(__file__).with_name("augmented_together.py"))],
        input=recipe.replace("localhost:50051", service.grpc).replace("range(1000)", "range(2)"),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    *steps, told = done.stdout.splitlines()
    assert [line.split(" ", 1)[1].split(" [")[0] for line in steps] == ["torch.Size([8, 3, 128, 128]) torch.int64"] * 2
    seen = json.loads(told)
    assert seen["differ"], "two workers must not draw the same"
    assert seen["classes"] == [0, 3, 7, 11, 255]
    assert seen["moved"] > 0.9, "nearly every label is another than that of the sample"
    # Away from the edges of a region, every pixel has the gray of its class. If the label stayed where it was, or were
    # interpolated, it would not.
    assert seen["spread"] < 8 < seen["distance"]
