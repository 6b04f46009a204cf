"""What a client makes of the labels of each task.

Rules of this file:
- The service names a model's task; code asks the `Task` what differs and compares no names.
- `pull/labels.py` says how a task's labels are written to files.
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
    field: of `Sample`: what a network is trained to answer.
    dtype, dims: of that array; in the dims, "R" stands for the resolution and "K" for the number of label names.
    names, names_field: the field with the label names, of `Model` and of a model's JSON.
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
    """Raises ValueError for a task that this version of the client does not know."""
    if model.task not in TASKS:
        raise ValueError(f"model {model.name!r} has task {model.task!r}, which this client does not know: update it")
    return TASKS[model.task]


def target_of(sample: Sample) -> npt.NDArray[Any]:
    """What a network is trained to answer for a sample's image; raises ValueError where it was left out."""
    for task in TASKS.values():
        if (target := getattr(sample, task.field)) is not None:
            found: npt.NDArray[Any] = target
            return found
    raise ValueError("the sample has no label: it was left out (omit_label)")
