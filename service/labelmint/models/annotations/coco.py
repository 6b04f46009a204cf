"""Reads COCO annotation files as CVAT exports them: instances for masks, person keypoints for keypoints.

Rules of this file:
- The seed in the last part of its file_name identifies an image. The file must list exactly the images of dataset.json.
- pycocotools trusts its input. It reads beyond the end of a truncated run-length string, and it returns uninitialised
  memory where the runs end early. So this file decodes the runs and checks their sum before it calls pycocotools.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Annotated, TypeVar

import numpy as np
import numpy.typing as npt
import pycocotools.mask
from pydantic import Discriminator, Field, Tag, TypeAdapter

from labelmint.core.errors import UnusableFile
from labelmint.models.annotations.directory import Drawn, Size, check_size, image_name, seed_in
from labelmint.models.annotations.files import Strict, read_json
from labelmint.models.annotations.marks import Keypoint, Shape, check_points

T = TypeVar("T")


class _Image(Strict):
    id: int
    file_name: str
    height: int
    width: int


class _Category(Strict):
    id: int
    name: str
    keypoints: tuple[str, ...] = ()


class _Rle(Strict):
    size: tuple[int, int]  # height, width
    counts: Annotated[str, Tag("compressed")] | Annotated[list[Annotated[int, Field(ge=0)]], Tag("uncompressed")] = (
        Field(discriminator=Discriminator(lambda value: "compressed" if isinstance(value, str) else "uncompressed"))
    )


class _Instance(Strict):
    id: int
    image_id: int
    category_id: int
    segmentation: Annotated[
        Annotated[list[list[float]], Tag("polygons")] | Annotated[_Rle, Tag("rle")],
        Discriminator(lambda value: "rle" if isinstance(value, dict) else "polygons"),
    ]


class _PointSet(Strict):
    id: int
    image_id: int
    category_id: int
    keypoints: list[float]  # x, y, visibility: three numbers for each name


class _File(Strict):
    images: list[_Image]
    categories: list[_Category]


class _Instances(_File):
    annotations: list[_Instance]


class _PointSets(_File):
    annotations: list[_PointSet]


_INSTANCES = TypeAdapter(_Instances)
_POINT_SETS = TypeAdapter(_PointSets)
# A run length: characters from "0" on, with five bits each; a sixth bit says that more follow. Seven have 32 bits.
_RUN = re.compile("[P-o]{0,6}[0-O]")


def instances_path(directory: Path) -> Path:
    return directory / "annotations" / "instances_default.json"


def keypoints_path(directory: Path) -> Path:
    return directory / "annotations" / "person_keypoints_default.json"


def read_shapes(directory: Path, drawn: Drawn) -> Iterator[Shape]:
    """Yield the areas of all instances in the order of the file. Raises UnusableFile."""
    path = instances_path(directory)
    content = read_json(path, _INSTANCES, 'export "COCO 1.0" and unpack it in the directory')
    seeds = _seeds_of(content.images, path, drawn)
    names = {category.id: category.name for category in content.categories}
    for annotation in content.annotations:
        where = f"annotation {annotation.id}"
        seed = _looked_up(annotation.image_id, seeds, path, where=where, what="image")
        name = _looked_up(annotation.category_id, names, path, where=where, what="category")
        where += f" ({name!r})"
        yield Shape(seed, path, where, name, _area(annotation.segmentation, drawn.size(seed), path, where=where))


def read_keypoints(directory: Path, drawn: Drawn) -> Iterator[Keypoint]:
    """Yield the keypoints of all annotations in the order of the file. Raises UnusableFile."""
    path = keypoints_path(directory)
    content = read_json(path, _POINT_SETS, 'export "COCO Keypoints 1.0" and unpack it in the directory')
    seeds = _seeds_of(content.images, path, drawn)
    skeletons = {category.id: category.keypoints for category in content.categories if category.keypoints}
    if len(skeletons) != 1:
        raise UnusableFile(path, f"has {len(skeletons)} categories with keypoints; exactly one is needed")
    for annotation in content.annotations:
        where = f"annotation {annotation.id}"
        seed = _looked_up(annotation.image_id, seeds, path, where=where, what="image")
        names = _looked_up(annotation.category_id, skeletons, path, where=where, what="keypoint category")
        numbers = annotation.keypoints
        if len(numbers) != 3 * len(names):
            raise UnusableFile(path, f"{where} has {len(numbers)} numbers for {len(names)} keypoints; each needs 3")
        for name, x, y, visible in zip(names, numbers[::3], numbers[1::3], numbers[2::3], strict=True):
            yield Keypoint(seed, path, f"{where} ({name!r})", name, x, y, visible)


def _seeds_of(images: list[_Image], path: Path, drawn: Drawn) -> dict[int, int]:
    names: dict[int, str] = {}  # by seed
    seeds: dict[int, int] = {}
    for image in images:
        seed = seed_in(PureWindowsPath(image.file_name).name, drawn)
        if seed is None:
            raise UnusableFile(
                path, f"lists the image {image.file_name!r}; dataset.json has no image whose seed is in that name"
            )
        if seed in names:
            raise UnusableFile(path, f"lists {names[seed]!r} and {image.file_name!r}, both of seed {seed}; keep one")
        if image.id in seeds:
            raise UnusableFile(path, f"lists the image {image.file_name!r} with the id {image.id} of another image")
        check_size((image.height, image.width), drawn.size(seed), path, what=f"says that {image.file_name} is")
        names[seed], seeds[image.id] = image.file_name, seed
    for seed in drawn.images:
        if seed not in names:
            raise UnusableFile(path, f"does not list the image {image_name(seed)} of dataset.json; annotate it too")
    return seeds


def _looked_up(key: int, known: Mapping[int, T], path: Path, *, where: str, what: str) -> T:
    if key not in known:
        raise UnusableFile(path, f"{where} has the {what} id {key}, which the file does not list")
    return known[key]


def _area(segmentation: list[list[float]] | _Rle, size: Size, path: Path, *, where: str) -> npt.NDArray[np.bool_]:
    """Return the pixels, bool [R,R], that an instance covers."""
    if isinstance(segmentation, _Rle):
        check_size(segmentation.size, size, path, what=f"{where} has run lengths for")
        counts = segmentation.counts if isinstance(segmentation.counts, list) else _run_lengths(segmentation.counts)
        if counts is None or min(counts, default=0) < 0 or sum(counts) != size[0] * size[1]:
            raise UnusableFile(path, f"{where} has run lengths that do not add up to its image; export it again")
        encoded = pycocotools.mask.frPyObjects({"size": list(size), "counts": counts}, *size)
    else:
        if not segmentation:
            raise UnusableFile(path, f"{where} has a box and no area; draw a polygon or a mask")
        for polygon in segmentation:
            if len(polygon) < 6 or len(polygon) % 2:
                raise UnusableFile(path, f"{where} has a polygon of {len(polygon)} numbers; it needs three points")
            check_points(list(zip(polygon[::2], polygon[1::2], strict=True)), size, path, where=where)
            _check_length(polygon, size, path, where=where)
        encoded = pycocotools.mask.merge(pycocotools.mask.frPyObjects(segmentation, *size))
    return pycocotools.mask.decode(encoded) > 0


def _check_length(polygon: list[float], size: Size, path: Path, *, where: str) -> None:
    """Limit the length of an outline: pycocotools walks along it in fifths of a pixel and stores every step."""
    points = np.reshape(polygon, (-1, 2))  # [P,2]
    if np.abs(points - np.roll(points, 1, axis=0)).sum() > 4 * size[0] * size[1]:
        raise UnusableFile(path, f"{where} has an outline longer than those of all pixels together; draw it again")


def _run_lengths(text: str) -> list[int] | None:
    """Return the run lengths of a compressed RLE, or None if the string is not one. From the fourth number on, each is
    the difference to the run two places before it (cocodataset/cocoapi, common/maskApi.c, rleToString)."""
    if not re.fullmatch(f"({_RUN.pattern})*", text):
        return None
    counts: list[int] = []
    for run in _RUN.findall(text):
        digits = [ord(character) - ord("0") for character in run]
        value = sum((digit & 31) << 5 * place for place, digit in enumerate(digits))
        if digits[-1] & 16:  # the sign
            value -= 1 << 5 * len(digits)
        counts.append(value + counts[-2] if len(counts) > 2 else value)
    return counts
