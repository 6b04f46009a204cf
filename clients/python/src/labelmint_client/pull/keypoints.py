"""Writes keypoints: a position and a confidence for each name.

Rules of this file:
- COCO gets `keypoints.json`, with one annotation per image. The box is the whole image, because the generator draws one
  object that fills it. A keypoint with a confidence below MIN_CONFIDENCE counts as not labeled: its visibility and
  coordinates are 0. The visibility of the others is 2.
- Left and right in a model's names are those of the image; COCO uses those of the person. So the model's `left_eye` is
  `right_eye` in COCO.
- YOLO and labelme label the same keypoints. They keep the model's names.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from labelmint_client import Model, Sample
from labelmint_client.pull.directory import Json, to_json
from labelmint_client.pull.formats import LabelmeShape, LabelMode, MdsColumn, Written, YoloLine, in_yaml
from labelmint_client.pull.pixels import Bytes
from labelmint_client.pull.sides import SIDES, of_the_person
from labelmint_client.pull.skeleton import skeleton

MIN_CONFIDENCE = 0.1

HAS_LABEL_IMAGE = False
NO_FIELDS: dict[str, Any] = {"keypoints": []}
COLUMN = "keypoints"
COCO_NOTE = SIDES
CALLS = {
    "webdataset": 'sample["json"]["keypoints"][0]',
    "folder": """import json
from pathlib import Path

for path in sorted(Path("keypoints").iterdir()):
    print(path.stem, json.loads(path.read_text())[0])""",
    "coco": "keypoints.json",
    "mds": 'sample["keypoints"].shape',
}


def fields(sample: Sample, model: Model) -> dict[str, Any]:
    assert sample.keypoints is not None, "the keypoints were left out"
    return {
        "keypoints": [
            {"name": name, "x": x, "y": y, "confidence": confidence}
            for name, (x, y, confidence) in zip(model.keypoint_names, sample.keypoints.tolist(), strict=True)
        ]
    }


def members(written: Written) -> dict[str, bytes]:
    """Return no members, because the JSON of the sample has the keypoints."""
    return {}


def file(written: Written, palette: Bytes | None) -> tuple[str, bytes]:
    return f"keypoints/{written.key}.json", to_json(written.evidence["keypoints"])


def metadata(line: Json, path: str) -> Json:
    return {"keypoints": line["keypoints"]}


def column_type() -> Any:
    import pyarrow as pa

    real = pa.float32()
    return pa.list_(pa.struct([("name", pa.string()), ("x", real), ("y", real), ("confidence", real)]))


def cell(written: Written, palette: Bytes | None) -> Any:
    return written.evidence["keypoints"]


def coco_annotations(written: Written, model: Model) -> list[Json]:
    points, side = written.evidence["keypoints"], model.resolution
    found = [point["confidence"] >= MIN_CONFIDENCE for point in points]
    triples = [(p["x"], p["y"], 2) if here else (0, 0, 0) for p, here in zip(points, found, strict=True)]
    return [
        {
            "category_id": 1,
            "iscrowd": 0,
            "area": side * side,
            "bbox": [0, 0, side, side],
            "keypoints": [value for triple in triples for value in triple],
            "num_keypoints": sum(found),
        }
    ]


def coco_files(model: Model) -> list[tuple[str, list[Json], str]]:
    names = [of_the_person(keypoint) for keypoint in model.keypoint_names]
    category: Json = {"id": 1, "name": model.name, "supercategory": model.name, "keypoints": names}
    category["skeleton"] = skeleton(model.keypoint_names)
    return [("keypoints.json", [category], "")]


def yolo_lines(written: Written, model: Model) -> list[YoloLine]:
    """Return one pose, whose box is the whole image. YOLO counts coordinates from the edge of the image."""
    line: list[float | int] = [0.5, 0.5, 1.0, 1.0]
    for point in written.evidence["keypoints"]:
        found = point["confidence"] >= MIN_CONFIDENCE
        line += (
            [(point["x"] + 0.5) / model.resolution, (point["y"] + 0.5) / model.resolution, 2] if found else [0, 0, 0]
        )
    return [(0, line)]


def yolo_facts(model: Model) -> dict[str, str]:
    """Return names, and for a flip of the image from left to right: which keypoint takes the place of each."""
    names = list(model.keypoint_names)
    others = [of_the_person(name) for name in names]
    places = [names.index(other) if other in names else place for place, other in enumerate(others)]
    return {
        "names": in_yaml([model.name]),
        "kpt_shape": in_yaml([len(names), 3]),
        "flip_idx": in_yaml(places),
        "kpt_names": f"{{0: {in_yaml(names)}}}",
    }


def labelme_shapes(written: Written, model: Model) -> list[LabelmeShape]:
    """Return a point for each keypoint that was found. labelme counts coordinates from the edge of the image."""
    return [
        (point["name"], "point", [(point["x"] + 0.5, point["y"] + 0.5)])
        for point in written.evidence["keypoints"]
        if point["confidence"] >= MIN_CONFIDENCE
    ]


def mds_column(model: Model) -> MdsColumn:
    count = len(model.keypoint_names)
    return "keypoints", f"ndarray:float32:{count},3", count * 3 * 4


def mds_value(written: Written) -> dict[str, bytes]:
    points = [(point["x"], point["y"], point["confidence"]) for point in written.evidence["keypoints"]]
    return {"keypoints": np.array(points, "<f4").tobytes()}


def remarks(name: str, label_mode: LabelMode) -> list[str]:
    return [f"In `keypoints.json` {SIDES}."] if name == "coco" else []
