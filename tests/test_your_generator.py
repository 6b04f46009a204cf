"""docs/your-generator.md: every command in its order, from a checkpoint as NVlabs write it, and what it prints."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from labelmint.models.annotations import LabelClasses, write_masks
from tests.conftest import ROOT, start_service
from tests.support.checkpoints.writers import reference_of_the_vectors, write_nvlabs

pytestmark = [pytest.mark.triton, pytest.mark.torch, pytest.mark.minutes]


PAGE = (ROOT / "docs" / "your-generator.md").read_text()
STEPS = re.findall(r"```sh\n(labelmint .*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL)
CLASSES = LabelClasses(("dark", "bright"), ((0, 0, 0), (255, 255, 255)))


def shape_of(output: str) -> list[str]:
    """The lines without their numbers, digests and names of tensors."""
    masked = re.sub(r"\b[0-9a-f]{12,64}\b|…|\d[\d.]*(e[+-]?\d+)?", "#", output.strip())
    return [re.sub(r"\([\w#]+\)$", "(#)", line) for line in masked.splitlines()]


def test_the_page_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [command.split()[1] for command, _ in STEPS] == ["import", "synth", "fit", "export", "calibrate", "serve"]
    monkeypatch.chdir(tmp_path)
    write_nvlabs(tmp_path / "network-snapshot.pkl", reference_of_the_vectors())
    for command, output in STEPS[:-1]:
        arguments = command.replace("\\\n", " ").split()[1:]
        arguments += ["--steps", "300"] if arguments[0] == "fit" else []  # as the page says of a try-out
        done = subprocess.run([sys.executable, "-m", "labelmint.cli", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert shape_of(done.stdout) == shape_of(output)
        if arguments[0] == "synth":
            annotate(tmp_path / "annotations")
    served = start_service(tmp_path / "serve.log", repository=tmp_path / "repository")
    try:
        said, page = shape_of(served.log.read_text()), shape_of(STEPS[-1][1])
        assert said[1 : len(page)] == page[1:]  # the first line names the directory
    finally:
        assert served.stop() == 0


def annotate(directory: Path) -> None:
    """A label that is written in the image: is it bright?"""
    masks = {}
    for path in (directory / "images").iterdir():
        gray = np.asarray(Image.open(path).convert("L"))
        masks[int(path.stem)] = (gray > 127).astype(np.uint8)
    write_masks(directory, CLASSES, masks)
