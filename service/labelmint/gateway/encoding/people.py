"""Pictures for people: the labels over the image, and the uncertainty of each pixel.

Rules of this file:
- These pictures are for viewing. The exact arrays come from `pixels.py` and `archives.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from labelmint.gateway.encoding.figure import figure
from labelmint.gateway.encoding.labels import labels_of
from labelmint.gateway.encoding.pixels import Bytes, image_of
from labelmint.gateway.sampling.sample import Sample

# Anchors of a perceptually ordered colour map, from dark to bright.
_HEAT = np.array([(8, 6, 36), (84, 18, 110), (187, 55, 84), (249, 142, 9), (252, 255, 164)], np.float64)
MAX_JS = float(np.log(2.0))  # nats; reached when half of the ensemble is sure of one class and half of another


def overlay_png(sample: Sample) -> bytes:
    """Show the image, the labels over it, their legend, and the score next to the gate."""
    panel, legend = labels_of(sample).overlay(sample)
    return figure(sample, [image_of(sample), panel], legend)


def uncertainty_png(sample: Sample) -> bytes:
    """Show the image and the JS divergence of each pixel: dark for agreement, brightest from ln 2 nats on."""
    assert sample.js_map is not None, "uncertainty needs include_js_map"
    ticks = np.linspace(0.0, MAX_JS, 5)
    colours = [tuple(colour) for colour in heat_colours(ticks).tolist()]
    legend = [(f"{tick:.2f} nats", colour) for tick, colour in zip(ticks, colours, strict=True)]
    return figure(sample, [image_of(sample), heat_colours(sample.js_map)], legend)


def heat_colours(nats: npt.NDArray[np.floating[Any]]) -> Bytes:
    """Map JS divergences, float [...] in nats, to colours, uint8 [...,3]."""
    position = np.clip(nats / MAX_JS, 0.0, 1.0) * (len(_HEAT) - 1)
    anchors = np.arange(len(_HEAT))
    return np.stack([np.interp(position, anchors, _HEAT[:, c]) for c in range(3)], axis=-1).round().astype(np.uint8)
