"""Renders the demo domain `faces`: procedural faces whose part masks are exact.

Rules of this package:
- A face is a pure function of its latents. The renderer draws no random numbers.
- Geometry comes from `z[:, :32]`, and appearance (colours, light) from `style_z[:, 32:]`. So mixing two latents
  combines the shape of one with the appearance of the other.
- z is first normalised to unit mean square, as in StyleGAN's mapping network, because the scene may depend only on
  values that a generator can see.
- The image is a continuous function of z, so that a generator can learn it.
- Data flows from `scene` (parameters) to `shapes` (outlines) and `shading` (colours), which `renderer` joins.
"""

from demo.faces.classes import (
    CLASS_NAMES,
    GEOMETRY_DIMS,
    KEYPOINT_NAMES,
    KEYPOINT_PALETTE,
    PALETTE,
    RARE_PARTS,
    RESOLUTION,
    Z_DIM,
)
from demo.faces.renderer import Faces, render

__all__ = [
    "CLASS_NAMES",
    "GEOMETRY_DIMS",
    "KEYPOINT_NAMES",
    "KEYPOINT_PALETTE",
    "PALETTE",
    "RARE_PARTS",
    "RESOLUTION",
    "Z_DIM",
    "Faces",
    "render",
]
