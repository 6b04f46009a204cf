"""How the labels of each task are sent: fields of messages, members of archives, and a picture.

Rules of this file:
- This is the one table from a task to its encoders; a task's own file has what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy.typing as npt

from labelmint.gateway.encoding import keypoints, segmentation
from labelmint.gateway.encoding.figure import Legend
from labelmint.gateway.encoding.pixels import Bytes
from labelmint.gateway.sampling.sample import Sample


class LabelEncoding(Protocol):
    """The contents of a task's file. Its functions are called for samples whose labels were not left out."""

    # The fields that the task adds to a sample's message, as other tasks and left out labels have them; JSON values.
    NO_FIELDS: dict[str, Any]

    def fields(self, sample: Sample) -> dict[str, Any]:
        """The fields of a sample's message, on either wire, that are not pixels; JSON values."""

    def arrays(self, sample: Sample) -> dict[str, npt.NDArray[Any]]:
        """The members of an .npz archive."""

    def members(self, sample: Sample) -> dict[str, bytes]:
        """The members of a WebDataset sample, by suffix, beside the image and the JSON."""

    def overlay(self, sample: Sample) -> tuple[Bytes, Legend]:
        """The image under its labels, uint8 [H,H,3], and the legend."""


_ENCODINGS: Mapping[str, LabelEncoding] = {"segmentation": segmentation, "keypoints": keypoints}


NO_FIELDS: Mapping[str, Any] = {name: value for each in _ENCODINGS.values() for name, value in each.NO_FIELDS.items()}


def labels_of(sample: Sample) -> LabelEncoding:
    return _ENCODINGS[sample.model.task.name]
