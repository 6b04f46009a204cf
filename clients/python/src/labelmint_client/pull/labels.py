"""How the labels of each task are written to files: the one table from a task to what differs.

Rules of this file:
- A format asks this table and compares no names of tasks; a task's own file has what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

from labelmint_client import Model, Sample
from labelmint_client.pull import keypoints, segmentation
from labelmint_client.pull.directory import Json
from labelmint_client.pull.formats import LabelMode, Written
from labelmint_client.pull.pixels import Bytes

# A COCO file: its name, its categories, and which of an annotation's forms its `segmentation` is ("" for none).
CocoFile: TypeAlias = tuple[str, list[Json], str]


class Labels(Protocol):
    """The contents of a task's file. A palette is None where labels are written as gray PNGs."""

    # Whether the label is an image of class ids, whose PNG may have a palette and whose pixels may be ignored.
    HAS_LABEL_IMAGE: bool
    # The fields that the task adds to a sample's JSON, as samples of other tasks have them.
    NO_FIELDS: dict[str, Any]
    # The column of a Parquet file.
    COLUMN: str
    # What a reader of the COCO files has to know, "" for nothing.
    COCO_NOTE: str
    # The call that opens a pull, by format; without `parquet` and `datasets`, which are the same for all tasks.
    CALLS: dict[str, str]

    def fields(self, sample: Sample, model: Model) -> dict[str, Any]:
        """The fields that the task adds to a sample's JSON."""

    def members(self, written: Written) -> dict[str, bytes]:
        """The members of a WebDataset sample, by suffix, beside the image and the JSON."""

    def file(self, written: Written, palette: Bytes | None) -> tuple[str, bytes]:
        """The path and the content of a sample's own file in a folder."""

    def metadata(self, line: Json, path: str) -> Json:
        """What metadata.jsonl says of a sample, whose manifest line and file these are."""

    def column_type(self) -> Any:
        """The type of COLUMN, a pyarrow.DataType."""

    def cell(self, written: Written, palette: Bytes | None) -> Any:
        """The value of COLUMN."""

    def coco_annotations(self, written: Written, model: Model) -> list[Json]:
        """The COCO annotations of a sample, without ids."""

    def coco_files(self, model: Model) -> list[CocoFile]:
        """The COCO files of a pull."""

    def remarks(self, name: str, label_mode: LabelMode) -> list[str]:
        """What the README of a pull in the format of that name has to say about labels."""


_LABELS: Mapping[str, Labels] = {"segmentation": segmentation, "keypoints": keypoints}

NO_FIELDS: Mapping[str, Any] = {name: value for each in _LABELS.values() for name, value in each.NO_FIELDS.items()}


def labels_of(model: Model) -> Labels:
    return _LABELS[model.task]
