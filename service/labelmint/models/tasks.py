"""The interpreter and the training functions of each task.

Rules of this file:
- They are in the module of this package with the task's name, so that a new task changes no table. `fit` and `store`
  reach them only through this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import numpy.typing as npt
from torch import Tensor

from labelmint.core.task import TASKS
from labelmint.models.annotations import AnnotatedDataset, Unlabelled
from labelmint.models.interpreter import InterpreterSpec, StyleInterpreter


class Learning(Protocol):
    """The contents of a task's file. `label` is the annotation of one image, P the number of sampled pixels."""

    INTERPRETER: type[StyleInterpreter]

    def read(self, directory: Path, annotation_format: str, unlabelled: Unlabelled) -> AnnotatedDataset:
        """Read the annotations of a directory; see `read_masks` for `unlabelled`. Raises UnusableFile."""

    def settings(self, resolution: int) -> dict[str, Any]:
        """Return the fields of FitSettings for which the task has other values."""

    def regions(self, label: npt.NDArray[Any], resolution: int) -> Tensor:
        """Return the regions of an image, int64 [R*R]; -1 where nothing was drawn.

        At least one pixel is sampled from each region, whatever its size, and none where nothing was drawn.
        """

    def targets(self, label: npt.NDArray[Any], pixels: Tensor, resolution: int) -> Tensor:
        """Return the targets for the heads' outputs at pixels int64 [P]: one for each pixel."""

    def loss(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        """Return the mean loss of the outputs [N,P,K] of N heads against targets [N,P,...]."""

    def error(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        """Return the error that is reported at the end of the training, from the same arguments."""

    def describe(self, training_error: float) -> str:
        """Return the error as text."""


_LEARNING: Mapping[str, Learning] = {name: cast(Learning, import_module(f"labelmint.models.{name}")) for name in TASKS}


def learning_of(task: str) -> Learning:
    return _LEARNING[task]


def build_interpreter(
    spec: InterpreterSpec, score_kind: str = "sum", strip_rows: int | None = None
) -> StyleInterpreter:
    """Return the interpreter of the spec's task, with zero weights."""
    return learning_of(spec.task).INTERPRETER(spec, score_kind, strip_rows)
