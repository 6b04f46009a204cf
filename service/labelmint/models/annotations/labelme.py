"""Reads label files of the program labelme, one JSON file next to each image.

Rules of this file:
- Areas are drawn with Pillow as labelme's own converter draws them. So the outline belongs to the shape.
- A rectangle has two opposite corners, or all four as X-AnyLabeling saves it. Four corners of a rotated rectangle are
  drawn as a polygon.
- Lines and points are refused, because they have no area. (labelme's converter gives them a width of its own choice.)
"""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from pydantic import TypeAdapter

from labelmint.core.errors import UnusableFile
from labelmint.models.annotations.directory import Drawn, Size, annotation_files, check_size, seed_in
from labelmint.models.annotations.files import BROKEN_PICTURE, Strict, fault_of, read_json
from labelmint.models.annotations.marks import Point, Shape, check_points


class _Shape(Strict):
    label: str
    points: list[Point]
    shape_type: str
    mask: str | None = None  # base64 of a PNG


class _LabelFile(Strict):
    imagePath: str  # noqa: N815
    imageHeight: int  # noqa: N815
    imageWidth: int  # noqa: N815
    shapes: list[_Shape]


_LABEL_FILE = TypeAdapter(_LabelFile)


def read_shapes(directory: Path, drawn: Drawn) -> Iterator[Shape]:
    """Yield the shapes of every image, in the order of its file. Raises UnusableFile."""
    for seed, path in annotation_files(directory / "images", ".json", drawn).items():
        size = drawn.size(seed)
        content = read_json(path, _LABEL_FILE, "annotate its image with labelme and save")
        # PureWindowsPath accepts both separators: the file may have been saved on Windows.
        if seed_in(PureWindowsPath(content.imagePath).name, drawn) != seed:
            raise UnusableFile(path, f"was saved for the image {content.imagePath!r}; annotate the image next to it")
        check_size((content.imageHeight, content.imageWidth), size, path, what="was saved for an image of")
        for index, shape in enumerate(content.shapes):
            where = f"shapes.{index} ({shape.label!r})"
            yield Shape(seed, path, where, shape.label, _area(shape, size, path, where=where))


def _area(shape: _Shape, size: Size, path: Path, *, where: str) -> npt.NDArray[np.bool_]:
    """Return the pixels, bool [R,R], that a shape covers."""
    kind, points = shape.shape_type, shape.points
    enough = {"polygon": len(points) >= 3, "rectangle": len(points) in (2, 4)}
    enough.update(dict.fromkeys(("oriented_rectangle", "rotation"), len(points) == 4))
    enough.update(dict.fromkeys(("circle", "mask"), len(points) == 2))
    if kind not in enough:
        raise UnusableFile(path, f"{where} is a {kind}; only {', '.join(enough)} have an area")
    if not enough[kind]:
        raise UnusableFile(path, f"{where} is a {kind} of {len(points)} points; draw it again")
    check_points(points, size, path, where=where)
    if kind == "mask":
        return _pasted(shape, size, path, where=where)
    picture = Image.new("L", (size[1], size[0]))
    draw = ImageDraw.Draw(picture)
    if kind == "circle":
        (x, y), on_the_rim = points
        radius = math.dist((x, y), on_the_rim)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1, outline=1)
    elif kind == "rectangle" and _is_upright(points):
        xs, ys = zip(*points, strict=True)
        draw.rectangle((min(xs), min(ys), max(xs), max(ys)), fill=1, outline=1)
    else:
        draw.polygon(points, fill=1, outline=1)
    return np.asarray(picture) > 0


def _is_upright(points: list[Point]) -> bool:
    """Whether the two or four corners of a rectangle are those of a rectangle with horizontal and vertical sides."""
    xs, ys = ({point[axis] for point in points} for axis in (0, 1))
    return len(points) == 2 or set(points) == set(itertools.product(xs, ys))


def _pasted(shape: _Shape, size: Size, path: Path, *, where: str) -> npt.NDArray[np.bool_]:
    """Return the area of a bitmap, which lies between its two points, both inclusive."""
    left, top, right, bottom = (int(value) for point in shape.points for value in point)
    if not (0 <= left <= right < size[1] and 0 <= top <= bottom < size[0]):
        raise UnusableFile(path, f"{where} has a bitmap from ({left}, {top}) to ({right}, {bottom}), outside its image")
    try:
        bitmap = Image.open(io.BytesIO(base64.b64decode(shape.mask or "")), formats=["PNG"])
        if bitmap.size != (right - left + 1, bottom - top + 1) or bitmap.mode not in ("1", "L"):
            raise UnusableFile(path, f"{where} has a bitmap whose size or mode does not fit its points; draw it again")
        pixels = np.asarray(bitmap) > 0
    except (ValueError, *BROKEN_PICTURE) as error:
        raise UnusableFile(path, f"{where} has a bitmap that is not a whole PNG: {fault_of(error)}") from error
    area = np.zeros(size, bool)
    area[top : bottom + 1, left : right + 1] = pixels
    return area
