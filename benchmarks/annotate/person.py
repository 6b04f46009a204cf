"""A simulated person who draws strokes on the annotation page, as the page asks for.

Rules of this file:
- The person draws one stroke in each part, looks at the page's prediction, and then draws in what it has wrong: the
  largest errors first, until nothing large is wrong, or STROKES strokes or SHARE of the pixels are drawn.
- A stroke is a brush stroke of the page: a line that a person sees to be inside a part, with the inaccuracy of a hand
  (HAND pixels, normally distributed, at the page's usual zoom) and a radius that leaves room to the edge. It may still
  cross the edge, as a hand does. In thin parts the person zooms in, at most ZOOM times.
- A stroke of which more than OUTSIDE of the pixels lie outside of the part is undone and drawn again, at most TRIES
  times in all.
- The time is stated, not measured: SECONDS for each stroke, one for each SPEED pixels, ZOOM_SECONDS for zooming in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from labelmint.annotate.strokes import STROKES as STROKE_LIST
from labelmint.annotate.strokes import mask_of, region_at
from labelmint.models.annotations import UNDRAWN

STROKES, SHARE = 40, 0.1  # of one image, at most
HAND, ZOOM = 0.7, 4.0
LONGEST, POINTS = 32.0, 6  # pixels of a stroke, and points of the hand in it
OUTSIDE, TRIES = 0.1, 3
SEEN, AT_ONCE = 3, 4  # pixels of the smallest error that the person sees, and errors corrected after each look
SECONDS, SPEED, ZOOM_SECONDS = 3.0, 30.0, 2.0

Mask = npt.NDArray[np.uint8]
Area = npt.NDArray[np.bool_]
Line = npt.NDArray[np.float64]


class Drawing:
    """What the person has drawn on one image, whose exact mask is uint8 [R,R]."""

    def __init__(self, exact: Mask, seed: int) -> None:
        self.exact, self.strokes, self.seconds = exact, list[dict[str, Any]](), 0.0
        self.mask = np.full_like(exact, UNDRAWN)
        self._rng = np.random.default_rng(seed)
        self._depths = {int(each): depth(exact == each) for each in np.unique(exact)}

    def draw(self, look: Callable[[Mask], Mask]) -> None:
        """Draw the image; `look` gives the page's prediction uint8 [R,R] from the mask so far."""
        for number, deep in self._depths.items():
            self._stroke(number, *self._line(deep >= max(1, 0.5 * deep.max()), number))
        while len(self.strokes) < STROKES:
            errors = self._errors(look(self.mask))[:AT_ONCE]
            if not sum(self._stroke(number, *self._line(area, number)) for area, number in errors):
                return

    def _errors(self, label: Mask) -> list[tuple[Area, int]]:
        """The wrong regions and their true classes; first those that are large for the part that they belong to."""
        wrong, found = (label != self.exact) & (self.mask == UNDRAWN), []
        for number in self._depths:
            left = wrong & (self.exact == number)
            while left.any():
                y, x = np.argwhere(left)[0]
                area = region_at(left.astype(np.uint8), x, y)
                left &= ~area
                if area.sum() >= SEEN:
                    found.append((area, number))
        return sorted(found, key=lambda each: -each[0].sum() / (self.exact == each[1]).sum() ** 0.5)

    def _line(self, area: Area, number: int) -> tuple[Line, int]:
        """A long line [P,2] of x, y from a deep place of an area to another, inside the part; and its least depth."""
        deep, places = self._depths[number], np.argwhere(area)[:, ::-1]  # [E,2] of x, y
        depths = deep[places[:, 1], places[:, 0]]
        starts = places[depths >= np.median(depths)]
        start = starts[self._rng.integers(len(starts))]
        far = np.hypot(*(places - start).T)
        for end in places[np.argsort(-np.where(far <= LONGEST, far, -1.0), kind="stable")]:
            line = np.linspace(start, end, POINTS)
            x, y = line.round().astype(int).T
            if (deep[y, x] > 0).all():
                return line, int(deep[y, x].min())
        raise AssertionError("a place is a line to itself")

    def _stroke(self, number: int, line: Line, room: int) -> bool:
        """Draw along a line with `room` pixels to the edge. Returns whether the stroke stays."""
        radius, zoom = float(np.clip(room - 1.0, 0.5, 3.0)), float(np.clip(3.0 / room, 1.0, ZOOM))
        for _ in range(TRIES):
            points = (line + self._rng.normal(0.0, HAND / zoom, line.shape)).round(2).tolist()
            stroke = {"tool": "brush", "class": number, "radius": radius, "points": points}
            self.seconds += SECONDS + float(np.hypot(*(line[-1] - line[0]))) / SPEED + ZOOM_SECONDS * (zoom > 1.0)
            if (self.exact[self._masked([stroke]) != UNDRAWN] != number).mean() <= OUTSIDE:
                mask = self._masked([*self.strokes, stroke])
                if (mask != UNDRAWN).mean() > SHARE:
                    return False
                self.strokes, self.mask = [*self.strokes, stroke], mask
                return True
        return False

    def _masked(self, strokes: list[dict[str, Any]]) -> Mask:
        return mask_of(STROKE_LIST.validate_python(strokes), len(self.exact))


def depth(area: Area) -> npt.NDArray[np.int64]:
    """How many pixels each pixel of an area bool [R,R] is from its edge, at most 8; 1 beside the edge, int [R,R]."""
    left, found = Image.fromarray(area.astype(np.uint8) * 255), np.zeros(area.shape, int)
    for _ in range(8):
        found += np.asarray(left) > 0
        left = left.filter(ImageFilter.MinFilter(3))
    return found
