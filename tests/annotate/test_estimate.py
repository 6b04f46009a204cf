"""The estimate: near the truth of unseen images, blind for undrawn pixels, and honest about what cannot be known."""

import math
from dataclasses import replace

import numpy as np
import pytest

from labelmint.annotate.estimate import image_counts
from labelmint.models.annotations import UNDRAWN
from labelmint.models.draw import draw
from labelmint.models.quick import fit_quick, preview
from tests.annotate.conftest import Truth, rows_only

pytestmark = pytest.mark.torch


def test_image_counts() -> None:
    assert image_counts(16) == [2, 3, 4, 6, 8, 12, 16] and image_counts(5) == [2, 3, 4, 5]
    assert image_counts(2) == [2] and image_counts(1) == []


def test_comes_near_the_truth_of_unseen_images(truth: Truth) -> None:
    dataset = truth.dataset(range(12))
    found = truth.estimate(dataset)
    interpreter = fit_quick(truth.generator, dataset, "paper")
    hits, union = np.zeros(3), np.zeros(3)
    for seed in range(100, 140):
        label = preview(interpreter, draw(truth.generator, seed, 1.0, layout="paper")[1])[0].numpy()
        for k in range(3):
            hits[k] += ((label == k) & (truth.mask(seed) == k)).sum()
            union[k] += ((label == k) | (truth.mask(seed) == k)).sum()
    assert list(found.curve) == [2, 3, 4, 6, 8, 12]
    assert abs(found.curve[12].value - (hits / union).mean()) < 0.08
    assert 0.0 < found.curve[12].spread < 0.2
    assert found.curve[12].value == pytest.approx(np.mean([figure.value for figure in found.by_class.values()]))


def test_a_pixel_that_nobody_drew_counts_nowhere(truth: Truth) -> None:
    """The predicted label has a class everywhere; only what it has at the drawn rows is compared."""
    dataset = truth.dataset(range(4), rows_only)
    found = truth.estimate(dataset)
    hits = union = 0
    for seed, label in dataset.labels.items():
        assert found.predictions[seed].max() < 3
        drawn, predicted = label != UNDRAWN, found.predictions[seed]
        hits += ((predicted == 1) & (label == 1)).sum()
        union += ((predicted == 1) & drawn | (label == 1)).sum()
    assert found.by_class["<bright>"].value == pytest.approx(hits / union)


def test_the_image_itself_teaches_nothing(truth: Truth) -> None:
    """An image with turned labels is labelled as the others say, so its own labels are all wrong."""
    dataset = truth.dataset(range(0, 8, 2))
    turned = {**dataset.labels, 6: 1 - dataset.labels[6]}
    found = truth.estimate(replace(dataset, labels=turned))
    assert (found.predictions[6] == dataset.labels[6]).mean() > 0.6


def test_a_class_that_one_image_shows_is_not_known_and_would_gain_most(truth: Truth) -> None:
    dataset = truth.dataset(range(0, 8, 2))
    labels = {seed: label.copy() for seed, label in dataset.labels.items()}
    labels[4][3:6, 3:6] = 2
    found = truth.estimate(replace(dataset, labels=labels))
    assert found.shown_in == {"dark": 4, "<bright>": 4, "spot": 1}
    assert math.isnan(found.by_class["spot"].value) and max(found.gain, key=found.gain.__getitem__) == "spot"
    assert not math.isnan(found.curve[4].value)


def test_one_image_says_nothing(truth: Truth) -> None:
    found = truth.estimate(truth.dataset(range(1)))
    assert not found.curve and not found.predictions and math.isnan(found.by_class["dark"].value)


def test_keypoints_are_measured_in_pixels(truth: Truth) -> None:
    dataset = truth.points(range(8))
    dataset.labels[3][0, 2] = 0  # absent: counts nowhere
    found = truth.estimate(dataset)
    present = [seed for seed in dataset.labels if seed != 3]
    distance = [np.linalg.norm(found.predictions[seed][0] - dataset.labels[seed][0, :2]) for seed in present]
    assert found.distance == pytest.approx(np.mean(distance), rel=1e-5)
    assert found.by_class["peak"].value == pytest.approx(np.mean(np.array(distance) <= 1.6))
    assert found.shown_in == {"peak": 7}


def test_can_be_repeated(truth: Truth) -> None:
    first, second = (truth.estimate(truth.dataset(range(4))) for _ in range(2))
    assert first.curve == second.curve and first.gain == second.gain
