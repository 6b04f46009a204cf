"""Samples as COCO: `images/SEED.png`, and `annotations/` beside them.

Rules of this file:
- Segmentation gives `instances.json` with polygons and `instances_rle.json` with run lengths: an annotation for each
  connected region of a class, the same in both but for `segmentation`. Area and box are those of exactly these pixels.
- Category ids are class ids. Class 0 is the background, which is no category; ignored pixels belong to no annotation.
- Keypoints give `keypoints.json`: an annotation for each image. The box is the image, because the generator draws one
  object that fills it. A keypoint of less than MIN_CONFIDENCE is not labelled: visibility and coordinates 0, else 2.
- A model's left and right are the image's, COCO's the person's: `left_eye` of the model is `right_eye` in COCO.
- Ids of images and annotations count from 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO

from labelmint_client import Model
from labelmint_client.pull.directory import Json, PullDirectory
from labelmint_client.pull.formats import Kept, LabelMode, Written
from labelmint_client.pull.pixels import image_png
from labelmint_client.pull.regions import Region, regions
from labelmint_client.pull.sides import SIDES, of_the_person

MIN_CONFIDENCE = 0.1


class Writer:
    """A file a sample, and one or two of annotations, which are put together at the end."""

    def __init__(self, directory: PullDirectory, model: Model, label_mode: LabelMode) -> None:
        self._directory = directory
        self._model = model

    def reopen(self, files: list[Json], samples: int) -> None:
        pass  # what the shard has so far are files of their own

    def add(self, written: Written) -> Kept:
        image = self._directory.write(f"images/{written.key}.png", image_png(written.image))
        if written.label is None:
            return Kept([image], [_points(written.evidence["keypoints"], self._model.resolution)])
        class_ids = range(1, len(self._model.class_names))
        return Kept([image], [_region(region) for region in regions(written.label, class_ids)])

    def end_shard(self, index: int) -> list[Json]:
        return []

    def finish(self) -> list[Json]:
        name = self._model.name
        if self._model.task == "keypoints":
            names = [of_the_person(keypoint) for keypoint in self._model.keypoint_names]
            points = {"keypoints": names, "skeleton": []}
            return [self._write("keypoints.json", [{"id": 1, "name": name, "supercategory": name, **points}])]
        classes = list(enumerate(self._model.class_names))[1:]
        categories = [{"id": class_id, "name": label, "supercategory": name} for class_id, label in classes]
        return [
            self._write("instances.json", categories, "polygons"),
            self._write("instances_rle.json", categories, "run_lengths"),
        ]

    def _write(self, name: str, categories: list[Json], segmentation: str = "") -> Json:
        """Item by item: one shard is in memory at a time."""
        info = {
            "description": f"{self._model.name}, minted by labelmint",
            "version": self._model.version,
            "model_digest": self._model.digest,
            **({"note": SIDES} if self._model.task == "keypoints" else {}),
        }
        with self._directory.aside.open("w", encoding="utf-8") as file:
            head = json.dumps({"info": info, "licenses": [], "categories": categories})
            file.write(head.removesuffix("}"))
            _write_list(file, "images", self._images())
            _write_list(file, "annotations", self._annotations(segmentation))
            file.write("}\n")
        return self._directory.publish(f"annotations/{name}")

    def _samples(self) -> Iterator[tuple[int, Json]]:
        """What the parts keep of each sample, and the id of its image."""
        return enumerate((sample for part in self._directory.parts() for sample in part["samples"]), 1)

    def _images(self) -> Iterator[Json]:
        side = self._model.resolution
        for image_id, sample in self._samples():
            seed = sample["line"]["seed"]
            yield {"id": image_id, "file_name": f"{seed:010d}.png", "width": side, "height": side, "seed": seed}

    def _annotations(self, segmentation: str) -> Iterator[Json]:
        """`segmentation` names which of a region's two forms is wanted; empty for keypoints, which have none."""
        kept = ((image_id, kept) for image_id, sample in self._samples() for kept in sample["annotations"])
        for annotation_id, (image_id, annotation) in enumerate(kept, 1):
            form = {"segmentation": annotation[segmentation]} if segmentation else {}
            common = {key: value for key, value in annotation.items() if key not in ("polygons", "run_lengths")}
            yield {"id": annotation_id, "image_id": image_id, **common, **form}


def _region(region: Region) -> Json:
    return {
        "category_id": region.class_id,
        "iscrowd": 0,
        "area": region.area,
        "bbox": region.box,
        "polygons": region.polygons,
        "run_lengths": region.run_lengths,
    }


def _points(keypoints: list[Json], side: int) -> Json:
    found = [point["confidence"] >= MIN_CONFIDENCE for point in keypoints]
    triples = [(p["x"], p["y"], 2) if here else (0, 0, 0) for p, here in zip(keypoints, found, strict=True)]
    return {
        "category_id": 1,
        "iscrowd": 0,
        "area": side * side,
        "bbox": [0, 0, side, side],
        "keypoints": [value for triple in triples for value in triple],
        "num_keypoints": sum(found),
    }


def _write_list(file: IO[str], name: str, items: Iterator[Json]) -> None:
    file.write(f', "{name}": [')
    for index, item in enumerate(items):
        file.write((",\n" if index else "\n") + json.dumps(item))
    file.write("]")
