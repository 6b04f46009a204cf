"""The table that maps each task to its interpreter and its training functions.

Rules of this file:
- `fit` and `store` use only this table; everything that differs between tasks is in the task's own file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt
from torch import Tensor

from labelmint.models import keypoints, segmentation
from labelmint.models.annotations import AnnotatedDataset
from labelmint.models.interpreter import InterpreterSpec, StyleInterpreter


class Learning(Protocol):
    """The contents of a task's file. `label` is the annotation of one image, P the number of sampled pixels."""

    INTERPRETER: type[StyleInterpreter]

    def read(self, directory: Path, annotation_format: str) -> AnnotatedDataset:
        """Read the annotations of a directory. Raises UnusableFile."""

    def settings(self, resolution: int) -> dict[str, Any]:
        """Return the fields of FitSettings for which the task has other values."""

    def regions(self, label: npt.NDArray[Any], resolution: int) -> Tensor:
        """Return the regions of an image, int64 [R*R]. At least one pixel is sampled from each, whatever its size."""

    def targets(self, label: npt.NDArray[Any], pixels: Tensor, resolution: int) -> Tensor:
        """Return the targets for the heads' outputs at pixels int64 [P]: one for each pixel."""

    def loss(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        """Return the mean loss of the outputs [N,P,K] of N heads against targets [N,P,...]."""

    def error(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        """Return the error that is reported at the end of the training, from the same arguments."""

    def describe(self, training_error: float) -> str:
        """Return the error as text."""


_LEARNING: Mapping[str, Learning] = {"segmentation": segmentation, "keypoints": keypoints}


def learning_of(task: str) -> Learning:
    return _LEARNING[task]


def build_interpreter(spec: InterpreterSpec, score_kind: str = "sum") -> StyleInterpreter:
    """Return the interpreter of the spec's task, with zero weights."""
    return learning_of(spec.task).INTERPRETER(spec, score_kind)
