"""The labels of the keypoint task: one position and one confidence per keypoint name.

Rules of this file:
- Positions are (x, y) in pixels. Pixel centres are at integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from labelmint.gateway.encoding.figure import INK, PANEL, PAPER, Legend
from labelmint.gateway.encoding.pixels import Bytes, image_of
from labelmint.gateway.sampling.sample import Sample

NO_FIELDS: dict[str, Any] = {"keypoints": []}


def fields(sample: Sample) -> dict[str, Any]:
    positions, confidence = sample.labels["keypoints"].tolist(), sample.labels["confidence"].tolist()
    return {
        "keypoints": [
            {"name": name, "x": x, "y": y, "confidence": c}
            for name, (x, y), c in zip(sample.model.label_names, positions, confidence, strict=True)
        ]
    }


def arrays(sample: Sample) -> dict[str, npt.NDArray[Any]]:
    return {**sample.labels, "keypoint_names": np.array(sample.model.label_names)}


def members(sample: Sample) -> dict[str, bytes]:
    """No members: the JSON already holds the keypoints."""
    return {}


def overlay(sample: Sample) -> tuple[Bytes, Legend]:
    """Return the image, enlarged to a panel, with a ringed dot at each keypoint."""
    image, names, palette = image_of(sample), sample.model.label_names, sample.model.palette
    picture = Image.fromarray(image).resize((PANEL, PANEL), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    scale = PANEL / image.shape[0]
    for (x, y), rgb in zip(((sample.labels["keypoints"] + 0.5) * scale).tolist(), palette, strict=True):
        draw.ellipse((x - 7, y - 7, x + 7, y + 7), PAPER, INK)
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), rgb)
    confidence = sample.labels["confidence"].tolist()
    legend = [(f"{name} {c:.2f}", rgb) for name, rgb, c in zip(names, palette, confidence, strict=True)]
    return np.asarray(picture), legend
