"""Writes what was drawn on the page as files that labelme and CVAT open.

Rules of this file:
- A class of an image becomes one bitmap (labelme) or one run-length mask (COCO), because strokes overlap and polygons
  would not keep single pixels.
- Keypoints become COCO keypoints, one skeleton without edges for each image. labelme's points are not read back by
  `labelmint fit`, so they are not written.
- A pixel that nobody drew is in no shape. `labelmint fit` reads it as not drawn with `--unlabelled
  ignore` or `extend`.
- Only a file that this module wrote is replaced, so that nothing that was drawn elsewhere is lost.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from labelmint.annotate.strokes import Area, Mask, runs_of
from labelmint.core.errors import InvalidRequest, UnusableFile
from labelmint.core.task import task_of
from labelmint.models.annotations import UNDRAWN, AnnotatedDataset, coco, image_path
from labelmint.models.annotations.directory import image_name
from labelmint.models.annotations.files import write_json

Elsewhere = Literal["labelme", "coco"]
_MARK = "written_by"
_US = "labelmint annotate"


def write_elsewhere(directory: Path, dataset: AnnotatedDataset, file_format: Elsewhere) -> list[Path]:
    """Write what is drawn; returns the files. Raises UnusableFile for the file of another tool, InvalidRequest."""
    names, labels = dataset.names, dataset.labels
    if not task_of(dataset.task).has_label_image:
        if file_format != "coco":
            raise InvalidRequest("format", f"{file_format} is for masks only; choose coco for keypoints")
        files = {coco.keypoints_path(directory): _coco_keypoints(dataset)}
    elif file_format == "labelme":
        files = {
            image_path(directory, seed).with_suffix(".json"): _labelme(seed, labels[seed], names) for seed in labels
        }
    else:
        files = {coco.instances_path(directory): _coco(labels, names)}
    for path in files:
        _check_ours(path)
    for path, content in files.items():
        path.parent.mkdir(exist_ok=True)
        write_json(path, {**content, _MARK: _US})
    return list(files)


def _check_ours(path: Path) -> None:
    if not path.exists():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get(_MARK) != _US:
        raise UnusableFile(path, "was saved by another tool; move it away first, so that nothing drawn there is lost")


def _labelme(seed: int, mask: Mask, names: tuple[str, ...]) -> dict[str, Any]:
    shapes: list[dict[str, Any]] = []
    for each in _drawn(mask):
        (top, bottom), (left, right) = (_ends((mask == each).any(axis=axis)) for axis in (1, 0))
        picture = Image.fromarray(mask[top : bottom + 1, left : right + 1] == each)  # of one bit
        data = io.BytesIO()
        picture.save(data, "PNG")
        shapes.append(
            {
                "label": names[each],
                "shape_type": "mask",
                "points": [[left, top], [right, bottom]],
                "mask": base64.b64encode(data.getvalue()).decode(),
                "group_id": None,
                "description": "",
                "flags": {},
            }
        )
    height, width = mask.shape
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": image_name(seed),
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }


def _coco(masks: Mapping[int, Mask], names: tuple[str, ...]) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for number, mask in enumerate(masks.values(), start=1):
        for each in _drawn(mask):
            annotations.append(_annotation(len(annotations) + 1, number, each + 1, area=mask == each))
    categories = [{"id": index, "name": name, "supercategory": ""} for index, name in enumerate(names, start=1)]
    return {"images": _coco_images(masks), "categories": categories, "annotations": annotations}


def _coco_keypoints(dataset: AnnotatedDataset) -> dict[str, Any]:
    annotations = []
    for number, points in enumerate(dataset.labels.values(), start=1):
        placed = points[points[:, 2] > 0, :2]  # [P,2]
        corners = np.stack([placed.min(axis=0), placed.max(axis=0)]) if len(placed) else np.zeros((2, 2))
        (left, top), (right, bottom) = corners.tolist()
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1,
                "keypoints": points.flatten().tolist(),
                "num_keypoints": len(placed),
                "area": (right - left) * (bottom - top),
                "bbox": [left, top, right - left, bottom - top],
                "iscrowd": 0,
            }
        )
    skeleton = {"id": 1, "name": "keypoints", "supercategory": "", "keypoints": list(dataset.names), "skeleton": []}
    return {"images": _coco_images(dataset.images), "categories": [skeleton], "annotations": annotations}


def _coco_images(pictures: Mapping[int, Mask]) -> list[dict[str, Any]]:
    """Describe masks [R,R] or images [R,R,3], numbered in their order from 1."""
    sizes = {seed: each.shape for seed, each in pictures.items()}
    return [
        {"id": number, "file_name": image_name(seed), "height": height, "width": width}
        for number, (seed, (height, width, *_)) in enumerate(sizes.items(), start=1)
    ]


def _annotation(number: int, image: int, category: int, *, area: Area) -> dict[str, Any]:
    (top, bottom), (left, right) = (_ends(area.any(axis=axis)) for axis in (1, 0))
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        # COCO counts column by column.
        "segmentation": {"counts": runs_of(area.T), "size": list(area.shape)},
        "area": int(np.count_nonzero(area)),
        "bbox": [left, top, right - left + 1, bottom - top + 1],
        "iscrowd": 1,
    }


def _drawn(mask: Mask) -> list[int]:
    return [int(each) for each in np.unique(mask) if each != UNDRAWN]


def _ends(line: Area) -> tuple[int, int]:
    """The first and the last true place of a line bool [R]."""
    places = np.flatnonzero(line)
    return int(places[0]), int(places[-1])
