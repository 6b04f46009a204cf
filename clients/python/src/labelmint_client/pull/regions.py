"""Finds the connected regions of a label, as polygons and run lengths of exactly the same pixels. Pure functions.

Rules of this file:
- Polygons run along the edges of pixels, in COCO's coordinates: pixel (x, y) is the square from (x, y) to (x+1, y+1).
  pycocotools rasterises a polygon to exactly the pixels of the region. So area, box, polygons and run lengths agree.
- COCO polygons cannot have holes, so a region with holes is cut into pieces without holes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from pycocotools import mask as run_lengths
from scipy import ndimage

_EIGHT_NEIGHBOURS = np.ones((3, 3), np.int8)


@dataclass(frozen=True)
class Region:
    """Pixels of one class that touch each other, at least at a corner."""

    class_id: int
    area: int  # pixels
    box: list[float]  # x, y, width, height, pixels
    polygons: list[list[float]]  # each x, y, x, y, ... in pixels
    run_lengths: dict[str, Any]  # `size` [H,W] and compressed `counts`, as pycocotools reads them


def regions(label: npt.NDArray[np.uint8], class_ids: range) -> Iterator[Region]:
    """Yield the regions of a label, uint8 [H,W]: in the order of the classes, and within a class from top to bottom."""
    for class_id in class_ids:
        numbered, _ = ndimage.label(label == class_id, _EIGHT_NEIGHBOURS)
        for number, window in enumerate(ndimage.find_objects(numbered), 1):
            mask = numbered == number
            encoded = run_lengths.encode(np.asfortranarray(mask, np.uint8))
            yield Region(
                class_id,
                int(run_lengths.area(encoded)),
                run_lengths.toBbox(encoded).tolist(),
                _polygons(mask[window], window[1].start, window[0].start),
                {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")},
            )


def _polygons(mask: npt.NDArray[np.bool_], left: int, top: int) -> list[list[float]]:
    """Return the outlines of a mask, bool [h,w], whose first pixel is at (left, top)."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)  # [h,w+1], 1 where a run begins
    y, begin = np.nonzero(edges == 1)
    end = np.nonzero(edges == -1)[1]
    runs = shapely.box(begin + left, y + top, end + left, y + top + 1)
    pieces = [piece for whole in shapely.get_parts(shapely.union_all(runs)) for piece in _without_holes(whole)]
    # simplify(0) drops corners that lie on a straight line. normalize gives every outline a fixed first corner.
    outlines = shapely.get_exterior_ring(shapely.normalize(shapely.simplify(pieces, 0)))
    return [shapely.get_coordinates(outline)[:-1].ravel().tolist() for outline in outlines]


def _without_holes(polygon: shapely.Polygon) -> list[shapely.Polygon]:
    """Cut the polygon along the left edge of a hole, and repeat this until no piece has a hole."""
    if not polygon.interiors:
        return [polygon]
    left, top, right, bottom = polygon.bounds
    cut = polygon.interiors[0].bounds[0]
    halves = [
        shapely.clip_by_rect(polygon, left, top, cut, bottom),
        shapely.clip_by_rect(polygon, cut, top, right, bottom),
    ]
    return [piece for half in halves for part in shapely.get_parts(half) for piece in _without_holes(part)]
