"""How the labels of each task are encoded: as message fields, as archive members and as a picture.

Rules of this file:
- This is the only table from a task to its encoders. What differs between tasks is in each task's own file.
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
    """What a task's file defines. Its functions are called only for samples that carry their labels."""

    # The fields that the task adds to a sample's message, with their empty JSON values. Samples of other tasks, and
    # samples without labels, carry these values.
    NO_FIELDS: dict[str, Any]

    def fields(self, sample: Sample) -> dict[str, Any]:
        """Return the fields of a sample's message that are not pixels, as JSON values. gRPC and REST both use them."""

    def arrays(self, sample: Sample) -> dict[str, npt.NDArray[Any]]:
        """Return the members of an .npz archive."""

    def members(self, sample: Sample) -> dict[str, bytes]:
        """Return the members of a WebDataset sample by suffix, without the image and the JSON."""

    def overlay(self, sample: Sample) -> tuple[Bytes, Legend]:
        """Return the image with its labels drawn on it, uint8 [H,H,3], and the legend."""


_ENCODINGS: Mapping[str, LabelEncoding] = {"segmentation": segmentation, "keypoints": keypoints}


NO_FIELDS: Mapping[str, Any] = {name: value for each in _ENCODINGS.values() for name, value in each.NO_FIELDS.items()}


def labels_of(sample: Sample) -> LabelEncoding:
    return _ENCODINGS[sample.model.task.name]
