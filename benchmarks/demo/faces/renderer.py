"""Draws faces: finds the layer that owns each subsample, and averages the layers' colours over each pixel.

Rules of this file:
- A pixel's mask is the class that owns most of its subsamples; of classes with the same number, the one with the lower
  id. Its colour is the mean over the same subsamples. So image and mask agree.
- Layers are shaded once in a pixel, at its centre, because shades are smooth there; edges are what needs subsamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from demo.faces import shading, shapes
from demo.faces.classes import CLASS_NAMES, RESOLUTION
from demo.faces.keypoints import keypoints
from demo.faces.scene import Geometry, appearance, geometry

SUPERSAMPLING = 4


@dataclass(frozen=True)
class Faces:
    """A batch of rendered faces: `image` float32 [B,3,R,R] in [-1, 1], `label` uint8 [B,R,R] class ids,
    `keypoints` float32 [B,7,2] (x, y) in pixels; pixel centres are at integers."""

    image: Tensor
    label: Tensor
    keypoints: Tensor


def render(
    z: Tensor, style_z: Tensor | None = None, resolution: int = RESOLUTION, *, supersampling: int = SUPERSAMPLING
) -> Faces:
    """Render the face of each latent.

    Args:
        z: float [B,64], standard normal; determines the geometry.
        style_z: float [B,64]; determines colours and light. None means `z`.
        resolution: R, the side of the square image in pixels.
        supersampling: the number of subsamples along each side of a pixel.

    Returns:
        `Faces` on the device of `z`.
    """
    g = geometry(z)
    a = appearance(z if style_z is None else style_z)
    owner = owners(g, resolution, supersampling)
    colours = shading.colours(g, a, shapes.points(g, resolution, 1))
    image = torch.zeros(len(z), 3, resolution, resolution, dtype=z.dtype, device=z.device)
    areas = [torch.zeros_like(image[:, :1]) for _ in CLASS_NAMES]
    for index, layer in enumerate(shapes.LAYERS):
        area = (owner == index).to(z.dtype).mean(dim=1, keepdim=True)  # [B,1,R,R]
        image = image + area * colours[layer.name].clamp(0.0, 1.0)
        part = CLASS_NAMES.index(layer.part)
        areas[part] = areas[part] + area
    label = torch.cat(areas, dim=1).argmax(dim=1).to(torch.uint8)
    return Faces(image * 2.0 - 1.0, label, keypoints(g, resolution))


def owners(g: Geometry, resolution: int, supersampling: int) -> Tensor:
    """Return the index of the frontmost layer at each subsample, uint8 [B,S,R,R]."""
    p = shapes.points(g, resolution, supersampling)
    owner = torch.zeros_like(p.x)
    for index, layer in enumerate(shapes.LAYERS):
        owner = torch.where(layer.outline(g, p) < 0.0, float(index), owner)
    return owner.to(torch.uint8)
