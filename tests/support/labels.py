"""Labels that are hard to describe by regions."""

import numpy as np
from scipy import ndimage


def noise(side: int, grain: float, classes: int) -> np.ndarray:
    """A label, uint8 [side,side]: specks, holes in holes, regions that touch at corners only, and ignored pixels."""
    planes = np.random.default_rng(0).standard_normal((classes, side, side))
    label = np.argmax([ndimage.gaussian_filter(plane, grain) for plane in planes], 0).astype(np.uint8)
    label[:2, :5] = 255
    return label
