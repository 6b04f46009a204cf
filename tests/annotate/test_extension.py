"""Extended masks: drawn pixels keep their class, others get what all drawn pixels say, and `fit` learns both."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from labelmint.core.errors import UnusableFile
from labelmint.models.annotations import UNDRAWN, AnnotatedDataset, Unlabelled, read_masks, write_masks
from labelmint.models.extension import extended
from labelmint.models.fit import fit_files
from labelmint.models.quick import fit_quick, preview
from labelmint.models.resuming import Checkpoint
from tests.annotate.conftest import CLASSES, Truth, rows_only

pytestmark = pytest.mark.torch


def extend(truth: Truth, dataset: AnnotatedDataset) -> AnnotatedDataset:
    return extended(truth.generator, dataset, layout="paper")


def test_a_drawn_pixel_keeps_its_class(truth: Truth) -> None:
    """Also where all other pixels say something else."""
    dataset = truth.dataset(range(6), rows_only)
    turned = {**dataset.labels, 4: np.where(dataset.labels[4] == UNDRAWN, UNDRAWN, 1 - dataset.labels[4])}
    found = extend(truth, replace(dataset, labels=turned)).labels
    for seed, mask in turned.items():
        drawn = mask != UNDRAWN
        assert (found[seed][drawn] == mask[drawn]).all() and found[seed].max() < 3
        assert found[seed].dtype == mask.dtype


def test_the_other_pixels_get_what_all_drawn_pixels_say(truth: Truth) -> None:
    dataset = truth.dataset(range(8), rows_only)
    interpreter = fit_quick(truth.generator, dataset, "paper")
    found, right = extend(truth, dataset).labels, []
    for seed, mask in dataset.labels.items():
        label = preview(interpreter, truth.features(seed))[0].numpy()
        assert (found[seed][mask == UNDRAWN] == label[mask == UNDRAWN]).all()
        right.append((found[seed] == truth.mask(seed))[mask == UNDRAWN].mean())
    assert np.mean(right) > 0.8


def test_what_is_drawn_whole_stays_as_it_is(truth: Truth) -> None:
    dataset = truth.dataset(range(3))
    assert extend(truth, dataset) is dataset


def test_fit_learns_the_extended_masks(directory: Path, truth: Truth) -> None:
    """The weights are those that `fit` gives for a directory with the extended masks."""

    def fitted(name: str, unlabelled: Unlabelled) -> dict[str, np.ndarray]:
        out = directory / name
        fit_files(
            directory / "generator.safetensors",
            directory / "parts",
            out,
            layout="paper",
            heads=2,
            unlabelled=unlabelled,
            steps=20,
        )
        return {key: value.numpy() for key, value in load_file(out).items()}

    write_masks(directory / "parts", CLASSES, {seed: rows_only(truth.mask(seed)) for seed in range(6)})
    sparse, whole = fitted("sparse", "ignore"), fitted("extended", "extend")
    write_masks(directory / "parts", CLASSES, extend(truth, read_masks(directory / "parts")).labels)
    wanted = fitted("wanted", "ignore")
    assert all((whole[key] == wanted[key]).all() for key in wanted)
    assert any((whole[key] != sparse[key]).any() for key in sparse)


def test_a_checkpoint_of_the_strokes_alone_is_not_resumed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labelmint.models.resuming.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(Checkpoint, "remove", lambda checkpoint: None)

    def fitted(unlabelled: Unlabelled) -> None:
        fit_files(
            directory / "generator.safetensors",
            directory / "parts",
            directory / "out",
            layout="paper",
            heads=2,
            unlabelled=unlabelled,
            steps=3,
        )

    fitted("ignore")
    with pytest.raises(UnusableFile, match="is from a run with other options"):
        fitted("extend")
