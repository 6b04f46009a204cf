"""What the page computes: bounded features, predictions of what is drawn now, estimates of what `fit` will learn."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import labelmint.annotate.studio as module
from labelmint.annotate.estimate import Estimate, estimate
from labelmint.annotate.strokes import Taken, runs_of
from labelmint.annotate.studio import Studio
from labelmint.annotate.workspace import Bound, Workspace, opened
from labelmint.core.errors import InsufficientResources
from labelmint.models.annotations import UNDRAWN, AnnotatedDataset, LabelClasses
from labelmint.models.draw import Features
from labelmint.models.extension import extended
from labelmint.models.interpreter import InterpreterSpec
from tests.annotate.conftest import CLASSES, Truth, rows_only

pytestmark = pytest.mark.torch


@pytest.fixture
def studio(truth: Truth, tmp_path: Path) -> Iterator[Studio]:
    """A studio before a directory in which every fourth row of four images is drawn."""
    made = Studio(truth.generator, layout="paper", truncation_psi=1.0)
    with opened(tmp_path / "drawings", Bound("0" * 64, 1.0, "segmentation", 32), made.image) as workspace:
        made.attach(workspace)
        workspace.save_classes(CLASSES)
        for seed in range(4):
            workspace.add(seed)
            draw(workspace, seed, rows_only(truth.mask(seed)))
        yield made
        made.close()


def draw(workspace: Workspace, seed: int, mask: np.ndarray) -> None:
    strokes = [
        Taken(tool="mask", class_id=int(number), source="test", region=runs_of(mask == number))
        for number in np.unique(mask[mask != UNDRAWN])
    ]
    workspace.save_strokes(seed, strokes, workspace.sheet(seed).revision)


async def labels(studio: Studio, seeds: range) -> list[np.ndarray]:
    found = await studio.look(0, seeds)
    return [found.label(seed) for seed in seeds]


async def test_the_estimate_is_of_what_fit_will_learn(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fit --unlabelled extend` learns whole masks, so those are compared, and what is drawn stays in them."""
    given = list[AnnotatedDataset]()

    def recorded(spec: InterpreterSpec, dataset: AnnotatedDataset, features: Features, **options: Any) -> Estimate:
        given.append(dataset)
        return estimate(spec, dataset, features, **options)

    monkeypatch.setattr(module, "estimate", recorded)
    found = await studio.estimate()
    assert found["curve"][-1]["images"] == 4
    for seed, sheet in studio._workspace.drawn.items():
        mask = given[0].labels[seed]
        assert (mask != UNDRAWN).all() and (mask == sheet.mask)[sheet.mask != UNDRAWN].all()


async def test_an_image_shows_what_is_drawn_on_it(studio: Studio, truth: Truth) -> None:
    """Not what its extension has: nothing is estimated for a class that is drawn on one image."""
    drawn = rows_only(truth.mask(3))
    draw(studio._workspace, 3, np.where(drawn == 2, 1, drawn))
    _, dataset = studio._annotated()
    whole = extended(truth.generator, dataset, layout="paper")
    assert sum((mask == 2).any() for mask in whole.labels.values()) > 1
    spot = (await studio.estimate())["classes"][2]
    assert spot["images"] == 1 and spot["iou"] is None


async def test_nothing_is_printed(studio: Studio, capfd: pytest.CaptureFixture[str]) -> None:
    """Where the terminal is a file, a progress bar on a full disk once stopped the page for good."""
    await labels(studio, range(10, 12))
    await studio.suggestions(2)
    await studio.estimate()
    assert capfd.readouterr() == ("", "")


async def test_features_are_kept_within_a_bound_and_come_out_the_same(studio: Studio) -> None:
    before = await labels(studio, range(10, 16))
    studio._features.clear()
    studio._room = 3 * studio._image_bytes
    after = await labels(studio, range(10, 16))
    assert all((one == other).all() for one, other in zip(before, after, strict=True))
    assert len(studio._features) == 3


async def test_a_change_of_strokes_or_classes_is_seen(studio: Studio, truth: Truth) -> None:
    workspace = studio._workspace

    def change(dark: int, bright: int) -> None:
        for seed in range(4):
            mask = np.where(truth.mask(seed) == 1, bright, dark).astype(np.uint8)
            draw(workspace, seed, rows_only(mask))

    before = await labels(studio, range(10, 12))
    change(1, 0)
    turned = await labels(studio, range(10, 12))
    assert all((one != other).mean() > 0.5 for one, other in zip(before, turned, strict=True))
    workspace.save_classes(LabelClasses((*CLASSES.names, "new"), (*CLASSES.palette, (1, 2, 3))))
    change(1, 3)
    renamed = await labels(studio, range(10, 12))
    assert all(((one == 0) == (other == 3)).mean() > 0.9 for one, other in zip(turned, renamed, strict=True))


async def test_suggestions_displace_no_features(studio: Studio) -> None:
    await labels(studio, range(10, 12))
    kept = set(studio._features)
    assert len(await studio.suggestions(4)) == 4
    assert set(studio._features) == kept


def test_a_generator_whose_features_do_not_fit_is_refused(truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 40}
    monkeypatch.setattr(os, "sysconf", lambda name: pages[name])
    with pytest.raises(InsufficientResources, match="the features of one image take .* annotate on a machine with"):
        Studio(truth.generator, layout="paper", truncation_psi=1.0)
