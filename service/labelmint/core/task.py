"""The tasks that a Style Interpreter can be trained for, and how they differ when a model is served.

Rules of this file:
- A model names its task. Code reads the differences from the `Task` and never compares task names.
- `gateway/encoding/labels.py` defines how a task's labels are sent, `models/tasks.py` how they are trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

TaskName = Literal["segmentation", "keypoints"]
DType = Literal["uint8", "float32"]
Measure = Literal["area", "confidence"]


@dataclass(frozen=True)
class Output:
    """A tensor of one sample. In its shape, "R" is the resolution and "K" the number of label names."""

    name: str
    dtype: DType
    shape: tuple[int | Literal["R", "K"], ...]

    def dims(self, resolution: int, num_labels: int) -> tuple[int, ...]:
        sizes = {"R": resolution, "K": num_labels}
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)


@dataclass(frozen=True)
class Task:
    """The properties that differ between tasks.

    labels: the label outputs of the task; the image and the uncertainty are separate.
    names_parameter: the parameter of a model's configuration with the label names, as a JSON list.
    names_field: the field of a Model message with the label names. The gallery finds it by the colours of its entries.
    names: what the label names denote, in the plural.
    min_names: the smallest useful number of label names.
    measure: what conditions on the content of a sample (`content.py`) measure of a label name.
    has_label_image: whether the label is an image of class ids, which can be encoded as PNG.
    annotation_option: the option of `labelmint fit` that names the format of the annotations.
    """

    name: TaskName
    labels: tuple[Output, ...]
    names_parameter: str
    names_field: str
    names: str
    min_names: int
    measure: Measure
    has_label_image: bool
    annotation_option: str

    @property
    def label_outputs(self) -> tuple[str, ...]:
        return tuple(output.name for output in self.labels)


# The outputs that every model has. Divergences are in nats.
IMAGE = Output("image", "uint8", ("R", "R", 3))
UNCERTAINTY = (Output("js_map", "float32", ("R", "R")), Output("js_score", "float32", (1,)))

SEGMENTATION = Task(
    name="segmentation",
    labels=(Output("label", "uint8", ("R", "R")),),  # class ids
    names_parameter="class_names",
    names_field="classes",
    names="classes",
    min_names=2,
    measure="area",
    has_label_image=True,
    annotation_option="mask_format",
)
KEYPOINTS = Task(
    name="keypoints",
    # Positions are (x, y) in pixels, with pixel centres at integers. The confidence is the heatmap's value there,
    # nominally 0 to 1.
    labels=(Output("keypoints", "float32", ("K", 2)), Output("confidence", "float32", ("K",))),
    names_parameter="keypoint_names",
    names_field="keypoint_classes",
    names="keypoints",
    min_names=1,
    measure="confidence",
    has_label_image=False,
    annotation_option="keypoint_format",
)

TASKS: Mapping[str, Task] = {task.name: task for task in (SEGMENTATION, KEYPOINTS)}


def task_of(name: str) -> Task:
    """The task of that name; raises ValueError for an unknown name."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]
