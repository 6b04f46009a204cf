"""What a person draws on an image, and the sparse mask that it gives. Pure functions.

Rules of this file:
- Strokes are kept, not masks. A pixel that no stroke covers is not drawn, which is id 255 in the mask.
- A later stroke covers an earlier one. The eraser makes pixels undrawn.
- Coordinates are pixels, x to the right and y down, and (0, 0) is the centre of the first pixel. A brush covers the
  pixels whose centres are within its radius of its line. A polygon covers what labelme's converter gives it.
- Regions are run lengths of pixels outside and inside, by turns, row by row, beginning with those outside. They must
  add up to the image, so a few bytes cannot declare a large array.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from labelmint.core.errors import InvalidRequest
from labelmint.models.annotations import UNDRAWN

MAX_STROKES = 10_000
MAX_POINTS = 20_000  # of one stroke

Mask = npt.NDArray[np.uint8]
Area = npt.NDArray[np.bool_]

ClassId = Annotated[int, Field(ge=0, lt=UNDRAWN)]
Coordinate = Annotated[float, Field(ge=-2048, le=4096)]
Point = tuple[Coordinate, Coordinate]
Points = Annotated[list[Point], Field(min_length=1, max_length=MAX_POINTS)]
Radius = Annotated[float, Field(ge=0.5, le=512)]
Runs = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=1 << 20)]


class _Stroke(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)


class Brush(_Stroke):
    tool: Literal["brush"]
    class_id: ClassId = Field(alias="class")
    radius: Radius
    points: Points


class Erase(_Stroke):
    tool: Literal["erase"]
    radius: Radius
    points: Points


class Polygon(_Stroke):
    tool: Literal["polygon"]
    class_id: ClassId = Field(alias="class")
    points: Annotated[list[Point], Field(min_length=3, max_length=MAX_POINTS)]


class Fill(_Stroke):
    """The region around `at` that the preview labelled alike, as it was when the person clicked."""

    tool: Literal["fill"]
    class_id: ClassId = Field(alias="class")
    at: Point
    region: Runs


class Taken(_Stroke):
    """A region that was drawn elsewhere; `source` says where."""

    tool: Literal["mask"]
    class_id: ClassId = Field(alias="class")
    source: Annotated[str, Field(max_length=256)]
    region: Runs


Stroke = Annotated[Brush | Erase | Polygon | Fill | Taken, Field(discriminator="tool")]
Strokes = Annotated[list[Stroke], Field(max_length=MAX_STROKES)]
STROKES: TypeAdapter[list[Stroke]] = TypeAdapter(Strokes)


def mask_of(strokes: Iterable[Stroke], resolution: int) -> Mask:
    """The mask uint8 [R,R] of strokes: class ids, and UNDRAWN where nothing is drawn. Raises InvalidRequest."""
    mask = np.full((resolution, resolution), UNDRAWN, np.uint8)
    for stroke in strokes:
        mask[_area(stroke, resolution)] = UNDRAWN if isinstance(stroke, Erase) else stroke.class_id
    return mask


def runs_of(area: Area) -> list[int]:
    """The run lengths of a region bool [R,R]."""
    flat = area.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    edges = np.concatenate([[0], [] if not flat[0] else [0], ends, [flat.size]])
    return [int(length) for length in np.diff(edges)]


def area_of(runs: Sequence[int], resolution: int) -> Area:
    """The region bool [R,R] of run lengths; raises InvalidRequest if they are not those of such an image."""
    if sum(runs) != resolution * resolution:
        raise InvalidRequest("region", f"its runs add up to {sum(runs)} pixels, not to {resolution * resolution}")
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)  # [R*R]
    return np.asarray(inside, bool).reshape(resolution, resolution)


def region_at(label: Mask, x: float, y: float) -> Area:
    """The connected pixels with the label of the pixel at (x, y), bool [R,R]; neighbours share a side."""
    rows, columns = label.shape
    column, row = round(x), round(y)
    if not (0 <= column < columns and 0 <= row < rows):
        raise InvalidRequest("at", f"({x:g}, {y:g}) is outside of the image")
    # Pillow fills the region of equal pixels in an image of two values; the region gets a third one.
    picture = Image.fromarray((label == label[row, column]).astype(np.uint8)).copy()  # its own memory, to be filled
    ImageDraw.floodfill(picture, (column, row), 2)
    region: Area = np.asarray(picture) == 2
    return region


def _area(stroke: Stroke, resolution: int) -> Area:
    if isinstance(stroke, Fill | Taken):
        return area_of(stroke.region, resolution)
    if isinstance(stroke, Polygon):
        picture = Image.new("L", (resolution, resolution))
        ImageDraw.Draw(picture).polygon(stroke.points, fill=1, outline=1)
        return np.asarray(picture) > 0
    return _brushed(stroke.points, stroke.radius, resolution)


def _brushed(points: Sequence[Point], radius: float, resolution: int) -> Area:
    """The pixels within `radius` of the line through the points, bool [R,R]."""
    area = np.zeros((resolution, resolution), bool)
    for (x0, y0), (x1, y1) in zip(points, points[1:] or points, strict=False):
        left, right = (_clipped(edge, resolution) for edge in (min(x0, x1) - radius, max(x0, x1) + radius + 1))
        top, bottom = (_clipped(edge, resolution) for edge in (min(y0, y1) - radius, max(y0, y1) + radius + 1))
        y, x = np.mgrid[top:bottom, left:right]  # [h,w] each
        along = (x1 - x0) ** 2 + (y1 - y0) ** 2
        nearest = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / (along or 1.0), 0.0, 1.0)
        distance = (x - x0 - nearest * (x1 - x0)) ** 2 + (y - y0 - nearest * (y1 - y0)) ** 2
        area[top:bottom, left:right] |= distance <= radius * radius
    return area


def _clipped(edge: float, resolution: int) -> int:
    return min(max(math.floor(edge), 0), resolution)
