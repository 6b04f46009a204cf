"""The outlines of all layers of a face: functions of the coordinates that are negative inside.

Rules of this file:
- `LAYERS`, at the end, lists the layers from back to front. The frontmost layer that contains a point owns it.
- Outlines work at any points: at the subsamples for the masks, and at the centres of the pixels for shadows.
- The face turns as a cylinder does: `fx` is the coordinate across the unrolled, frontal face.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from demo.faces.classes import VIEW
from demo.faces.functions import lerp, smoothstep, squircle
from demo.faces.scene import Geometry

NECK_Y = 0.45  # the head tilts about this point
DEPTH = 0.50  # radius of the cylinder that the features of the face lie on
EAR_Y = 0.0


@dataclass(frozen=True)
class Points:
    """The same points in the coordinates of the image, of the body, of the head and of the frontal face."""

    gx: Tensor
    gy: Tensor
    bx: Tensor
    by: Tensor
    x: Tensor
    y: Tensor
    fx: Tensor


def points(g: Geometry, resolution: int, supersampling: int) -> Points:
    """Return the points of all pixels, [B,S,R,R] where S is the square of `supersampling`."""
    pixel = torch.arange(resolution, device=g.tilt_sin.device)
    sub = torch.arange(supersampling * supersampling, device=g.tilt_sin.device)[None, :, None, None]
    unit = 2.0 * VIEW / (resolution * supersampling)
    gx = (pixel * supersampling + sub % supersampling + 0.5) * unit - VIEW  # [1,S,1,R]
    gy = (pixel[:, None] * supersampling + sub // supersampling + 0.5) * unit - VIEW  # [1,S,R,1]
    px, py = gx - g.shift_x, gy - g.shift_y - NECK_Y
    x = g.tilt_cos * px + g.tilt_sin * py
    y = g.tilt_cos * py - g.tilt_sin * px + NECK_Y
    fx = x * g.yaw_cos - torch.sqrt((DEPTH * DEPTH - x * x).clamp(min=0.01)) * g.yaw_sin
    return Points(gx, gy, gx - 0.4 * g.shift_x, gy - 0.4 * g.shift_y, x, y, fx)


def panel(g: Geometry, p: Points) -> Tensor:
    return squircle((p.gx - g.panel_x) / 0.24, (p.gy + 0.34) / 0.30, 0.96) - 1.0


def ball(g: Geometry, p: Points) -> Tensor:
    return squircle((p.gx - g.ball_x) / 0.22, (p.gy - 0.02) / 0.22, 0.0) - 1.0


def cap(g: Geometry, p: Points) -> Tensor:
    """The outline of the hair around the skull, with curls."""
    x = (p.x + 0.10 * g.yaw_sin) / (g.face_w + g.hair_volume)
    y = (p.y + 0.055 * (1.0 - g.bald)) / (g.face_h + g.hair_volume)
    return squircle(x, y, 0.15) - 1.0 + g.curl * curls(p)


def curls(p: Points) -> Tensor:
    return torch.sin(29.0 * p.x + 0.6) * torch.sin(29.0 * p.y)


def back_hair(g: Geometry, p: Points) -> Tensor:
    around = torch.maximum(cap(g, p), p.y - g.hair_length.clamp(min=0.14))
    top = -0.02 - g.face_h - g.hair_volume - 0.08 * g.bun
    bun_r = 0.01 + 0.125 * g.bun
    bun = ((p.x + 0.12 * g.yaw_sin) ** 2 + (p.y - top) ** 2) / (bun_r * bun_r) - 1.0 + g.curl * curls(p)
    return torch.minimum(torch.minimum(around, curtain(g, p)), torch.minimum(bun, pigtails(g, p)))


def curtain(g: Geometry, p: Points) -> Tensor:
    """Long hair beside and behind the neck."""
    x = (p.x + 0.08 * g.yaw_sin).abs()
    width = g.face_w + 0.85 * g.hair_volume + 0.04 * p.y + 0.15 * g.curl * curls(p)
    return torch.maximum(x - width, torch.maximum(p.y - g.hair_length + 0.5 * x * x, -0.10 - p.y))


def pigtails(g: Geometry, p: Points) -> Tensor:
    """They grow from behind the ears outwards and down."""
    x = (p.x + 0.08 * g.yaw_sin).abs() - lerp(0.20, g.face_w + 0.10, g.tails)
    y = p.y - lerp(0.0, 0.24, g.tails)
    return (x - 0.10 * y) ** 2 / 0.0105 + y * y / (0.01 + 0.075 * g.tails) - 1.0 + g.curl * curls(p)


def locks(g: Geometry, p: Points) -> Tensor:
    """The part of long hair that falls over ears, neck and clothes."""
    x = (p.x + 0.08 * g.yaw_sin).abs()
    return torch.maximum(curtain(g, p), torch.maximum(0.80 * g.face_w - x, 0.10 - g.hair_length))


def hairline(g: Geometry, p: Points) -> Tensor:
    """Negative above the line from one ear over the forehead to the other; it recedes over the crown with age."""
    centre = lerp(g.hairline, -0.80, smoothstep(1.6 * g.bald))
    side = lerp(0.02, -0.85, smoothstep(2.0 * g.bald - 0.8))
    bend = (side - centre) / (g.face_w * g.face_w)
    line = centre + bend * p.fx * p.fx + g.parting * p.fx * (1.0 - p.fx * p.fx / (g.face_w * g.face_w))
    return p.y - line + 0.12 * g.curl * curls(p)


def front_hair(g: Geometry, p: Points) -> Tensor:
    ears = p.y - (g.hair_length - 0.04).clamp(max=0.14) + 0.7 * (g.face_w - p.x.abs()).clamp(min=0.0)
    return torch.maximum(cap(g, p), torch.maximum(hairline(g, p), ears))


def neck(g: Geometry, p: Points) -> Tensor:
    return torch.maximum(p.bx.abs() - g.neck_w - 0.6 * (p.by - 0.52).clamp(min=0.0) ** 2 - 0.02, 0.2 - p.by)


def collar(g: Geometry, p: Points) -> Tensor:
    """Negative inside the band along the neckline."""
    hole = _neckline(g, p)
    return torch.maximum(hole - 0.30, clothes(g, p))


def clothes(g: Geometry, p: Points) -> Tensor:
    shoulders = g.shoulder - 0.05 + 0.20 * p.bx * p.bx + 1.1 * p.bx**4
    return torch.maximum(shoulders - p.by, -_neckline(g, p))


def _neckline(g: Geometry, p: Points) -> Tensor:
    return squircle(p.bx / (g.neck_w + 0.055), (p.by - g.shoulder + 0.07) / g.neckline, 0.0) - 1.0


def ear_x(g: Geometry, p: Points) -> Tensor:
    """Return the distance outwards from the edge of the face; it is equal for both ears."""
    return (p.x + 0.07 * g.yaw_sin).abs() - g.face_w


def ear(g: Geometry, p: Points) -> Tensor:
    return squircle(ear_x(g, p) / 0.060, (p.y - EAR_Y) / 0.095, 0.0) - 1.0


def earring(g: Geometry, p: Points) -> Tensor:
    radius = 0.001 + 0.040 * g.earring
    x = ear_x(g, p) - 0.012
    y = p.y - EAR_Y - 0.09 - radius
    return (x * x + 0.7 * y * y) / (radius * radius) - 1.0


def face(g: Geometry, p: Points) -> Tensor:
    taper = 1.0 - g.jaw * smoothstep(p.y / g.face_h)
    return squircle(p.x / (taper * g.face_w), p.y / g.face_h, g.square * (p.y > 0)) - 1.0


def beard(g: Geometry, p: Points) -> Tensor:
    """A goatee that grows up the jaw to the ears and down over the neck, and a moustache."""
    over = g.beard_length * g.beard
    chin = squircle((p.x + 0.3 * p.fx) / 1.3 / (0.80 * g.face_w), (p.y - 0.22) / (g.face_h - 0.215 + over), 0.2) - 1.0
    jaw = torch.minimum(face(g, p), chin)
    line = lerp(g.face_h + 0.06, g.mouth_y + 0.055, g.beard) - 2.5 * g.beard * p.fx * p.fx
    line = line.clamp(min=0.02)
    middle = 0.45 * g.nose_y + 0.55 * g.mouth_y
    bow = p.y - middle - 0.012 - 1.2 * p.fx * p.fx
    thick = 0.034 * (1.6 * g.beard - 0.6).clamp(min=0.0)
    moustache = torch.maximum(bow.abs() - thick * (1.0 - (p.fx / (g.mouth_w + 0.02)) ** 2), p.fx.abs() - g.mouth_w)
    return torch.minimum(torch.maximum(jaw, line - p.y), moustache)


def _eye(g: Geometry, p: Points) -> tuple[Tensor, Tensor, Tensor]:
    """Return the coordinates of the eyes' outlines, x outwards and y, and the arch of the lids, 1 in the middle."""
    ex = p.fx.abs() - g.eye_x
    ey = p.y + g.eye_slant * ex
    return ex, ey, 1.0 - (ex / g.eye_w) ** 2


