"""Traces the parts of a label as polygons, one closed line for each part, also around its holes. Pure functions.

Rules of this file:
- A part is a set of pixels of one class that are connected by edges. Every part is kept, down to a single pixel, which
  is a polygon of four corners.
- An outline lies 0.01 pixels inside the edges of its pixels. So a program that rounds corners down and fills a polygon
  with its border (OpenCV, Pillow) draws exactly these pixels, and so does one that tests the centres of pixels.
- These polygons have no holes. The line goes to a hole along a row of the part's own pixels, around the hole, and back
  along the same row. So drawing the line draws no pixel of the hole.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

_UNITS = 100  # in a pixel: corners are integers, so that they can be compared
_INSET = 1

_Corner: TypeAlias = tuple[int, int]  # x, y
_Way: TypeAlias = tuple[int, int]  # along x, along y
_RIGHT, _DOWN, _LEFT, _UP = (1, 0), (0, 1), (-1, 0), (0, -1)


def outlines(label: npt.NDArray[np.uint8], class_ids: range) -> Iterator[tuple[int, list[tuple[float, float]]]]:
    """Yield class id and corners (x, y) in pixels of every part of a label, uint8 [H,W].

    Parts come in the order of the classes, and within a class from left to right. Pixel (x, y) is the square from
    (x, y) to (x+1, y+1).
    """
    for class_id in class_ids:
        borders = _Borders(label == class_id)
        for ring in borders.rings:
            if not ring.is_hole:
                yield class_id, [(x / _UNITS, y / _UNITS) for x, y in borders.line(ring)]


@dataclass(eq=False)
class _Ring:
    """A border that is walked with the part's pixels on the right. It begins at its first corner from the left."""

    is_hole: bool
    corners: list[_Corner] = field(default_factory=list)  # in units
    joined: dict[int, list[tuple[int, _Ring]]] = field(default_factory=lambda: defaultdict(list))
    # By the index of a side: the holes that are reached from it, and at which y


class _Borders:
    """The borders of a mask, bool [H,W]. Each hole is joined to the border that is next on its left."""

    def __init__(self, mask: npt.NDArray[np.bool_]) -> None:
        self._ways = _ways(mask)
        self._done = set[tuple[_Corner, _Way]]()
        # By row: x in pixels, ring and index of each side that goes up, with a pixel of the part on its right.
        self._lefts: dict[int, list[tuple[int, _Ring, int]]] = defaultdict(list)
        self.rings = [
            self._ring(corner, way)
            for corner, ways in sorted(self._ways.items())
            for way in ways
            if way in (_RIGHT, _DOWN) and (corner, way) not in self._done
        ]
        for lefts in self._lefts.values():
            lefts.sort(key=lambda left: left[0])
        for ring in self.rings:
            if ring.is_hole:
                self._join(ring)

    def _ring(self, corner: _Corner, way: _Way) -> _Ring:
        """Follow the border from its first corner until the way comes back to it."""
        ring = _Ring(is_hole=way == _DOWN)
        x, y = corner
        while ((x, y), way) not in self._done:
            self._done.add(((x, y), way))
            if way == _UP:
                self._lefts[y - 1].append((x, ring, len(ring.corners)))
            x, y = x + way[0], y + way[1]
            # There is a choice where two pixels touch at this corner only. A turn to the right stays at the same pixel.
            ways, right = self._ways[x, y], (-way[1], way[0])
            following = right if right in ways else ways[0]
            if following != way:
                across, along = (following, way) if way[1] == 0 else (way, following)
                ring.corners.append((x * _UNITS - across[1] * _INSET, y * _UNITS + along[0] * _INSET))
            way = following
        ring.corners.insert(0, ring.corners.pop())
        return ring

    def _join(self, hole: _Ring) -> None:
        """Find the border that is next on the way to the left, in the row above the hole's first corner."""
        x, y = hole.corners[0]
        lefts = self._lefts[y // _UNITS]
        _, ring, index = lefts[bisect_left(lefts, x / _UNITS, key=lambda left: left[0]) - 1]
        ring.joined[index].append((y, hole))

    def line(self, ring: _Ring) -> list[_Corner]:
        """Return the line around a part and its holes. It does not recurse: one hole may lead to a thousand."""
        line, steps = list[_Corner](), [_steps(ring)]
        while steps:
            step = next(steps[-1], None)
            if step is None:
                steps.pop()
            elif isinstance(step, _Ring):
                steps.append(_steps(step))
            else:
                line.append(step)
        return line


def _ways(mask: npt.NDArray[np.bool_]) -> dict[_Corner, list[_Way]]:
    """Return the ways along the border from each corner of a pixel, with the pixels of the mask on the right."""
    padded = np.pad(mask, 1)
    ways: dict[_Corner, list[_Way]] = defaultdict(list)
    for way, beside, (right, down) in (
        (_RIGHT, padded[:-2, 1:-1], (0, 0)),
        (_DOWN, padded[1:-1, 2:], (1, 0)),
        (_LEFT, padded[2:, 1:-1], (1, 1)),
        (_UP, padded[1:-1, :-2], (0, 1)),
    ):
        for y, x in np.argwhere(mask & ~beside).tolist():
            ways[x + right, y + down].append(way)
    return ways


def _steps(ring: _Ring) -> Iterator[_Corner | _Ring]:
    """Yield the corners of a border in order, and the holes between them."""
    for index, (x, y) in enumerate(ring.corners):
        yield x, y
        for at, hole in sorted(ring.joined[index], key=lambda joined: -joined[0]):  # the side goes up
            yield from ((x, at), hole, (x, at))
    if ring.is_hole:
        yield ring.corners[0]
