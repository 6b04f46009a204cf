"""Suggestions: repeatable, new, far from what is known, and with a reason."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from labelmint.annotate.suggest import Suggestion, suggest, suggest_files
from labelmint.core.errors import UnusableFile
from labelmint.core.task import TaskName
from labelmint.models.annotations import mask_path
from labelmint.models.draw import draw
from tests.annotate.conftest import Truth

pytestmark = pytest.mark.torch


def proposed(directory: Path, candidates: range, count: int = 3, task: TaskName = "segmentation") -> list[Suggestion]:
    return suggest_files(
        directory / "generator.safetensors",
        directory / "parts",
        candidates,
        count=count,
        layout="paper",
        task=task,
        annotation_format="png" if task == "segmentation" else "csv",
        unlabelled="background",
    )


@pytest.mark.parametrize("task", ["segmentation", "keypoints"])
def test_the_seeds_are_new_and_always_the_same(directory: Path, task: TaskName) -> None:
    first, second = (proposed(directory, range(20), count=5, task=task) for _ in range(2))
    seeds = [suggestion.seed for suggestion in first]
    assert first == second and len(set(seeds)) == 5 and not set(seeds) & set(range(6))
    assert all(suggestion.uncertainty is not None for suggestion in first)


def test_without_annotations_the_distance_decides_alone(directory: Path) -> None:
    (directory / "parts" / "classes.json").unlink()
    found = proposed(directory, range(20))
    assert all(suggestion.uncertainty is None for suggestion in found)
    assert "uncertain" not in str(found[0]) and found[0].distance > 1.0
    assert found[0].distance >= found[1].distance >= found[2].distance


def test_the_copy_of_a_known_image_comes_last(truth: Truth) -> None:
    """Its distance is 0, and so is that of a candidate that was already proposed."""

    def features(psi: float) -> Callable[[int], dict[int, torch.Tensor]]:
        return lambda seed: draw(truth.generator, seed, psi, layout="paper")[1]

    found = suggest(features(1.0), [3], [3, 7, 8], resolution=32, count=3, judge=None)
    assert found[-1].seed == 3 and found[-1].distance == pytest.approx(0.0, abs=1e-2)
    alike = suggest(features(0.0), [3], [3, 4, 5], resolution=32, count=3, judge=None)
    assert sorted(suggestion.seed for suggestion in alike) == [3, 4, 5], "all alike, and none twice"


def test_too_few_candidates_and_missing_masks_are_named(directory: Path) -> None:
    with pytest.raises(UnusableFile, match="parts leaves 2 candidates for 3 suggestions; name more candidates"):
        proposed(directory, range(8))
    mask_path(directory / "parts", 3).unlink()
    with pytest.raises(UnusableFile, match=r"0000000003.png does not exist"):
        proposed(directory, range(20))


def test_the_command_prints_seeds_with_reasons(directory: Path) -> None:
    command = [sys.executable, "-m", "labelmint.cli", "suggest", "--generator", "generator.safetensors", "parts"]
    command += ["--count", "2", "--candidates", "10"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 2, done.stderr
    assert all(line.startswith("40000000") and "times as uncertain and" in line for line in lines)
