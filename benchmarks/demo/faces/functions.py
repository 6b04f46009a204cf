"""Small smooth functions that scene, shapes and shading share."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor


def lerp(a: Tensor | float, b: Tensor | float, t: Tensor | float) -> Tensor:
    """Go from a to b; at least one of the three is a tensor."""
    return cast(Tensor, a + (b - a) * t)


def smoothstep(t: Tensor) -> Tensor:
    t = t.clamp(0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def gauss(t: Tensor) -> Tensor:
    """A bell of height 1. It ends at 2e-9, because processors are slow with the denormal numbers further out."""
    return torch.exp(-(t * t).clamp(max=20.0))


def squircle(x: Tensor, y: Tensor, square: Tensor | float) -> Tensor:
    """Below 1 inside; an ellipse in the unit square for `square` 0, almost the square itself for 1."""
    xx, yy = x * x, y * y
    return xx + yy - square * xx.clamp(max=1.0) * yy.clamp(max=1.0)
