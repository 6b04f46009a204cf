"""Pictures for people: the labels over the image, and the uncertainty of each pixel.

Rules of this file:
- These pictures are for viewing. The exact arrays come from `pixels.py` and `archives.py`.
"""

from __future__ import annotations

import numpy as np

from labelmint.core.heat import MAX_JS, heat_colours
from labelmint.gateway.encoding.figure import figure
from labelmint.gateway.encoding.labels import labels_of
from labelmint.gateway.encoding.pixels import image_of
from labelmint.gateway.sampling.sample import Sample


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
