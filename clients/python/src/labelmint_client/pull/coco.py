"""Samples as COCO: `images/SEED.png`, and `annotations/` beside them.

Rules of this file:
- What an annotation is depends on the task: `segmentation.py` and `keypoints.py` make them.
- Ids of images and annotations count from 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO

from labelmint_client import Model
from labelmint_client.pull.directory import Json, PullDirectory
from labelmint_client.pull.formats import Kept, LabelMode, Written
from labelmint_client.pull.labels import labels_of
from labelmint_client.pull.pixels import image_png


class Writer:
    """A file a sample, and one or two of annotations, which are put together at the end."""

    def __init__(self, directory: PullDirectory, model: Model, label_mode: LabelMode) -> None:
        self._directory = directory
        self._model = model
        self._labels = labels_of(model)

    def reopen(self, files: list[Json], samples: int) -> None:
        pass  # what the shard has so far are files of their own

    def add(self, written: Written) -> Kept:
        image = self._directory.write(f"images/{written.key}.png", image_png(written.image))
        return Kept([image], self._labels.coco_annotations(written, self._model))

    def end_shard(self, index: int) -> list[Json]:
        return []

    def finish(self) -> list[Json]:
        return [self._write(*file) for file in self._labels.coco_files(self._model)]

    def _write(self, name: str, categories: list[Json], segmentation: str) -> Json:
        """Item by item: one shard is in memory at a time."""
        info = {
            "description": f"{self._model.name}, minted by labelmint",
            "version": self._model.version,
            "model_digest": self._model.digest,
            **({"note": self._labels.COCO_NOTE} if self._labels.COCO_NOTE else {}),
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


def _write_list(file: IO[str], name: str, items: Iterator[Json]) -> None:
    file.write(f', "{name}": [')
    for index, item in enumerate(items):
        file.write((",\n" if index else "\n") + json.dumps(item))
    file.write("]")
