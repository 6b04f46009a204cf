"""Paints named shapes into masks, for the files of both labelme and COCO.

Rules of this file:
- Pixels that no shape covers are class 0, the background. A later shape paints over an earlier one.
- A shape without pixels is an error, and so is an image without shapes, because both are probably mistakes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from labelmint.core.errors import UnusableFile
from labelmint.models.annotations.directory import Drawn, Size, id_of, image_path
from labelmint.models.annotations.files import Bytes

Point = tuple[float, float]  # x, y in pixels


@dataclass(frozen=True)
class Shape:
    """One shape of one image: the pixels that it covers, and `where` it is in the file `path`."""

    seed: int
    path: Path
    where: str
    name: str
    area: npt.NDArray[np.bool_]  # [R,R]


def paint(shapes: Iterable[Shape], names: tuple[str, ...], drawn: Drawn, *, directory: Path) -> dict[int, Bytes]:
    """Return masks uint8 [R,R] of class ids, one for each image of `synth`."""
    masks = {seed: np.zeros(drawn.size(seed), np.uint8) for seed in drawn.images}
    bare = set(masks)
    for shape in shapes:
        if not shape.area.any():
            raise UnusableFile(shape.path, f"{shape.where} covers no pixel; delete it or draw it again")
        masks[shape.seed][shape.area] = id_of(shape.name, names, shape.path, where=shape.where)
        bare.discard(shape.seed)
    if bare:
        raise UnusableFile(
            image_path(directory, min(bare)),
            f"has no shape; draw one, of {names[0]!r} if the image shows nothing else",
        )
    return masks


def check_points(points: Sequence[Point], size: Size, path: Path, *, where: str) -> None:
    """Refuse points that are farther outside than the image is long; they were probably drawn on another image."""
    height, width = size
    for x, y in points:
        if not (-width <= x <= 2 * width and -height <= y <= 2 * height):
            raise UnusableFile(path, f"{where} has a point at ({x:g}, {y:g}), far outside of {width}x{height} pixels")
