"""The labels of the segmentation task: an image of class ids.

Rules of this file:
- Messages carry the label image as pixels, which `pixels.py` encodes. The task adds no other fields.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from labelmint.gateway.encoding.figure import Legend
from labelmint.gateway.encoding.pixels import IGNORE, IGNORE_COLOUR, Bytes, image_of, label_of
from labelmint.gateway.sampling.sample import Sample

NO_FIELDS: dict[str, Any] = {}


def fields(sample: Sample) -> dict[str, Any]:
    return {}


def arrays(sample: Sample) -> dict[str, npt.NDArray[Any]]:
    return {"label": label_of(sample)}


def members(sample: Sample) -> dict[str, bytes]:
    """Return the label as an array, because WebDataset's image decoders turn a palette PNG into colours."""
    buffer = io.BytesIO()
    np.save(buffer, label_of(sample), allow_pickle=False)
    return {"label.npy": buffer.getvalue()}


def overlay(sample: Sample) -> tuple[Bytes, Legend]:
    names, label = sample.model.label_names, label_of(sample)
    palette = dict(enumerate(sample.model.palette)) | {IGNORE: IGNORE_COLOUR}
    table = np.zeros((IGNORE + 1, 3), np.float32)
    table[list(palette)] = list(palette.values())
    blend = image_of(sample).astype(np.float32) * 0.35 + table[label] * 0.65  # [R,R,3]
    legend = [("ignored" if i == IGNORE else names[i], palette[i]) for i in np.unique(label).tolist()]
    return np.clip(blend, 0, 255).astype(np.uint8), legend
