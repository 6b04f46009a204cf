"""Samples as a directory of images and a directory of labels: `images/SEED.png` and `labels/SEED.png`.

Rules of this file:
- A label is a palette PNG whose indices are class ids, or a gray PNG whose values they are. A model of keypoints has
  `keypoints/SEED.json` instead.
- `metadata.jsonl` pairs images and labels for the `imagefolder` of Hugging Face `datasets`.
"""

from __future__ import annotations

from labelmint_client import Model
from labelmint_client.pull.directory import Json, PullDirectory, to_json
from labelmint_client.pull.formats import Kept, LabelMode, Written
from labelmint_client.pull.pixels import image_png, label_png

METADATA = "metadata.jsonl"


class Writer:
    """Two files a sample."""

    def __init__(self, directory: PullDirectory, model: Model, label_mode: LabelMode) -> None:
        self._directory = directory
        self._palette = model.palette if label_mode == "palette" else None

    def reopen(self, files: list[Json], samples: int) -> None:
        pass  # what the shard has so far are files of their own

    def add(self, written: Written) -> Kept:
        image = self._directory.write(f"images/{written.key}.png", image_png(written.image))
        if written.label is None:
            points = to_json(written.evidence["keypoints"])
            return Kept([image, self._directory.write(f"keypoints/{written.key}.json", points)])
        label = label_png(written.label, self._palette)
        return Kept([image, self._directory.write(f"labels/{written.key}.png", label)])

    def end_shard(self, index: int) -> list[Json]:
        return []

    def finish(self) -> list[Json]:
        with self._directory.aside.open("wb") as file:
            for part in self._directory.parts():
                file.writelines(to_json(_metadata(sample["line"])) for sample in part["samples"])
        return [self._directory.publish(METADATA)]


def _metadata(line: Json) -> Json:
    image, answer = (file["path"] for file in line["files"])
    answers = {"keypoints": line["keypoints"]} if line["keypoints"] else {"label_file_name": answer}
    return {"file_name": image, **answers, "seed": line["seed"], "js_score": line["js_score"]}
