"""Measures of the demo: PSNR of images and IoU of masks.

Rules of this file:
- IoU is taken over the whole set of images: one confusion matrix, not a mean of means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from labelmint.demo import faces

NUM_CLASSES = len(faces.CLASS_NAMES)


def psnr(image: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of float images [B,3,R,R] in [-1,1]: [B]."""
    error = (image.clamp(-1.0, 1.0) - target) / 2.0
    return -10.0 * error.square().flatten(1).mean(dim=1).log10()


def confusion(predicted: Tensor, exact: Tensor) -> Tensor:
    """Class ids of equal shape to counts int64 [K,K]: row exact, column predicted."""
    pairs = exact.long().flatten() * NUM_CLASSES + predicted.long().flatten()
    return torch.bincount(pairs, minlength=NUM_CLASSES**2).view(NUM_CLASSES, NUM_CLASSES)


def iou(counts: Tensor) -> dict[str, float]:
    """Intersection over union by class name, from a confusion matrix."""
    hit = counts.diagonal().double()
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return dict(zip(faces.CLASS_NAMES, (hit / union.clamp(min=1)).tolist(), strict=True))


def table(by_class: dict[str, float]) -> str:
    """One line a class, the mean last."""
    lines = [f"  {name:<11}{value:.3f}" for name, value in by_class.items()]
    return "\n".join([*lines, f"  {'mean':<11}{sum(by_class.values()) / len(by_class):.3f}"])
