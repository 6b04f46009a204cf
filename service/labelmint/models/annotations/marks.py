"""Collects what annotators marked: named shapes into masks, and named points into arrays, for the files of all tools.

Rules of this file:
- Pixels that no shape covers are class 0, the background, unless the user says that nobody drew them. A later shape
  paints over an earlier one.
- A shape without pixels is an error, and so is an image without shapes or keypoints, and a keypoint that is present in
  no image, because all of them are probably mistakes.
- Coordinates are pixels, x to the right and y down. The centre of the first pixel is (0, 0), as in COCO and in the
  demo's renderer. Tools that count from the corner of that pixel (CVAT) are half a pixel off; this is not corrected.
- Visibility is COCO's: 0 not labelled, 1 labelled but hidden, 2 visible. A keypoint is present if it is labelled. A
  keypoint that is not listed for an image is absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from labelmint.core.errors import UnusableFile
from labelmint.models.annotations.directory import UNDRAWN, Drawn, Size, id_of, image_path
from labelmint.models.annotations.files import Bytes

Point = tuple[float, float]  # x, y in pixels
Points = npt.NDArray[np.float32]
# What a pixel is that no shape covers: of class 0, or not drawn. From a pixel that nobody drew, `fit` learns nothing
# ("ignore"), or it learns what a quick interpreter of the drawn pixels says ("extend", models/extension.py).
Unlabelled = Literal["background", "ignore", "extend"]


@dataclass(frozen=True)
class Shape:
    """One shape of one image: the pixels that it covers, and `where` it is in the file `path`."""

    seed: int
    path: Path
    where: str
    name: str
    area: npt.NDArray[np.bool_]  # [R,R]


def paint(
    shapes: Iterable[Shape], names: tuple[str, ...], drawn: Drawn, *, directory: Path, unlabelled: Unlabelled
) -> dict[int, Bytes]:
    """Return masks uint8 [R,R] of class ids, one for each image of `synth`."""
    ground = 0 if unlabelled == "background" else UNDRAWN
    masks = {seed: np.full(drawn.size(seed), ground, np.uint8) for seed in drawn.images}
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


@dataclass(frozen=True)
class Keypoint:
    """One keypoint of one image: its position in pixels, and `where` it is in the file `path`."""

    seed: int
    path: Path
    where: str
    name: str
    x: float
    y: float
    visible: float


def gather(entries: Iterable[Keypoint], names: tuple[str, ...], drawn: Drawn, *, directory: Path) -> dict[int, Points]:
    """Return points float32 [K,3] of x, y and visibility (0 if absent), one array for each image of `synth`."""
    gathered = {seed: np.zeros((len(names), 3), np.float32) for seed in drawn.images}
    given: dict[int, set[int]] = {seed: set() for seed in drawn.images}
    for entry in entries:
        number = id_of(entry.name, names, entry.path, where=entry.where)
        if entry.seed not in gathered:
            raise UnusableFile(entry.path, f"{entry.where} has seed {entry.seed}, which dataset.json does not list")
        if number in given[entry.seed]:
            raise UnusableFile(entry.path, f"{entry.where} is a duplicate for seed {entry.seed}; keep one")
        given[entry.seed].add(number)
        if _is_present(entry, drawn):
            gathered[entry.seed][number] = entry.x, entry.y, entry.visible
    for seed, numbers in given.items():
        if not numbers:
            raise UnusableFile(
                image_path(directory, seed), "has no keypoint; list one, with visibility 0 if none is there"
            )
    for number, name in enumerate(names):
        if not any(points[number, 2] for points in gathered.values()):
            raise UnusableFile(directory / "keypoints.json", f"names {name!r}, which no image shows; remove it")
    return gathered


def _is_present(entry: Keypoint, drawn: Drawn) -> bool:
    if entry.visible not in (0, 1, 2):
        raise UnusableFile(entry.path, f"{entry.where} has visibility {entry.visible:g}; it must be 0, 1 or 2")
    if entry.visible == 0:
        return False
    height, width = drawn.size(entry.seed)
    if not (-0.5 <= entry.x <= width - 0.5 and -0.5 <= entry.y <= height - 0.5):
        raise UnusableFile(
            entry.path, f"{entry.where} is at ({entry.x:g}, {entry.y:g}), outside of {width}x{height} pixels"
        )
    return True
