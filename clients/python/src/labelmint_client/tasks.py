"""The table of tasks: where each task's labels are and what shape they have.

Rules of this file:
- The service names a model's task. Code looks up differences in the `Task` and compares no task names.
- `pull/labels.py` says how the labels of a task are written to files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from labelmint_client.messages import Model, Sample


@dataclass(frozen=True)
class Task:
    """
    field: the field of `Sample` that is the training target.
    dtype, dims: those of the target array. In `dims`, "R" is the resolution and "K" the number of label names.
    names, names_field: the fields with the label names, in `Model` and in a model's JSON.
    """

    field: str
    dtype: str
    dims: tuple[int | str, ...]
    names: str
    names_field: str

    def shape(self, model: Model) -> tuple[int, ...]:
        sizes = {"R": model.resolution, "K": len(getattr(model, self.names))}
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.dims)


TASKS: Mapping[str, Task] = {
    "segmentation": Task(field="label", dtype="uint8", dims=("R", "R"), names="class_names", names_field="classes"),
    "keypoints": Task(
        field="keypoints", dtype="float32", dims=("K", 3), names="keypoint_names", names_field="keypoint_classes"
    ),
}


def task_of(model: Model) -> Task:
    """Return the task of a model. Raises ValueError for a task that this version of the client does not know."""
    if model.task not in TASKS:
        raise ValueError(f"model {model.name!r} has task {model.task!r}, which this client does not know: update it")
    return TASKS[model.task]


def target_of(sample: Sample) -> npt.NDArray[Any]:
    """Return the training target of a sample, the label or the keypoints. Raises ValueError if it was left out."""
    for task in TASKS.values():
        if (target := getattr(sample, task.field)) is not None:
            found: npt.NDArray[Any] = target
            return found
    raise ValueError("the sample has no label: it was left out (omit_label)")
