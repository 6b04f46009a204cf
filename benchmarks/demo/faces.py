"""Renders the demo domain `faces`: procedural faces whose part masks are exact.

Rules of this file:
- A face is a pure function of its latents. The renderer draws no random numbers.
- Geometry comes from `z[:, :32]`, and appearance (colours, light) from `style_z[:, 32:]`. So mixing two latents
  combines the shape of one with the appearance of the other.
- z is first normalised to unit mean square, as in StyleGAN's mapping network, because the scene may depend only on
  values that a generator can see.
- Shapes are signed distances in scene units, negative inside. The image spans [-VIEW, VIEW]. A pixel belongs to the
  frontmost part that contains its centre. The same distances give the image its soft edges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Z_DIM = 64
RESOLUTION = 128
GEOMETRY_DIMS = 32
VIEW = 0.8  # half the width of the image in scene units

CLASS_NAMES = (
    "background",
    "hair",
    "neck",
    "clothes",
    "skin",
    "ear",
    "brow",
    "eye",
    "iris",
    "nose",
    "mouth",
    "lip",
)  # fmt: skip

# RGB in 0..255, one row per class, easy to distinguish by eye, also with the common forms of colour blindness.
PALETTE = (
    (32, 36, 44),
    (120, 73, 32),
    (214, 148, 112),
    (46, 110, 180),
    (250, 204, 160),
    (232, 120, 88),
    (70, 40, 90),
    (255, 255, 255),
    (20, 160, 140),
    (240, 228, 66),
    (110, 0, 30),
    (204, 60, 110),
)

KEYPOINT_NAMES = (
    "left_eye",
    "right_eye",
    "nose_tip",
    "left_mouth_corner",
    "right_mouth_corner",
    "left_ear_tip",
    "right_ear_tip",
)

# RGB in 0..255, one row per keypoint: warm colours on the left of the image, cold colours on the right.
KEYPOINT_PALETTE = (
    (230, 25, 75),
    (0, 130, 200),
    (255, 225, 25),
    (245, 130, 48),
    (70, 240, 240),
    (240, 50, 230),
    (60, 180, 75),
)

_SKIN_LIGHT = torch.tensor([0.98, 0.84, 0.73])
_SKIN_DARK = torch.tensor([0.48, 0.31, 0.22])


@dataclass(frozen=True)
class Faces:
    """A batch of rendered faces: `image` float32 [B,3,R,R] in [-1, 1], `label` uint8 [B,R,R] class ids,
    `keypoints` float32 [B,7,2] (x, y) in pixels; pixel centres are at integers."""

    image: Tensor
    label: Tensor
    keypoints: Tensor


def render(z: Tensor, style_z: Tensor | None = None, resolution: int = RESOLUTION) -> Faces:
    """Render the face of each latent.

    Args:
        z: float [B,64], standard normal; determines the geometry.
        style_z: float [B,64]; determines colours and light. None means `z`.
        resolution: R, the side of the square image in pixels.

    Returns:
        `Faces` on the device of `z`.
    """
    geometry = _Uniform(_unit_mean_square(z), 0)
    appearance = _Uniform(_unit_mean_square(z if style_z is None else style_z), GEOMETRY_DIMS)
    return _paint(geometry, appearance, resolution)


class _Uniform:
    """Converts successive Gaussian coordinates to uniform scene parameters. The order of calls defines the meaning."""

    def __init__(self, z: Tensor, first: int) -> None:
        self._z = z
        self._next = first

    def __call__(self, low: float, high: float) -> Tensor:
        u = 0.5 * (1.0 + torch.erf(self._z[:, self._next] * math.sqrt(0.5)))
        self._next += 1
        return (low + (high - low) * u)[:, None, None]  # [B,1,1]

    def colour(self, low: float, high: float) -> Tensor:
        return torch.stack([self(low, high) for _ in range(3)], dim=1)  # [B,3,1,1]


class _Canvas:
    """Paints parts from back to front, with soft edges in the image and hard edges in the label."""

    def __init__(self, background: Tensor, pixel: float) -> None:
        self.image = background  # [B,3,R,R]
        self.label = torch.zeros_like(background[:, 0], dtype=torch.uint8)  # [B,R,R]
        self._pixel = pixel

    def paint(self, name: str, distance: Tensor, colour: Tensor) -> None:
        """Paint one part: `distance` [B,R,R]; `colour` can be broadcast to [B,3,R,R]."""
        # A smoothstep over 1.5 pixels softens a sharp edge about as much as a camera's lens does.
        t = (0.5 - distance / (1.5 * self._pixel)).clamp(0.0, 1.0)
        alpha = (t * t * (3.0 - 2.0 * t)).unsqueeze(1)  # [B,1,R,R]
        self.image = self.image + alpha * (colour - self.image)
        self.label = torch.where(distance < 0.0, CLASS_NAMES.index(name), self.label)


def _paint(geo: _Uniform, app: _Uniform, resolution: int) -> Faces:
    # Geometry, in the order of the latent's coordinates.
    shift_x, shift_y = geo(-0.08, 0.08), geo(-0.06, 0.06)
    angle, yaw = geo(-0.10, 0.10), geo(-0.04, 0.04)
    half_w, half_h, jaw = geo(0.36, 0.43), geo(0.48, 0.55), geo(0.05, 0.30)
    hair_volume, hair_length, hairline = geo(0.06, 0.15), geo(-0.05, 0.80), geo(-0.36, -0.24)
    hair_arch, hair_tilt = geo(0.1, 0.8), geo(-0.25, 0.25)
    ear_size = geo(0.85, 1.2)
    eye_x, eye_y, eye_w, eye_h = geo(0.16, 0.19), geo(-0.08, -0.02), geo(0.085, 0.11), geo(0.038, 0.062)
    gaze, iris_r = geo(-0.022, 0.022), geo(0.040, 0.052)
    brow_gap, brow_tilt, brow_t = geo(0.085, 0.125), geo(-0.22, 0.12), geo(0.018, 0.030)
    nose_w, nose_y = geo(0.055, 0.085), geo(0.13, 0.18)
    mouth_y, mouth_w, smile = geo(0.27, 0.32), geo(0.13, 0.19), geo(-0.03, 0.045)
    mouth_open, lip_t = geo(0.012, 0.060), geo(0.026, 0.042)
    neck_w, shoulder, neckline = geo(0.16, 0.21), geo(0.52, 0.64), geo(0.12, 0.24)

    # Appearance.
    tone, warmth = app(0.0, 1.0), app(-0.02, 0.05)
    hair_tone, hair_red = app(0.08, 0.75), app(0.0, 0.3)
    clothes = app.colour(0.12, 0.88)
    above, below = app.colour(0.35, 0.85), app.colour(0.35, 0.85)
    iris_hue, iris_light = app(0.0, 1.0), app(0.25, 0.55)
    lip_red, lip_light = app(0.05, 0.30), app(-0.08, 0.08)
    teeth = app(0.0, 1.0)
    light_x, light_y = app(-0.22, 0.22), app(-0.16, 0.06)
    brow_dark = app(0.35, 0.8)

    pixel = 2.0 * VIEW / resolution
    axis = (torch.arange(resolution, device=tone.device, dtype=tone.dtype) + 0.5) * pixel - VIEW
    gy, gx = axis[None, :, None], axis[None, None, :]  # [1,R,1], [1,1,R]

    # The head rotates about the base of the neck. The body moves by a third of the shift.
    cos, sin = torch.cos(angle), torch.sin(angle)
    px, py = gx - shift_x, gy - shift_y - 0.45
    x = cos * px + sin * py  # [B,R,R]
    y = -sin * px + cos * py + 0.45
    fx = x - yaw  # the features of the face move over the head as it turns
    bx, by = gx - shift_x * 0.33, gy - shift_y * 0.33

    # Colours [B,3,1,1].
    skin = (
        _SKIN_LIGHT.to(tone).view(1, 3, 1, 1) * (1 - tone[:, None])
        + _SKIN_DARK.to(tone).view(1, 3, 1, 1) * tone[:, None]
    )
    skin = skin + torch.stack([warmth, 0 * warmth, -warmth], 1)
    hair = torch.stack([hair_tone * (1 + hair_red), hair_tone * 0.85, hair_tone * (0.7 - 0.6 * hair_red)], 1)
    iris = torch.stack([0.45 * (1 - iris_hue) + 0.1, 0.3 + 0.15 * iris_hue, 0.12 + 0.6 * iris_hue], 1) * (
        iris_light[:, None] + 0.45
    )
    lip = skin * (0.82 + lip_light[:, None]) + torch.stack([lip_red * 0.5, -lip_red * 0.55, -lip_red * 0.25], 1)

    light = 1.0 + (light_x * x / half_w + light_y * (y / half_h))  # [B,R,R]
    light = light.clamp(0.6, 1.35).unsqueeze(1)

    blend = (gy / (2.0 * VIEW) + 0.5).unsqueeze(1)  # [1,1,R,1]
    canvas = _Canvas((above * (1 - blend) + below * blend).expand(-1, -1, -1, resolution), pixel)

    # Hair behind the head: a cap and, for long hair, a curtain that ends at `hair_length`.
    cap = _ellipse(x, y + 0.06, half_w + hair_volume, b=half_h + hair_volume)
    curtain = torch.maximum(
        (x.abs() - half_w - hair_volume * 0.9).expand_as(y), torch.maximum(y - hair_length, -0.1 - y)
    )
    above_nape = torch.maximum(cap, y - torch.clamp(hair_length, min=0.15))
    back_hair = _smooth_union(above_nape, curtain, 0.06)
    strands = 1.0 + 0.18 * (1.0 - ((x / (half_w + hair_volume)) ** 2).clamp(max=1.5)) - 0.12 * (y + 0.3)
    hair_shaded = hair * strands.unsqueeze(1) * light
    canvas.paint("hair", back_hair, hair_shaded)

    # Body.
    neck = torch.maximum(bx.abs() - neck_w - 0.10 * (by - 0.55).clamp(min=0.0), 0.2 - by)
    chin_shadow = 1.0 - 0.28 * torch.exp(-(((y - half_h) / 0.14) ** 2))
    canvas.paint("neck", neck, skin * (0.92 * chin_shadow.unsqueeze(1)) * light)
    collar = _ellipse(bx, by - shoulder + 0.06, neck_w + 0.06, b=neckline)
    line = shoulder - 0.04 + 0.55 * bx * bx
    torso = torch.maximum((line - by) / torch.sqrt(1.0 + (1.1 * bx) ** 2), -collar)
    fold = 1.0 - 0.25 * bx * bx + 0.10 * torch.cos(7.0 * bx) * (by - 0.5)
    canvas.paint("clothes", torso, clothes * fold.unsqueeze(1))

    # Head.
    ear_x, ear_y = half_w + 0.012, -0.01
    ear = _ellipse(x.abs() - ear_x, y - ear_y, 0.062 * ear_size, b=0.105 * ear_size)
    ear_hollow = 1.0 - 0.25 * torch.exp(-(((x.abs() - ear_x - 0.012) / 0.03) ** 2) - ((y - ear_y) / 0.06) ** 2)
    canvas.paint(
        "ear", ear, skin * torch.tensor([0.97, 0.86, 0.84]).to(skin).view(1, 3, 1, 1) * ear_hollow.unsqueeze(1) * light
    )
    taper = 1.0 - jaw * _smoothstep(y / half_h)
    face = _ellipse(x / taper, y, half_w, b=half_h)
    cheek = torch.exp(-(((fx.abs() - 0.22) / 0.12) ** 2) - ((y - 0.16) / 0.12) ** 2)
    socket = torch.exp(-(((fx.abs() - eye_x) / 0.15) ** 2) - ((y - eye_y + 0.015) / 0.09) ** 2)
    rim = 1.0 - 0.22 * torch.exp(face.clamp(max=0.0) / 0.07)
    flush = torch.stack([1.0 + 0.02 * cheek, 1.0 - 0.08 * cheek, 1.0 - 0.06 * cheek], 1)
    skin_shaded = skin * flush * (rim * (1.0 - 0.16 * socket)).unsqueeze(1) * light
    canvas.paint("skin", face, skin_shaded)

    # Features, mirrored by |x| where the face is symmetric.
    side = torch.sign(fx)
    ex, ey = fx.abs() - eye_x, y - eye_y
    arch = 1.0 - (ex / eye_w) ** 2
    lid = (ey.abs() - eye_h * arch) / torch.sqrt(1.0 + (2.0 * eye_h * ex / eye_w**2) ** 2)
    canvas.paint("eye", lid, torch.full_like(skin, 0.95) * (0.92 + 0.08 * light))
    gx_iris = ex - side * gaze  # both eyes look the same way
    iris_d = torch.maximum(torch.sqrt(gx_iris**2 + (ey + 0.004) ** 2 + 1e-9) - iris_r, lid)
    pupil = torch.sigmoid((iris_r * 0.42 - torch.sqrt(gx_iris**2 + (ey + 0.004) ** 2 + 1e-9)) / (0.5 * pixel + 0.004))
    canvas.paint("iris", iris_d, iris * (1.0 - 0.85 * pupil.unsqueeze(1)))

    bow_y = y - eye_y + brow_gap + brow_tilt * ex + 1.6 * ex * ex
    brow_len = 0.115
    brow = torch.maximum(bow_y.abs() - brow_t * (1.05 - (ex / 0.16) ** 2), ex.abs() - brow_len)
    canvas.paint("brow", brow, (hair * 0.6) * brow_dark[:, None] + 0.02)

    along = ((y + 0.02) / (nose_y + 0.02)).clamp(0.0, 1.0)
    bridge = nose_w * (0.38 + 0.62 * along * along)
    ball = _ellipse(fx, y - nose_y + 0.012, nose_w, b=0.045)
    ridge = torch.maximum(fx.abs() - bridge, torch.maximum(-0.02 - y, y - nose_y))
    nose = _smooth_union(ridge, ball, 0.02)
    nostril = torch.exp(-(((fx.abs() - nose_w * 0.5) / 0.02) ** 2) - ((y - nose_y - 0.012) / 0.016) ** 2)
    glow = torch.exp(-((fx / 0.022) ** 2)) * along
    nose_light = 0.90 + 0.16 * glow - 0.55 * nostril + light_x * fx / nose_w * 0.35
    canvas.paint(
        "nose", nose, skin * torch.tensor([1.0, 0.93, 0.91]).to(skin).view(1, 3, 1, 1) * nose_light.unsqueeze(1) * light
    )

    mx = fx / mouth_w
    my = y - mouth_y + smile * (mx * mx - 0.4)
    outer = (my.abs() - (mouth_open + lip_t) * (1.0 - mx * mx)) * 0.92
    cupid = 1.0 + 0.10 * torch.sign(my) - 0.15 * torch.exp(-((my / 0.012) ** 2))
    canvas.paint("lip", outer, lip * cupid.unsqueeze(1) * light)
    inner = (my.abs() - mouth_open * (1.0 - (mx * 1.12) ** 2)) * 0.92
    upper = torch.sigmoid(-(my + 0.1 * mouth_open) / 0.012)
    dark = torch.tensor([0.30, 0.07, 0.09]).to(skin).view(1, 3, 1, 1)
    bright = torch.tensor([0.92, 0.90, 0.86]).to(skin).view(1, 3, 1, 1)
    show = (upper * teeth).unsqueeze(1)
    canvas.paint("mouth", inner, dark * (1 - show) + bright * show)

    # Fringe over the forehead.
    fringe_line = y - hairline - hair_tilt * x - hair_arch * x * x
    fringe = torch.maximum(_ellipse(x, y + 0.06, half_w + hair_volume, b=half_h + hair_volume), fringe_line * 0.9)
    canvas.paint("hair", fringe, hair_shaded * (1.0 - 0.12 * torch.exp(-((fringe_line / 0.05) ** 2))).unsqueeze(1))

    keypoints = _keypoints(
        (angle, shift_x, shift_y),
        yaw,
        eye_x,
        eye_y=eye_y,
        nose_y=nose_y,
        mouth_y=mouth_y,
        mouth_w=mouth_w,
        smile=smile,
        ear_x=ear_x,
        ear_y=ear_y,
        ear_size=ear_size,
        resolution=resolution,
    )
    return Faces(canvas.image.clamp(0.0, 1.0) * 2.0 - 1.0, canvas.label, keypoints)


def _keypoints(
    pose: tuple[Tensor, Tensor, Tensor],
    yaw: Tensor,
    eye_x: Tensor,
    *,
    eye_y: Tensor,
    nose_y: Tensor,
    mouth_y: Tensor,
    mouth_w: Tensor,
    smile: Tensor,
    ear_x: Tensor,
    ear_y: float,
    ear_size: Tensor,
    resolution: int,
) -> Tensor:
    """Return the named points in pixels, float32 [B,7,2]: head coordinates, transformed by the head's pose."""
    corner_y = mouth_y - 0.6 * smile
    tip_y = ear_y - 0.105 * ear_size
    head = [
        (yaw - eye_x, eye_y),
        (yaw + eye_x, eye_y),
        (yaw, nose_y),
        (yaw - mouth_w, corner_y),
        (yaw + mouth_w, corner_y),
        (-ear_x, tip_y),
        (ear_x, tip_y),
    ]
    angle, shift_x, shift_y = pose
    cos, sin = torch.cos(angle), torch.sin(angle)
    points = []
    for hx, hy in head:
        dy = hy - 0.45
        points.append(
            torch.cat([(cos * hx - sin * dy + shift_x)[:, 0], (sin * hx + cos * dy + shift_y + 0.45)[:, 0]], 1)
        )
    units = torch.stack(points, 1)  # [B,7,2] in scene units
    return (units + VIEW) * (resolution / (2.0 * VIEW)) - 0.5


def _unit_mean_square(z: Tensor) -> Tensor:
    return z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + 1e-8)


def _ellipse(x: Tensor, y: Tensor, a: Tensor | float, *, b: Tensor | float) -> Tensor:
    """First-order signed distance to the ellipse with the half axes a and b; exact on the outline."""
    r = torch.sqrt((x / a) ** 2 + (y / b) ** 2 + 1e-9)
    slope = torch.sqrt((x / (a * a)) ** 2 + (y / (b * b)) ** 2 + 1e-9)
    return r * (r - 1.0) / slope


def _smooth_union(a: Tensor, b: Tensor, width: float) -> Tensor:
    h = (0.5 + 0.5 * (b - a) / width).clamp(0.0, 1.0)
    return b + (a - b) * h - width * h * (1.0 - h)


def _smoothstep(t: Tensor) -> Tensor:
    t = t.clamp(0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)
