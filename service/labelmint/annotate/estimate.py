"""Estimates from the annotations alone how well an interpreter labels images that nobody annotated.

Rules of this file:
- Each annotated image is left out once. A quick interpreter is fitted to the others and labels the image. Its label is
  compared with the image's mask. An undrawn pixel counts nowhere, unless the masks were extended: then it counts as the
  quick interpreter of all images, this one too, labels it.
- A quick interpreter stands for the ten classifiers, whose training takes minutes. So the estimate says whether more
  images help, and only roughly how good the classifiers will be.
- The curve repeats this for the first 2, 3, 4, 6, 8, 12, ... images, in their order in dataset.json.
- A class that only one image shows is unknown whenever that image is left out. Nothing is estimated for it.
- The spread is the standard deviation when the images are drawn again with replacement (the bootstrap).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from labelmint.core.task import task_of
from labelmint.models.annotations import UNDRAWN, AnnotatedDataset
from labelmint.models.draw import Features
from labelmint.models.interpreter import InterpreterSpec
from labelmint.models.quick import Sums, preview, quick_interpreter, sums_of

Floats = npt.NDArray[np.float64]

RESAMPLED = 200
NEAR = 0.05  # a keypoint is found if it is at most this fraction of the image's side away


@dataclass(frozen=True)
class Figure:
    """A measured value and its standard deviation; NaN where nothing can be measured."""

    value: float
    spread: float


@dataclass(frozen=True)
class Estimate:
    """What leaving out each image once says.

    curve: for a number of annotated images, the mean over the classes. by_class: the same for each class name, for all
    images. Both are IoU (segmentation) or the fraction of keypoints found within NEAR of the side. distance: the mean
    distance of keypoints in pixels, NaN for segmentation. shown_in: the number of images that show each class.
    gain: the expected increase of the value of each class by one more image that shows it. predictions: what the
    interpreter that knew all other images says of each seed: a label uint8 [R,R], or keypoints float32 [K,2].
    """

    curve: Mapping[int, Figure]
    by_class: Mapping[str, Figure]
    distance: float
    shown_in: Mapping[str, int]
    gain: Mapping[str, float]
    predictions: Mapping[int, npt.NDArray[Any]]


def image_counts(images: int) -> list[int]:
    """Return 2, 3, 4, 6, 8, 12, 16, ... up to the number of images, which is the last."""
    counts = sorted({2**power * factor // 2 for power in range(1, 32) for factor in (2, 3)})
    return [count for count in counts if count < images] + ([images] if images > 1 else [])


@torch.no_grad()
def estimate(
    spec: InterpreterSpec, dataset: AnnotatedDataset, features: Features, *, drawn: AnnotatedDataset | None = None
) -> Estimate:
    """Leave out each annotated image once, for each number of images of the curve. `spec` is of `quick_spec`.

    It asks for the features of each image twice. If the masks of `dataset` were extended, `drawn` has those before: an
    image shows the classes that are drawn on it.
    """
    basis, sums = sums_of(spec, dataset, features)
    judge = _counted if task_of(dataset.task).has_label_image else _measured
    seeds = list(dataset.labels)
    judged: dict[int, list[Floats]] = {count: [] for count in image_counts(len(seeds))}
    predictions = {}
    for index, seed in enumerate(seeds):
        maps = features(seed)
        for count in judged:
            if index < count:
                others = Sums.together(sums[other] for other in seeds[:count] if other != seed)
                found = preview(quick_interpreter(spec, basis, others), maps)[0].numpy()
                judged[count].append(judge(found, dataset.labels[seed], spec))
                predictions[seed] = found
    return _summary(drawn or dataset, judged, predictions)


def _counted(found: npt.NDArray[Any], label: npt.NDArray[Any], spec: InterpreterSpec) -> Floats:
    """Return hits, drawn and found pixels of each class, [K,3], over the drawn pixels only."""
    drawn = label != UNDRAWN
    wanted, given = label[drawn], found[drawn]
    count = spec.num_classes
    hits, ours, theirs = (np.bincount(ids, minlength=count) for ids in (wanted[wanted == given], wanted, given))
    return np.stack([hits, ours, theirs], axis=1).astype(np.float64)


def _measured(found: npt.NDArray[Any], label: npt.NDArray[Any], spec: InterpreterSpec) -> Floats:
    """Return of each keypoint whether it was found, whether it is present, and its distance in pixels if so, [K,3]."""
    present = label[:, 2] > 0
    distance = np.linalg.norm(found - label[:, :2], axis=1)
    near = distance <= NEAR * spec.resolution
    return np.stack([near & present, present, distance * present], axis=1).astype(np.float64)


def _values(judged: Floats, task: str) -> Floats:
    """Return the value of each class [...,K] from sums over images [...,K,3]; NaN for a class that none shows."""
    hits, shown = judged[..., 0], judged[..., 1]
    whole = shown + judged[..., 2] - hits if task_of(task).has_label_image else shown
    return np.divide(hits, whole, out=np.full_like(hits, np.nan), where=shown > 0)


def _summary(
    dataset: AnnotatedDataset, judged: Mapping[int, Sequence[Floats]], predictions: Mapping[int, npt.NDArray[Any]]
) -> Estimate:
    """Turn the counts of each image into figures, over the classes that two images or more show.

    At the start of the curve, a class that fewer than two of the first images show counts as 0: it cannot be found.
    """
    names, nothing = dataset.names, Figure(np.nan, np.nan)
    shown = _shown(dataset)  # [I,K]
    known = shown.sum(axis=0) > 1  # [K]
    curve, by_class, distance = {}, dict.fromkeys(names, nothing), np.nan
    for count, images in judged.items():
        if not known.any():
            break
        each = np.stack(images)  # [I,K,3]
        learned = shown[:count].sum(axis=0) > 1  # [K]
        value = np.where(learned, _values(each.sum(axis=0), dataset.task), 0.0)  # [K]
        again = np.where(learned, _resampled(each, dataset.task), 0.0)  # [RESAMPLED,K]
        curve[count] = Figure(float(value[known].mean()), float(np.nanstd(np.nanmean(again[:, known], axis=1))))
        by_class |= {names[k]: Figure(float(value[k]), float(np.nanstd(again[:, k]))) for k in np.flatnonzero(known)}
        if not task_of(dataset.task).has_label_image:
            total = each.sum(axis=0)[known]  # [K,3]
            distance = float(total[:, 2].sum() / total[:, 1].sum())
    shown_in = dict(zip(names, shown.sum(axis=0).tolist(), strict=True))
    gain = {name: _gain(by_class[name].value, shown_in[name]) for name in names}
    return Estimate(curve, by_class, distance, shown_in, gain, predictions)


def _shown(dataset: AnnotatedDataset) -> npt.NDArray[np.bool_]:
    """Return which image shows which class, bool [I,K]."""
    count = len(dataset.names)
    if not task_of(dataset.task).has_label_image:
        return np.stack([label[:, 2] > 0 for label in dataset.labels.values()])
    return np.stack([np.isin(np.arange(count), label) for label in dataset.labels.values()])


def _resampled(each: Floats, task: str) -> Floats:
    """Return the values [RESAMPLED,K] of as many images, drawn again with replacement."""
    rng = np.random.default_rng(0)
    again = rng.integers(len(each), size=(RESAMPLED, len(each)))
    return _values(each[again].sum(axis=1), task)


def _gain(value: float, images: int) -> float:
    """Return what one more image that shows the class is expected to bring.

    An error that falls like 1/n with n images falls by a fraction of 1/(n+1) with the next. A class that fewer than two
    images show has everything to gain.
    """
    return (1.0 - (0.0 if np.isnan(value) else value)) / (images + 1)
