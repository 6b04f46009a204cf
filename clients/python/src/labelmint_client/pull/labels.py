"""The table from each task to the module that writes its labels to files.

Rules of this file:
- A format looks up the task's module here and compares no task names. All differences between tasks are in these
  modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol, TypeAlias, cast

from labelmint_client import Model, Sample
from labelmint_client.pull.directory import Json
from labelmint_client.pull.formats import LabelmeShape, LabelMode, MdsColumn, Written, YoloLine
from labelmint_client.pull.pixels import Bytes
from labelmint_client.tasks import TASKS

# A COCO file: its name, its categories, and the form of annotation that goes into `segmentation` ("" for none).
CocoFile: TypeAlias = tuple[str, list[Json], str]


class Labels(Protocol):
    """The interface of a task's module. A palette is None if labels are written as gray PNGs."""

    # Whether the label is an image of class ids. Only such a label may have a palette and ignored pixels.
    HAS_LABEL_IMAGE: bool
    # The fields that the task adds to a sample's JSON, with their values in samples of other tasks.
    NO_FIELDS: dict[str, Any]
    # The label's column in a Parquet file.
    COLUMN: str
    # A note for readers of the COCO files, "" for none.
    COCO_NOTE: str
    # What depends on the task in the program that opens a pull (`{answer}`), by format.
    CALLS: dict[str, str]

    def fields(self, sample: Sample, model: Model) -> dict[str, Any]:
        """Return the fields that the task adds to a sample's JSON."""

    def members(self, written: Written) -> dict[str, bytes]:
        """Return the further members of a WebDataset sample, by suffix, besides the image and the JSON."""

    def file(self, written: Written, palette: Bytes | None) -> tuple[str, bytes]:
        """Return the path and content of a sample's label file in the format `folder`."""

    def metadata(self, line: Json, path: str) -> Json:
        """Return the label's fields in metadata.jsonl, for a sample with this manifest line and label file."""

    def column_type(self) -> Any:
        """Return the type of COLUMN, a pyarrow.DataType."""

    def cell(self, written: Written, palette: Bytes | None) -> Any:
        """Return the value of COLUMN."""

    def coco_annotations(self, written: Written, model: Model) -> list[Json]:
        """Return the COCO annotations of a sample, without ids."""

    def coco_files(self, model: Model) -> list[CocoFile]:
        """Return the COCO files of a pull."""

    def yolo_lines(self, written: Written, model: Model) -> list[YoloLine]:
        """Return the lines of a sample's label for YOLO."""

    def yolo_facts(self, model: Model) -> dict[str, str]:
        """Return the lines of `data.yaml` about the model: their names, and their values in YAML."""

    def labelme_shapes(self, written: Written, model: Model) -> list[LabelmeShape]:
        """Return the shapes of a sample for labelme."""

    def mds_column(self, model: Model) -> MdsColumn:
        """Return the label's column for Mosaic Streaming."""

    def mds_value(self, written: Written) -> dict[str, bytes]:
        """Return the value of that column, encoded, under the column's name."""

    def remarks(self, name: str, label_mode: LabelMode) -> list[str]:
        """Return paragraphs about labels for the README of a pull in the format `name`."""


_LABELS: Mapping[str, Labels] = {name: cast(Labels, import_module(f"labelmint_client.pull.{name}")) for name in TASKS}

NO_FIELDS: Mapping[str, Any] = {name: value for each in _LABELS.values() for name, value in each.NO_FIELDS.items()}


def labels_of(model: Model) -> Labels:
    return _LABELS[model.task]
