"""How the labels of each task are learnt: the one table from a task to its interpreter and its training.

Rules of this file:
- `fit` and `store` ask this table; a task's own file has what differs.
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
    """The contents of a task's file. `label` is what was annotated on one image, P a number of drawn pixels."""

    INTERPRETER: type[StyleInterpreter]

    def read(self, directory: Path, annotation_format: str) -> AnnotatedDataset:
        """The annotations of a directory; raises UnusableFile."""

    def settings(self, resolution: int) -> dict[str, Any]:
        """The fields of FitSettings that the task has other values for."""

    def regions(self, label: npt.NDArray[Any], resolution: int) -> Tensor:
        """The regions of an image, int64 [R*R]: pixels are drawn from each of them, whatever its size."""

    def targets(self, label: npt.NDArray[Any], pixels: Tensor, resolution: int) -> Tensor:
        """What the heads shall say at pixels int64 [P]: one target for each."""

    def loss(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        """The mean loss of the outputs [N,P,K] of N heads against targets [N,P,...]."""

    def error(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        """The error that is reported at the end of the training, of the same arguments."""

    def describe(self, training_error: float) -> str:
        """The error in words."""


_LEARNING: Mapping[str, Learning] = {"segmentation": segmentation, "keypoints": keypoints}


def learning_of(task: str) -> Learning:
    return _LEARNING[task]


def build_interpreter(spec: InterpreterSpec, score_kind: str = "sum") -> StyleInterpreter:
    """The interpreter of the spec's task, its weights zero."""
    return learning_of(spec.task).INTERPRETER(spec, score_kind)
