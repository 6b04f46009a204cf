"""Metrics of the demo: PSNR of images and IoU of masks.

Rules of this file:
- IoU is computed from one confusion matrix over all images. It is not the mean of the IoU of each image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from demo import faces

NUM_CLASSES = len(faces.CLASS_NAMES)


def psnr(image: Tensor, target: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, [B], of float images [B,3,R,R] in [-1,1]."""
    error = (image.clamp(-1.0, 1.0) - target) / 2.0
    return -10.0 * error.square().flatten(1).mean(dim=1).log10()


def confusion(predicted: Tensor, exact: Tensor) -> Tensor:
    """Count pairs of class ids, given in equal shapes: int64 [K,K], row = exact, column = predicted."""
    pairs = exact.long().flatten() * NUM_CLASSES + predicted.long().flatten()
    return torch.bincount(pairs, minlength=NUM_CLASSES**2).view(NUM_CLASSES, NUM_CLASSES)


def iou(counts: Tensor) -> dict[str, float]:
    """Compute the intersection over union of each class name from a confusion matrix."""
    hit = counts.diagonal().double()
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return dict(zip(faces.CLASS_NAMES, (hit / union.clamp(min=1)).tolist(), strict=True))


def table(by_class: dict[str, float]) -> str:
    """Format one line per class, with the mean last."""
    lines = [f"  {name:<11}{value:.3f}" for name, value in by_class.items()]
    return "\n".join([*lines, f"  {'mean':<11}{sum(by_class.values()) / len(by_class):.3f}"])
