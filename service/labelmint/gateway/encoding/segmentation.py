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
from labelmint.gateway.encoding.pixels import Bytes, image_of, label_of
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
    names, palette, label = sample.model.label_names, sample.model.palette, label_of(sample)
    colours = np.asarray(palette, np.float32)[label]  # [R,R,3]
    blend = image_of(sample).astype(np.float32) * 0.35 + colours * 0.65
    legend = [(names[i], palette[i]) for i in np.unique(label)]
    return np.clip(blend, 0, 255).astype(np.uint8), legend
