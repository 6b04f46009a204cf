"""The annotations that the real tools wrote, copied so that a test may spoil them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from labelmint.models.annotations import image_path
from tests.conftest import ROOT


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "tests" / "data" / "annotations", tmp_path / "annotated"))


def label_path(directory: Path, seed: int) -> Path:
    """The file of labelme for an image."""
    return image_path(directory, seed).with_suffix(".json")


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change the content of a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