def upper_lid(g: Geometry) -> Tensor:
    """Height of the upper lid's middle: it comes down to the lower lid when the eye closes."""
    return g.eye_h * (1.6 * g.eye_open - 0.6)


def lid(g: Geometry, p: Points) -> Tensor:
    _, ey, arch = _eye(g, p)
    return torch.maximum(-ey - (1.22 * g.eye_h + 0.008) * arch - 0.004, ey - 0.6 * g.eye_h * arch)


def eye(g: Geometry, p: Points) -> Tensor:
    ex, ey, arch = _eye(g, p)
    opening = torch.maximum(-ey - upper_lid(g) * arch, ey - 0.6 * g.eye_h * arch)
    return torch.maximum(opening, ex.abs() - g.eye_w)


def iris(g: Geometry, p: Points) -> Tensor:
    return torch.maximum(_gaze(g, p) - g.iris_r**2, eye(g, p))


def pupil(g: Geometry, p: Points) -> Tensor:
    return torch.maximum(_gaze(g, p) - (0.46 * g.iris_r) ** 2, eye(g, p))


def _gaze(g: Geometry, p: Points) -> Tensor:
    """Squared distance to the middle of the iris; both eyes look the same way."""
    ex, ey, _ = _eye(g, p)
    x, y = ex - torch.sign(p.fx) * g.gaze, ey + 0.12 * g.eye_h
    return x * x + y * y


