"""What the tests of the importers share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from labelmint.checkpoints.importing import FormatName, ImportOptions, import_file
from labelmint.models.generator import Generator
from labelmint.models.store import load_generator, read_notes


def draw(
    generator: Generator, z: torch.Tensor, psi: float, layout: str, class_index: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Image and features of latents [B,z_dim], of a conditional generator with class_index [B,1]."""
    crossover = torch.full((len(z), 1), generator.spec.num_ws, dtype=torch.int32)
    with torch.no_grad():
        image, features = generator(z, z, crossover, torch.full((len(z), 1), psi), layout, class_index)
    return image, features


def distance(got: torch.Tensor, want: np.ndarray | torch.Tensor) -> float:
    want = torch.as_tensor(want)
    assert got.shape == want.shape
    return float((got - want).abs().max())


@pytest.fixture
def imported(tmp_path: Path) -> Callable[..., Generator]:
    """Import a generator's file and load the result."""

    def run(path: Path, format_name: FormatName | None = None, **options: object) -> Generator:
        out = tmp_path / "imported.safetensors"
        import_file(path, out, format_name, options=ImportOptions(**options))
        return load_generator(out)

    return run


@pytest.fixture
def notes(tmp_path: Path) -> Callable[[], dict]:
    """The notes of what `imported` wrote."""
    return lambda: read_notes(tmp_path / "imported.safetensors")
