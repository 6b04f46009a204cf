"""Training for the segmentation task: each pixel is an example of its class (DatasetGAN, section 3.2).

Rules of this file:
- A label is a mask uint8 [R,R] of class ids. A pixel with the value UNDRAWN is in no region, so nothing is learned from
  it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from labelmint.models.annotations import UNDRAWN, AnnotatedDataset, Unlabelled, read_masks
from labelmint.models.interpreter import StyleInterpreter

INTERPRETER: type[StyleInterpreter] = StyleInterpreter


def read(directory: Path, annotation_format: str, unlabelled: Unlabelled) -> AnnotatedDataset:
    return read_masks(directory, annotation_format, unlabelled=unlabelled)


def settings(resolution: int) -> dict[str, Any]:
    return {}


def regions(label: npt.NDArray[Any], resolution: int) -> Tensor:
    return torch.from_numpy(np.where(label == UNDRAWN, -1, label.astype(np.int64))).flatten()  # [R*R]


def targets(label: npt.NDArray[Any], pixels: Tensor, resolution: int) -> Tensor:
    """Return class ids int64 [P]."""
    return regions(label, resolution)[pixels]


def loss(outputs: Tensor, wanted: Tensor) -> Tensor:
    """Return the cross-entropy of logits [N,P,K] against class ids [N,P]."""
    return F.cross_entropy(outputs.flatten(0, 1), wanted.flatten())


def error(outputs: Tensor, wanted: Tensor) -> Tensor:
    """Return the fraction of the pixels with a wrong label."""
    return (outputs.argmax(dim=2) != wanted).float().mean()


def describe(training_error: float) -> str:
    return f"{training_error:.1%} wrong"