def glint(g: Geometry, p: Points) -> Tensor:
    ex, ey, _ = _eye(g, p)
    side = torch.sign(p.fx)
    x, y = ex * side - g.gaze + 0.016, ey + 0.12 * g.eye_h + 0.016
    return torch.maximum(x * x + y * y - 0.013**2, eye(g, p))


def lash(g: Geometry, p: Points) -> Tensor:
    ex, ey, arch = _eye(g, p)
    edge = ey + upper_lid(g) * arch
    return torch.maximum((edge + 0.006).abs() - 0.011 - 0.003 * (1.0 - g.masculine), ex.abs() - 1.04 * g.eye_w)


def brow(g: Geometry, p: Points) -> Tensor:
    ex = p.fx.abs() - g.eye_x
    y = p.y + g.eye_h + 0.9 * g.brow_gap - 0.04 + g.brow_tilt * (ex - 0.02) - g.brow_arch * ex * ex
    return torch.maximum(y.abs() - g.brow_t * (1.10 - 3.2 * ex - 40.0 * ex * ex * (ex > 0)), (ex - 0.005).abs() - 0.105)


def nose_x(g: Geometry, p: Points) -> Tensor:
    """Return the coordinate across the nose, whose tip moves with the turn of the head."""
    return p.fx - 0.10 * g.yaw_sin * smoothstep((p.y + 0.02) / (g.nose_y + 0.02))


def nose(g: Geometry, p: Points) -> Tensor:
    x = nose_x(g, p)
    along = ((p.y + 0.03) / (g.nose_y + 0.03)).clamp(0.0, 1.0)
    ridge = torch.maximum(
        x.abs() - g.nose_w * (0.34 + 0.36 * along * along), torch.maximum(-0.03 - p.y, p.y - g.nose_y)
    )
    ball = squircle(x / g.nose_w, (p.y - g.nose_y + 0.012) / 0.042, 0.2) - 1.0
    return torch.minimum(ridge, ball)


def nostril(g: Geometry, p: Points) -> Tensor:
    x = (p.fx - 0.10 * g.yaw_sin).abs() - 0.48 * g.nose_w
    return squircle(x / 0.017, (p.y - g.nose_y - 0.013) / 0.011, 0.0) - 1.0


def mouth_line(g: Geometry, p: Points) -> tuple[Tensor, Tensor]:
    """Return the height below the line between the lips, and the opening's profile, 1 in the middle."""
    mx = p.fx / g.mouth_w
    xx = mx * mx
    return p.y - g.mouth_y + g.smile * (xx - 0.4), 1.0 - xx


def lip(g: Geometry, p: Points) -> Tensor:
    my, profile = mouth_line(g, p)
    full = profile * (1.5 - 0.5 * profile)
    dip = 1.0 - 0.28 / (1.0 + (p.fx / 0.022) ** 2)
    return torch.maximum(
        -my - (0.25 * g.mouth_open + 0.9 * g.lip_t * dip) * full, my - (0.75 * g.mouth_open + g.lip_t) * full
    )


