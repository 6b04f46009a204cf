"""docs/your-generator.md: every command in its order, from a checkpoint as NVlabs write it, and what it prints."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from labelmint.models.annotations import LabelClasses, write_masks
from tests.conftest import ROOT, need_program, start_service
from tests.support.checkpoints import reference
from tests.support.checkpoints.writers import reference_of_the_vectors, write_nvlabs

pytestmark = [pytest.mark.triton, pytest.mark.torch, pytest.mark.minutes]


WHOLE = (ROOT / "docs" / "your-generator.md").read_text()
PAGE, CONDITIONAL = WHOLE.split("\n## Conditional generators\n")
COMMANDS = r"```sh\n(labelmint .*?)```\n\n```text\n(.*?)```"
STEPS = re.findall(COMMANDS, PAGE, re.DOTALL)
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
        follow(command, output, tmp_path / "annotations")
    served = start_service(tmp_path / "serve.log", repository=tmp_path / "repository")
    try:
        said, page = shape_of(served.log.read_text()), shape_of(STEPS[-1][1])
        assert said[1 : len(page)] == page[1:]  # the first line names the directory
    finally:
        assert served.stop() == 0


def test_a_conditional_generator_from_its_import_to_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_program("curl", "curl")
    monkeypatch.chdir(tmp_path)
    write_nvlabs(tmp_path / "conditional-snapshot.pkl", conditional_reference())
    (tmp_path / "names.json").write_text(re.findall(r"`(\[.*?\])`", CONDITIONAL)[0])
    steps = re.findall(COMMANDS, CONDITIONAL, re.DOTALL)
    assert [command.split()[1] for command, _ in steps] == ["import", "synth", "fit", "export", "calibrate"]
    for command, output in steps:
        follow(command, output, tmp_path / "animal-annotations")
    (request,) = re.findall(r"```sh\n(curl .*?)```", CONDITIONAL, re.DOTALL)
    served = start_service(tmp_path / "serve.log", repository=tmp_path / "zoo")
    try:
        address = request.replace("http://localhost:8080", served.http)
        subprocess.run(["bash", "-ec", address.replace("-so", "-fso")], check=True, timeout=60)
        assert Image.open(tmp_path / "fox.png").size[0] >= 16
    finally:
        assert served.stop() == 0


def conditional_reference() -> reference.Generator:
    """Random weights at 16x16."""
    torch.manual_seed(0)
    return reference.Generator(c_dim=3)


def follow(command: str, output: str, annotations: Path) -> None:
    """Run a command of the page and compare what it prints; after `synth`, annotate the images."""
    arguments = command.replace("\\\n", " ").split()[1:]
    arguments += ["--steps", "300"] if arguments[0] == "fit" else []  # as the page says of a try-out
    done = subprocess.run([sys.executable, "-m", "labelmint.cli", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert shape_of(done.stdout) == shape_of(output)
    if arguments[0] == "synth":
        annotate(annotations)


def annotate(directory: Path) -> None:
    """A label that is written in the image: is it bright?"""
    masks = {}
    for path in (directory / "images").iterdir():
        gray = np.asarray(Image.open(path).convert("L"))
        masks[int(path.stem)] = (gray > 127).astype(np.uint8)
    write_masks(directory, CLASSES, masks)
