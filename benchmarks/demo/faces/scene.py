"""Reads the parameters of a scene from a latent: `Geometry` from z[:32], `Appearance` from z[32:].

Rules of this file:
- Each parameter is a smooth function of few coordinates. Nothing appears at a threshold: a rare part grows from nothing
  within a narrow band of its coordinate.
- The tail of one coordinate decides on each rare part. The beard's coordinate, `masculine`, also sets what often comes
  with a beard: jaw, brows, lips and the length of the hair.
- Parameters have the shape [B,1,1,1] and colours [B,3,1,1], so they can be broadcast to [B,S,R,R].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from demo.faces.classes import GEOMETRY_DIMS
from demo.faces.functions import lerp, smoothstep


class _Latent:
    """The coordinates of a latent from `first` on, read as numbers with a uniform distribution or as a tail."""

    def __init__(self, z: Tensor, first: int) -> None:
        z = z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + 1e-8)
        self._z = z[:, first : first + GEOMETRY_DIMS, None, None, None]  # [B,32,1,1,1]

    def normal(self, index: int) -> Tensor:
        return self._z[:, index]

    def uniform(self, index: int, low: float, high: float) -> Tensor:
        return low + (high - low) * 0.5 * (1.0 + torch.erf(self._z[:, index] * math.sqrt(0.5)))

    def tail(self, index: int, start: float, end: float) -> Tensor:
        """0 up to `start` standard deviations, 1 from `end` on; `start` may be the larger one."""
        return smoothstep((self._z[:, index] - start) / (end - start))


@dataclass(frozen=True)
class Geometry:
    """Where everything is, in scene units. Each field is float32 [B,1,1,1]."""

    shift_x: Tensor
    shift_y: Tensor
    tilt_sin: Tensor
    tilt_cos: Tensor
    yaw_sin: Tensor
    yaw_cos: Tensor
    face_w: Tensor
    face_h: Tensor
    jaw: Tensor
    square: Tensor
    masculine: Tensor
    beard: Tensor
    beard_length: Tensor
    hair_volume: Tensor
    hair_length: Tensor
    curl: Tensor
    bald: Tensor
    hairline: Tensor
    parting: Tensor
    bun: Tensor
    tails: Tensor
    eye_x: Tensor
    eye_w: Tensor
    eye_h: Tensor
    eye_slant: Tensor
    eye_open: Tensor
    gaze: Tensor
    iris_r: Tensor
    brow_gap: Tensor
    brow_tilt: Tensor
    brow_arch: Tensor
    brow_t: Tensor
    nose_w: Tensor
    nose_y: Tensor
    mouth_y: Tensor
    mouth_w: Tensor
    smile: Tensor
    mouth_open: Tensor
    lip_t: Tensor
    glasses: Tensor
    glasses_square: Tensor
    hat: Tensor
    brim: Tensor
    earring: Tensor
    neck_w: Tensor
    shoulder: Tensor
    neckline: Tensor
    stripes_x: Tensor
    stripes_y: Tensor
    panel_x: Tensor
    ball_x: Tensor


def geometry(z: Tensor) -> Geometry:
    """Read where everything is from z[:32]."""
    g = _Latent(z, 0)
    return _stored(Geometry(**_head(g), **_hair(g), **_eyes(g), **_mouth(g), **_rest(g)))


def _head(g: _Latent) -> dict[str, Tensor]:
    """Pose, outline of the face, nose, beard and body."""
    tilt, yaw = g.uniform(2, -0.17, 0.17), g.uniform(3, -0.36, 0.36)
    masculine = g.uniform(6, 0.0, 1.0)
    return {
        "shift_x": g.uniform(0, -0.11, 0.11),
        "shift_y": g.uniform(1, -0.04, 0.08),
        "tilt_sin": torch.sin(tilt),
        "tilt_cos": torch.cos(tilt),
        "yaw_sin": torch.sin(yaw),
        "yaw_cos": torch.cos(yaw),
        "face_w": g.uniform(4, 0.325, 0.385) + 0.015 * masculine,
        "face_h": g.uniform(5, 0.435, 0.495),
        "jaw": g.uniform(7, 0.10, 0.30) - 0.08 * masculine,
        "square": g.uniform(7, 0.55, 0.25) + 0.30 * masculine,
        "masculine": masculine,
        "beard": g.tail(6, 1.12, 1.47),
        "beard_length": 0.02 + 0.16 * g.tail(6, 1.27, 2.6),
        "nose_w": g.uniform(21, 0.046, 0.076),
        "nose_y": g.uniform(22, 0.115, 0.165),
        "neck_w": 0.115 + 0.045 * masculine,
        "shoulder": g.uniform(29, 0.56, 0.64),
        "neckline": g.uniform(29, 0.10, 0.26),
    }


def _hair(g: _Latent) -> dict[str, Tensor]:
    """Hair and hat. A hat presses the hair down. Loose hair is short or long; tied hair leaves the ears free."""
    bald, hat = g.tail(11, 1.15, 1.75), g.tail(27, 1.49, 1.67)
    loose = (1.0 - g.tail(14, 0.7, 1.1)) * (1.0 - g.tail(14, -0.8, -1.2)) * (1.0 - bald)
    # A sum of two coordinates, scaled to unit variance and then to a uniform distribution.
    length = 0.5 * (1.0 + torch.erf((g.normal(8) - 0.75 * g.normal(6)) * (0.8 * math.sqrt(0.5))))
    curly = g.tail(9, 0.4, 1.4)
    return {
        "hair_volume": lerp(g.uniform(10, 0.035, 0.13) + 0.05 * curly, -0.02, bald) * (1.0 - 0.6 * hat),
        "hair_length": lerp(0.02, lerp(0.13 * length - 0.04, 0.92, smoothstep((length - 0.42) / 0.53)), loose),
        "curl": 0.17 * curly * (1.0 - bald) * (1.0 - 0.7 * hat),
        "bald": bald,
        "hairline": g.uniform(12, -0.34, -0.155),
        "parting": g.uniform(13, -0.40, 0.40),
        "bun": g.tail(14, 0.95, 1.25) * (1.0 - hat) * (1.0 - bald),
        "tails": g.tail(14, -1.05, -1.35) * (1.0 - bald),
        "hat": hat,
        "brim": g.tail(30, -0.2, 0.6),
    }


def _eyes(g: _Latent) -> dict[str, Tensor]:
    """Eyes and brows; a smile narrows the eyes."""
    size, lids, raised = g.uniform(15, 0.0, 1.0), g.uniform(16, 0.0, 1.0), g.uniform(19, -1.0, 1.0)
    return {
        "eye_x": g.uniform(4, 0.150, 0.178),
        "eye_w": 0.080 + 0.022 * size,
        "eye_h": 0.048 + 0.018 * size,
        "eye_slant": g.uniform(18, -0.10, 0.14),
        "eye_open": smoothstep((lids - 0.02) / 0.15) * (0.94 + 0.08 * raised - 0.14 * g.uniform(23, -0.15, 1.05)),
        "gaze": g.uniform(17, -0.026, 0.026),
        "iris_r": 0.041 + 0.009 * size,
        "brow_gap": 0.098 + 0.030 * raised + 0.014 * raised.clamp(min=0.0),
        "brow_tilt": g.uniform(20, -0.10, 0.16) - 0.22 * raised.clamp(max=0.0),
        "brow_arch": 1.8 + 1.0 * raised,
        "brow_t": 0.013 + 0.010 * g.uniform(6, 0.0, 1.0) + g.uniform(20, 0.0, 0.006),
    }


def _mouth(g: _Latent) -> dict[str, Tensor]:
    smile = g.uniform(23, -0.15, 1.05)
    return {
        "mouth_y": g.uniform(22, 0.245, 0.285),
        "mouth_w": g.uniform(25, 0.105, 0.145) + 0.030 * smile,
        "smile": 0.070 * smile,
        "mouth_open": 0.085 * g.tail(24, -0.2, 1.6),
        "lip_t": g.uniform(25, 0.036, 0.024) - 0.006 * g.uniform(6, 0.0, 1.0),
    }


def _rest(g: _Latent) -> dict[str, Tensor]:
    """Glasses, earrings and what is behind the head."""
    stripes = g.uniform(9, -0.25, 0.25)
    return {
        "glasses": g.tail(26, 1.26, 1.42),
        "glasses_square": g.uniform(30, 0.0, 0.95),
        "earring": g.tail(28, 1.46, 1.64),
        "stripes_x": torch.cos(stripes),
        "stripes_y": torch.sin(stripes),
        "panel_x": g.uniform(31, -1.15, 1.15),
        "ball_x": g.uniform(31, 1.3, -0.8),
    }


_SKIN = ((0.99, 0.86, 0.77), (0.95, 0.76, 0.62), (0.83, 0.61, 0.45), (0.64, 0.43, 0.30), (0.40, 0.26, 0.19))
_HAIR = (
    (0.09, 0.08, 0.09),
    (0.20, 0.13, 0.10),
    (0.36, 0.22, 0.14),
    (0.55, 0.27, 0.13),
    (0.66, 0.48, 0.29),
    (0.88, 0.72, 0.47),
    (0.80, 0.79, 0.78),
)
_IRIS = ((0.24, 0.14, 0.08), (0.42, 0.26, 0.12), (0.40, 0.46, 0.22), (0.28, 0.52, 0.66), (0.45, 0.58, 0.70))
_FRAMES = ((0.13, 0.12, 0.14), (0.45, 0.22, 0.12), (0.72, 0.18, 0.22), (0.86, 0.70, 0.30), (0.85, 0.86, 0.90))
_EARRINGS = ((0.88, 0.70, 0.28), (0.90, 0.91, 0.95), (0.20, 0.62, 0.66), (0.86, 0.24, 0.34))


@dataclass(frozen=True)
class Appearance:
    """Colours float32 [B,3,1,1], and numbers float32 [B,1,1,1]."""

    skin: Tensor
    hair: Tensor
    beard: Tensor
    brow: Tensor
    iris: Tensor
    lip: Tensor
    clothes: Tensor
    clothes_second: Tensor
    wall_above: Tensor
    wall_below: Tensor
    stripes: Tensor
    panel: Tensor
    ball: Tensor
    hat: Tensor
    glasses: Tensor
    tint: Tensor
    earring: Tensor
    blush: Tensor
    freckles: Tensor
    eyeshadow: Tensor  # a factor of the skin's colour
    light_x: Tensor
    light_y: Tensor


def appearance(z: Tensor) -> Appearance:
    """Read colours and light from z[32:]."""
    a = _Latent(z, GEOMETRY_DIMS)
    return _stored(Appearance(**_person(a), **_worn(a), **_surroundings(a)))


def _person(a: _Latent) -> dict[str, Tensor]:
    """Colours of skin, hair, iris and lips; some hair is dyed, some lips and lids are painted."""
    skin = _along(_SKIN, a.uniform(0, 0.0, 1.0)) * _warmth(a.uniform(1, -0.035, 0.035))
    natural = _along(_HAIR, a.uniform(2, 0.0, 1.0))
    hair = lerp(natural, _colour(a.uniform(3, 0.55, 1.25), 0.75, a.uniform(2, 0.38, 0.62)), a.tail(4, 1.2, 1.6))
    red = a.uniform(19, 0.0, 1.0)
    bare, painted = skin * _rgb(skin, 0.86, 0.66, 0.66), _rgb(skin, 0.78, 0.16, 0.24)
    eyeshadow = _colour(a.uniform(3, 0.0, 0.9), 0.5, 0.62)
    return {
        "skin": skin,
        "hair": hair,
        "beard": hair * a.uniform(28, 0.72, 1.12),
        "brow": lerp(natural, hair, 0.35) * a.uniform(29, 0.40, 0.72) + 0.02,
        "iris": _along(_IRIS, a.uniform(17, 0.0, 1.0)),
        "lip": lerp(bare, painted, 0.75 * red * red) + 0.6 * a.uniform(20, -0.10, 0.06),
        "blush": a.uniform(30, 0.05, 0.24),
        "freckles": a.tail(31, 0.6, 1.6),
        "eyeshadow": lerp(_rgb(skin, 0.92, 0.86, 0.84), eyeshadow, 0.8 * a.tail(5, 0.5, 1.5)),
    }


def _worn(a: _Latent) -> dict[str, Tensor]:
    """Colours of clothes, hat, glasses and earrings; many hats have a colour of hair."""
    clothes = _colour(a.uniform(6, 0.0, 0.95), a.uniform(7, 0.15, 0.8), a.uniform(8, 0.22, 0.75))
    second = _colour(a.uniform(6, 0.25, 1.2), 0.35, a.uniform(8, 0.80, 0.45))
    hat = _colour(a.uniform(23, 0.0, 0.95), 0.55, a.uniform(24, 0.22, 0.65))
    return {
        "clothes": clothes,
        "clothes_second": lerp(clothes, second, a.tail(9, 0.0, 0.9)),
        "hat": lerp(hat, 1.1 * _along(_HAIR, a.uniform(2, 0.0, 1.0)), a.tail(24, 0.3, -0.9)),
        "glasses": _along(_FRAMES, a.uniform(25, 0.0, 1.0)),
        "tint": a.uniform(26, 0.04, 0.30),
        "earring": _along(_EARRINGS, a.uniform(27, 0.0, 1.0)),
    }


def _surroundings(a: _Latent) -> dict[str, Tensor]:
    """Colours of the background, and the light; now and then the wall has a colour of skin."""
    wall = _colour(a.uniform(10, 0.0, 0.95), a.uniform(11, 0.10, 0.65), a.uniform(12, 0.35, 0.80))
    wall = lerp(wall, _along(_SKIN, a.uniform(13, 0.0, 1.0)), a.tail(14, 1.0, 1.5))
    return {
        "wall_above": wall * 1.06,
        "wall_below": wall * a.uniform(15, 0.66, 0.98),
        "stripes": 0.13 * a.tail(16, -0.2, 1.2),
        "panel": _colour(a.uniform(10, 0.45, 1.4), a.uniform(15, 0.5, 0.2), a.uniform(18, 0.25, 0.85)),
        "ball": _colour(a.uniform(18, 0.1, 1.0), 0.5, a.uniform(13, 0.30, 0.75)),
        "light_x": a.uniform(21, -0.75, 0.75),
        "light_y": a.uniform(22, -0.75, -0.25),
    }


_Scene = TypeVar("_Scene", Geometry, Appearance)


def _stored(scene: _Scene) -> _Scene:
    """Write all parameters to one tensor, because `torch.compile` would compute them anew at each point."""
    values = [getattr(scene, field.name) for field in fields(scene)]
    table = torch.cat(values, dim=1)  # [B,P,1,1]
    return type(scene)(*table.split([value.shape[1] for value in values], dim=1))


def _rgb(like: Tensor, red: float, green: float, blue: float) -> Tensor:
    return torch.tensor([red, green, blue], dtype=like.dtype, device=like.device).view(1, 3, 1, 1)


def _warmth(amount: Tensor) -> Tensor:
    return torch.cat([1.0 + amount, 1.0 + 0.0 * amount, 1.0 - amount], dim=1)  # [B,3,1,1]


def _along(stops: tuple[tuple[float, float, float], ...], u: Tensor) -> Tensor:
    """Interpolate linearly between colours at equal distances, at u in [0,1]."""
    position = u * (len(stops) - 1)
    return sum(_rgb(u, *stop) * (1.0 - (position - k).abs()).clamp(min=0.0) for k, stop in enumerate(stops))  # type: ignore[return-value]


def _colour(hue: Tensor, saturation: Tensor | float, lightness: Tensor | float) -> Tensor:
    """A smooth version of hue, saturation and lightness."""
    wave = torch.cos(2.0 * math.pi * (hue - _rgb(hue, 0.0, 1.0 / 3.0, 2.0 / 3.0)))
    low = torch.minimum(torch.as_tensor(lightness), torch.as_tensor(1.0 - lightness))
    return lightness + saturation * low * wave
