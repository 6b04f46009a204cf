"""The colours in which people see a JS divergence, in pictures and on the annotation page. Pure functions.

Rules of this file:
- The colours are ordered from dark to bright, also for colour-blind people and in grey.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# Anchors of a perceptually ordered colour map, from dark to bright.
_HEAT = np.array([(8, 6, 36), (84, 18, 110), (187, 55, 84), (249, 142, 9), (252, 255, 164)], np.float64)
MAX_JS = float(np.log(2.0))  # nats; reached when half of the ensemble is sure of one class and half of another


def heat_colours(nats: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint8]:
    """Map JS divergences, float [...] in nats, to colours, uint8 [...,3]: brightest from MAX_JS on."""
    position = np.clip(nats / MAX_JS, 0.0, 1.0) * (len(_HEAT) - 1)
    anchors = np.arange(len(_HEAT))
    return np.stack([np.interp(position, anchors, _HEAT[:, c]) for c in range(3)], axis=-1).round().astype(np.uint8)