def mouth(g: Geometry, p: Points) -> Tensor:
    my, profile = mouth_line(g, p)
    slit = 0.006 * profile
    return torch.maximum(-my - 0.25 * g.mouth_open * profile - slit, my - 0.75 * g.mouth_open * profile - slit)


def teeth(g: Geometry, p: Points) -> Tensor:
    my, profile = mouth_line(g, p)
    return torch.maximum(mouth(g, p) + 0.004, my - (0.30 * g.mouth_open - 0.004) * profile)


GLASSES_X, GLASSES_W = 0.165, 0.118


def lens(g: Geometry, p: Points, rim: Tensor | float) -> Tensor:
    x, y = (p.fx.abs() - GLASSES_X) / (GLASSES_W + rim), (p.y - 0.012) / (0.098 + rim)
    return squircle(x, y, g.glasses_square) - 1.0


def glasses(g: Geometry, p: Points) -> Tensor:
    rim = 0.017 * g.glasses
    frame = torch.maximum(lens(g, p, rim), -lens(g, p, -rim))
    across = (p.y + 0.022).abs() - 0.9 * rim
    bridge = torch.maximum(across + 2.0 * p.fx * p.fx, p.fx.abs() - GLASSES_X + GLASSES_W)
    temple = torch.maximum(torch.maximum(across, GLASSES_X + GLASSES_W - p.fx.abs()), p.x.abs() - g.face_w - 0.01)
    return torch.minimum(frame, torch.minimum(bridge, temple))


def hat_edge(g: Geometry, p: Points) -> Tensor:
    """Negative above the lower edge of the hat, which comes down from the crown of the head."""
    return p.y - lerp(-0.95, -0.235, g.hat) - 0.35 * p.x * p.x


def hat(g: Geometry, p: Points) -> Tensor:
    x = (p.x + 0.06 * g.yaw_sin) / (g.face_w + 0.065)
    dome = squircle(x, (p.y + 0.05) / (g.face_h + 0.10), lerp(0.15, 0.6, g.brim)) - 1.0
    return torch.maximum(dome, hat_edge(g, p))


def cuff(g: Geometry, p: Points) -> Tensor:
    """The folded edge of a cap or the ribbon of a hat with a brim."""
    edge = hat_edge(g, p)
    x = (p.x + 0.06 * g.yaw_sin).abs() - g.face_w - lerp(0.075, 0.045, g.brim)
    band = lerp(-0.04, 0.115, g.hat)
    return torch.maximum(torch.maximum(edge, -edge - band), x)


def brim(g: Geometry, p: Points) -> Tensor:
    size = g.brim * g.hat
    x = (p.x - 0.10 * g.yaw_sin) / (0.02 + (g.face_w + 0.20) * size)
    y = (hat_edge(g, p) + 0.30 * p.x * p.x - 0.01) / (0.004 + 0.060 * size)
    return squircle(x, y, 0.0) - 1.0


@dataclass(frozen=True)
class Layer:
    """What is drawn at once: a name, the class of its pixels, and its outline."""

    name: str
    part: str
    outline: Callable[[Geometry, Points], Tensor]


def everywhere(g: Geometry, p: Points) -> Tensor:
    return torch.full_like(p.x, -1.0)


LAYERS = (
    Layer("wall", "background", everywhere),
    Layer("panel", "background", panel),
    Layer("ball", "background", ball),
    Layer("back_hair", "hair", back_hair),
    Layer("neck", "neck", neck),
    Layer("clothes", "clothes", clothes),
    Layer("collar", "clothes", collar),
    Layer("ear", "ear", ear),
    Layer("earring", "earring", earring),
    Layer("locks", "hair", locks),
    Layer("face", "skin", face),
    Layer("beard", "beard", beard),
    Layer("lid", "skin", lid),
    Layer("eye", "eye", eye),
    Layer("iris", "iris", iris),
    Layer("pupil", "iris", pupil),
    Layer("glint", "iris", glint),
    Layer("lash", "eye", lash),
    Layer("brow", "brow", brow),
    Layer("nose", "nose", nose),
    Layer("nostril", "nose", nostril),
    Layer("lip", "lip", lip),
    Layer("mouth", "mouth", mouth),
    Layer("teeth", "mouth", teeth),
    Layer("glasses", "glasses", glasses),
    Layer("front_hair", "hair", front_hair),
    Layer("hat", "hat", hat),
    Layer("cuff", "hat", cuff),
    Layer("brim", "hat", brim),
)
