"""The type of annotated images in memory: the readers of all formats return it, and `fit` takes it.

Rules of this file:
- All tasks share one type, so `fit` needs no case for each format. A label is an array; the task defines its meaning.
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
    """Images uint8 [R,R,3] by seed, and the label of each image.

    A label is a mask uint8 [R,R] of class ids (segmentation), or float32 [K,3] (keypoints): x and y in pixels, and 1
    if the keypoint is present, else 0.
    """

    task: TaskName
    truncation_psi: float
    names: tuple[str, ...]
    palette: Palette
    images: Mapping[int, Bytes]
    labels: Mapping[int, npt.NDArray[Any]]
