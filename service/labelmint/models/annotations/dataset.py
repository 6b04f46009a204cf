"""Annotated images as values: what the readers of all formats give and `fit` takes.

Rules of this file:
- One shape for all tasks: what was annotated on an image is an array, and the task says what it means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from labelmint.core.task import TaskName
from labelmint.models.annotations.directory import Palette
from labelmint.models.annotations.files import Bytes


@dataclass(frozen=True)
class AnnotatedDataset:
    """Images uint8 [R,R,3] by their seeds, and the label of each.

    A label is a mask uint8 [R,R] of class ids (segmentation), or float32 [K,3] (keypoints): x and y in pixels, and 1
    where the keypoint is present, else 0.
    """

    task: TaskName
    truncation_psi: float
    names: tuple[str, ...]
    palette: Palette
    images: Mapping[int, Bytes]
    labels: Mapping[int, npt.NDArray[Any]]
