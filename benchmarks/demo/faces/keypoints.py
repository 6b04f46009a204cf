"""The named points of a face in pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from demo.faces.classes import VIEW
from demo.faces.scene import Geometry
from demo.faces.shapes import DEPTH, EAR_Y, NECK_Y


def keypoints(g: Geometry, resolution: int) -> Tensor:
    """Return the points of `KEYPOINT_NAMES`, float32 [B,7,2] as (x, y); pixel centres are at integers."""
    sin, cos = g.yaw_sin, g.yaw_cos

    def turned(fx: Tensor) -> Tensor:
        """The inverse of `Points.fx`."""
        return fx * cos + torch.sqrt((DEPTH * DEPTH - fx * fx).clamp(min=0.01)) * sin

    corner = g.mouth_y - 0.6 * g.smile
    ear_x, ear_y = 0.07 * sin, EAR_Y - 0.095 + 0.0 * sin  # zero times sin gives the constant the shape [B,1,1,1]
    head = (
        (turned(-g.eye_x), 0.0 * sin),
        (turned(g.eye_x), 0.0 * sin),
        (turned(0.10 * sin), g.nose_y),
        (turned(-g.mouth_w), corner),
        (turned(g.mouth_w), corner),
        (-g.face_w - ear_x, ear_y),
        (g.face_w - ear_x, ear_y),
    )
    x = torch.cat([x for x, _ in head], dim=1)[..., 0, 0]  # [B,7] in the coordinates of the head
    y = torch.cat([y for _, y in head], dim=1)[..., 0, 0] - NECK_Y
    tilt_sin, tilt_cos = g.tilt_sin[..., 0, 0], g.tilt_cos[..., 0, 0]  # [B,1]
    gx = tilt_cos * x - tilt_sin * y + g.shift_x[..., 0, 0]
    gy = tilt_sin * x + tilt_cos * y + g.shift_y[..., 0, 0] + NECK_Y
    return (torch.stack([gx, gy], dim=2) + VIEW) * (resolution / (2.0 * VIEW)) - 0.5
