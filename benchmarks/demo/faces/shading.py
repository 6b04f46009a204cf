"""The colours of all layers: base colours, the light from one direction, and the shadows that parts cast.

Rules of this file:
- Every shade is smooth on the scale of a pixel. Sharp edges are layers, so that the mask and the image share them.
- A layer's colour is defined everywhere, also beyond its outline.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from demo.faces import shapes
from demo.faces.functions import gauss, lerp, smoothstep
from demo.faces.scene import Appearance, Geometry
from demo.faces.shapes import Points


def moved(p: Points, dx: Tensor | float, dy: Tensor | float) -> Points:
    """Shift the points towards the light, to find what blocks it."""
    return replace(p, x=p.x + dx, y=p.y + dy, fx=p.fx + dx)


def soft(outline: Tensor, width: float) -> Tensor:
    """1 inside an outline, 0 outside, with a soft edge; `width` in the units of the outline."""
    return torch.sigmoid((-outline / width).clamp(-20.0, 20.0))


def lit(a: Appearance, nx: Tensor, ny: Tensor, *, contrast: float) -> Tensor:
    """Light on a round surface whose normal is (nx, ny) in the image plane, each from -1 to 1."""
    nz = torch.sqrt((1.0 - nx * nx - ny * ny).clamp(min=0.02))
    front = torch.sqrt((1.2 - a.light_x**2 - a.light_y**2).clamp(min=0.05))
    return 1.0 + contrast * (nx * a.light_x + ny * a.light_y + 0.9 * front * (nz - 0.75))


def background(g: Geometry, a: Appearance, p: Points) -> dict[str, Tensor]:
    down = 0.5 + p.gy / 1.6
    wave = torch.sin(28.0 * (g.stripes_x * p.gx + g.stripes_y * p.gy))
    wall = lerp(a.wall_above, a.wall_below, down) * (1.0 + a.stripes * wave + 0.10 * a.light_x * p.gx)
    shadow = 1.0 - 0.16 * soft(shapes.panel(g, replace(p, gx=p.gx + 0.05 * a.light_x, gy=p.gy - 0.03)), 0.15)
    return {
        "wall": wall * shadow,
        "panel": a.panel * (1.0 + 0.25 * (p.gx - g.panel_x) * a.light_x - 0.25 * (p.gy + 0.34)),
        "ball": a.ball * lit(a, (p.gx - g.ball_x) / 0.25, (p.gy - 0.02) / 0.25, contrast=0.35),
    }


def hair(g: Geometry, a: Appearance, p: Points) -> dict[str, Tensor]:
    """Shade strands or curls, the light on the cap, and a band of gloss where curls do not break it."""
    nx, ny = p.x / (g.face_w + 0.16), (p.y + 0.05) / (g.face_h + 0.16)
    strands = 1.0 + 0.07 * torch.sin(30.0 * p.fx + 6.0 * p.y) * (1.0 - 2.0 * g.curl) + 0.6 * g.curl * shapes.curls(p)
    band = gauss((torch.hypot(nx - 0.3 * a.light_x, ny) - 0.78) / 0.10)
    gloss = 0.22 * (1.0 - 3.0 * g.curl) * band * soft(p.y + 0.15, 0.06)
    front = a.hair * strands * lit(a, nx, ny, contrast=0.38) + gloss * (0.25 + a.hair)
    back = front * lerp(0.62, 0.95, smoothstep((-p.y - 0.05) / 0.25))
    return {"back_hair": back, "locks": front, "front_hair": front}


def body(g: Geometry, a: Appearance, p: Points) -> dict[str, Tensor]:
    """Shade neck and clothes; chin and beard cast a shadow on them."""
    under = soft(shapes.face(g, moved(p, 0.10 * a.light_x, -0.10)), 0.13)
    beard = soft(shapes.beard(g, moved(p, 0.08 * a.light_x, -0.06)), 0.03) * g.beard
    neck = a.skin * lit(a, p.bx / 0.22, 0.0 * p.by, contrast=0.32) * (1.0 - 0.34 * torch.maximum(under, beard)) * 0.96
    folds = lit(a, p.bx / 0.9, (p.by - 1.0) / 0.9, contrast=0.35)
    folds = folds + 0.06 * torch.sin(9.0 * p.bx + 3.0 * p.by) * (p.by - 0.4)
    bands = smoothstep(0.5 + 1.6 * torch.sin(38.0 * (p.by - 0.15 * p.bx * p.bx)))
    dark = 1.0 - 0.22 * under
    clothes = lerp(a.clothes, a.clothes_second, bands) * folds * dark
    return {"neck": neck, "clothes": clothes, "collar": a.clothes * 0.78 * folds * dark}


def ears(g: Geometry, a: Appearance, p: Points, light: Tensor) -> dict[str, Tensor]:
    x, y = shapes.ear_x(g, p) - 0.012, p.y - shapes.EAR_Y
    hollow = gauss(x / 0.024) * gauss(y / 0.05)
    return {
        "ear": a.skin * light * (0.92 - 0.22 * hollow),
        "earring": a.earring * (1.0 + 0.35 * gauss((y - 0.115) / 0.02)),
    }


def skin(g: Geometry, a: Appearance, p: Points) -> Tensor:
    """Shade the face: light, relief, flush, freckles, and the shadows of nose, hair and hat."""
    light = lit(a, p.x / (g.face_w + 0.03), (p.y + 0.02) / (g.face_h + 0.05), contrast=0.36)
    cheek = gauss((p.fx.abs() - 0.205) / 0.085) * gauss((p.y - 0.135 + 0.4 * g.smile) / 0.075)
    flush = 1.0 - torch.cat([0.15 * cheek, cheek, 0.8 * cheek], 1) * a.blush
    spots = smoothstep(torch.sin(52.0 * p.fx + 9.0 * p.y) * torch.sin(58.0 * p.y - 7.0 * p.fx) * 1.6 - 0.6)
    spots = spots * gauss((p.fx.abs() - 0.12) / 0.12) * gauss((p.y - 0.10) / 0.07)
    shade = light * _relief(g, p) * _cast(g, a, p)
    return a.skin * shade * flush * (1.0 - 0.16 * a.freckles * spots)


def _relief(g: Geometry, p: Points) -> Tensor:
    """Darken the sockets of the eyes, the folds beside a smile, and the hollow below the lip."""
    socket = gauss((p.fx.abs() - g.eye_x + 0.02) / 0.11) * gauss((p.y + 0.03) / 0.07)
    fold = gauss((p.fx.abs() - 0.8 * g.mouth_w - 0.03 - 0.25 * (p.y - g.nose_y)) / 0.016) * gauss((p.y - 0.21) / 0.05)
    chin = gauss(p.fx / 0.10) * gauss((p.y - g.mouth_y - 0.085) / 0.022)
    return 1.0 - 0.10 * socket - (0.06 + 1.2 * g.smile.clamp(min=0.0)) * fold - 0.09 * chin


def _cast(g: Geometry, a: Appearance, p: Points) -> Tensor:
    """Darken where nose, hair or hat stand in the way of the light."""
    nose = soft(shapes.nose(g, moved(p, 0.055 * a.light_x, 0.045 * a.light_y)), 0.02)
    hair = soft(shapes.hairline(g, moved(p, 0.06 * a.light_x, 0.07 * a.light_y)), 0.016)
    hat = soft(shapes.hat_edge(g, moved(p, 0.0, (0.08 + 0.12 * g.brim) * a.light_y)), 0.025) * g.hat
    return (1.0 - 0.20 * nose) * (1.0 - 0.26 * torch.maximum(hair, hat))


def eyes(g: Geometry, a: Appearance, p: Points, skin: Tensor) -> dict[str, Tensor]:
    under_lid = soft(p.y + shapes.upper_lid(g) - 0.030, 0.008)
    return {
        "lid": skin * a.eyeshadow,
        "eye": torch.full_like(skin, 0.97) * (1.0 - 0.22 * under_lid),
        "iris": a.iris * (1.0 - 0.30 * under_lid + 0.35 * smoothstep(p.y / 0.04 + 0.3)),
        "pupil": 0.10 * a.iris + 0.02,
        "glint": torch.full_like(a.iris, 0.98),
        "lash": a.brow * 0.45 + 0.03,
    }


def nose(g: Geometry, a: Appearance, p: Points, skin: Tensor) -> dict[str, Tensor]:
    """Shade the nose; its upper end has the colour of the skin around it."""
    x = shapes.nose_x(g, p) / g.nose_w
    along = smoothstep((p.y + 0.06) / (g.nose_y + 0.06))
    side = 0.20 * along * x.clamp(-1.2, 1.2) * a.light_x
    gloss = 0.13 * gauss((x - 0.25 * a.light_x) / 0.38) * along - 0.16 * smoothstep((p.y - g.nose_y) / 0.035)
    pink = 1.0 - torch.cat([0.0 * along, 0.05 * along, 0.05 * along], 1)
    shaded = a.skin * pink * _round(g, a, p) * (1.0 + side + gloss)
    return {"nose": lerp(skin, shaded, along), "nostril": a.skin * 0.38}


def mouth(g: Geometry, a: Appearance, p: Points, light: Tensor) -> dict[str, Tensor]:
    my, _ = shapes.mouth_line(g, p)
    shine = 0.16 * gauss((my - 0.75 * g.mouth_open - 0.4 * g.lip_t) / 0.012) * gauss((p.fx - 0.02 * a.light_x) / 0.05)
    tongue = smoothstep((my - 0.35 * g.mouth_open) / 0.02)
    return {
        "lip": a.lip * light * (1.0 - 0.16 * soft(my, 0.006)) + shine,
        "mouth": lerp(a.lip * 0.30, a.lip * 0.75, tongue * smoothstep(g.mouth_open / 0.05)),
        "teeth": torch.full_like(shine, 0.95) * (1.0 - 0.25 * smoothstep((p.fx / g.mouth_w) ** 2)),
    }


def beard(a: Appearance, p: Points, light: Tensor) -> dict[str, Tensor]:
    tufts = 1.0 + 0.07 * torch.sin(46.0 * p.fx) * torch.sin(40.0 * p.y + 8.0 * p.fx.abs())
    return {"beard": a.beard * tufts * light * (1.0 - 0.2 * smoothstep((p.y - 0.35) / 0.2))}


def worn(g: Geometry, a: Appearance, p: Points) -> dict[str, Tensor]:
    """Shade glasses, crown, cuff and brim."""
    nx, ny = p.x / (g.face_w + 0.12), (p.y + 0.05) / (g.face_h + 0.14)
    ribs = 1.0 + 0.10 * (1.0 - g.brim) * torch.sin(38.0 * p.fx)
    below = smoothstep((shapes.hat_edge(g, p) + 0.3 * p.x**2 + 0.02) / 0.05)
    return {
        "glasses": a.glasses * (1.0 - 0.25 * p.y) * (1.0 + 0.2 * a.light_x * p.x),
        "hat": a.hat * lit(a, nx, ny, contrast=0.42),
        "cuff": lerp(a.hat * 0.88 * ribs, a.hat * 0.45, g.brim) * lit(a, nx, 0.0 * ny, contrast=0.42),
        "brim": a.hat * lit(a, nx * 0.6, 0.0 * ny - 0.3, contrast=0.42) * (1.0 - 0.30 * below),
    }


def _round(g: Geometry, a: Appearance, p: Points) -> Tensor:
    """Light on the front of the head."""
    return lit(a, p.x / (g.face_w + 0.03), p.y / (g.face_h + 0.05), contrast=0.36)


def colours(g: Geometry, a: Appearance, p: Points) -> dict[str, Tensor]:
    """Return the colour of each of `shapes.LAYERS` by name; each can be broadcast to [B,3,R,R]."""
    light = _round(g, a, p)
    face = skin(g, a, p)
    behind_glasses = {
        "face": face,
        "brow": a.brow * light,
        **beard(a, p, light),
        **eyes(g, a, p, face),
        **nose(g, a, p, face),
        **mouth(g, a, p, light),
    }
    # The rims hide the soft edge of the glass.
    glass = 1.0 - a.tint * g.glasses * soft(shapes.lens(g, p, 0.0), 0.04)
    return {
        **background(g, a, p),
        **hair(g, a, p),
        **body(g, a, p),
        **ears(g, a, p, light),
        **{name: colour * glass for name, colour in behind_glasses.items()},
        **worn(g, a, p),
    }
