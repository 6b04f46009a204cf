"""Writes samples as a directory of images and a directory of labels: `images/SEED.png`, and `labels/SEED.png` or
`keypoints/SEED.json`.

Rules of this file:
- `metadata.jsonl` pairs images and labels for the `imagefolder` loader of Hugging Face `datasets`.
"""

from __future__ import annotations

from labelmint_client import Model
from labelmint_client.pull.directory import Json, PullDirectory, to_json
from labelmint_client.pull.formats import Kept, LabelMode, Written
from labelmint_client.pull.labels import labels_of
from labelmint_client.pull.pixels import image_png

CALL = "{answer}"
METADATA = "metadata.jsonl"


class Writer:
    """Writes two files per sample."""

    def __init__(self, directory: PullDirectory, model: Model, label_mode: LabelMode) -> None:
        self._directory = directory
        self._labels = labels_of(model)
        self._palette = model.palette if label_mode == "palette" else None

    def reopen(self, files: list[Json], samples: int) -> None:
        pass  # nothing to reopen: each sample of the shard has its own files

    def add(self, written: Written) -> Kept:
        image = self._directory.write(f"images/{written.key}.png", image_png(written.image))
        return Kept([image, self._directory.write(*self._labels.file(written, self._palette))])

    def end_shard(self, index: int) -> list[Json]:
        return []

    def finish(self) -> list[Json]:
        with self._directory.aside.open("wb") as file:
            for part in self._directory.parts():
                file.writelines(to_json(self._metadata(sample["line"])) for sample in part["samples"])
        return [self._directory.publish(METADATA)]

    def _metadata(self, line: Json) -> Json:
        image, label = (file["path"] for file in line["files"])
        labels = self._labels.metadata(line, label)
        return {"file_name": image, **labels, "seed": line["seed"], "js_score": line["js_score"]}
