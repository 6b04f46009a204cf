"""The layout of pictures for people: a title, the score and the gate, panels side by side, and a legend.

Rules of this file:
- The same sample gives the same bytes. Only characters that Pillow's built-in font lacks can differ between machines,
  because they are drawn with the fonts of the machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from PIL import Image, ImageDraw

from labelmint.gateway.encoding.lettering import draw_text, length_of, own_font
from labelmint.gateway.encoding.pixels import LABEL_STRATEGY, Bytes, png
from labelmint.gateway.sampling.sample import Sample

Legend: TypeAlias = Sequence[tuple[str, tuple[int, ...]]]  # each entry: a name and its colour

PANEL = 384  # side of a panel, in pixels
INK, PAPER = (28, 30, 36), (250, 250, 248)
_FAINT = (110, 114, 122)
_ACCEPTED, _REJECTED = (0, 110, 84), (178, 34, 34)
_MARGIN = 12


def figure(sample: Sample, panels: Sequence[Bytes], legend: Legend) -> bytes:
    """Return the figure as PNG. Panels are uint8 [H,H,3] of any size."""
    widest = math.ceil(max(length_of(name, 14) for name, _ in legend)) + 21 + _MARGIN
    width = max(len(panels) * (PANEL + _MARGIN) + _MARGIN, widest + _MARGIN)
    columns = max(1, min(6, (width - _MARGIN) // widest))
    rows = (len(legend) + columns - 1) // columns
    top, line = 40, 24
    picture = Image.new("RGB", (width, top + PANEL + _MARGIN + rows * line + _MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)
    verdict = "accepted" if sample.accepted else "rejected"
    colour = _ACCEPTED if sample.accepted else _REJECTED
    title = f"{sample.model.name} · seed {sample.seed}"
    if sample.class_index is not None:
        title += f" · class {sample.class_index}"
    if sample.mixing is not None:
        title += f" · style {sample.mixing.style_seed} from layer {sample.mixing.crossover}"
    draw.text((_MARGIN, 11), title, INK, own_font(16))
    score = f"{verdict}: JS {sample.js_score:.4g}, gate {sample.gate.threshold:.4g} nats"
    draw.text((width - _MARGIN, 11), score, colour, own_font(16), anchor="ra")
    for index, panel in enumerate(panels):
        enlarged = Image.fromarray(panel).resize((PANEL, PANEL), Image.Resampling.NEAREST)
        picture.paste(enlarged, (_MARGIN + index * (PANEL + _MARGIN), top))
    step = (width - _MARGIN) // columns
    for index, (name, rgb) in enumerate(legend):
        x, y = _MARGIN + index % columns * step, top + PANEL + _MARGIN + index // columns * line
        draw.rectangle((x, y, x + 15, y + 15), rgb, _FAINT)
        draw_text(draw, (x + 21, y - 1), name, fill=INK, size=14)
    return png(picture, LABEL_STRATEGY)
