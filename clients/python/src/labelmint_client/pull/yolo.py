"""Writes samples for Ultralytics YOLO: `images/SEED.png`, `labels/SEED.txt`, and `data.yaml`.

Rules of this file:
- A line of `labels/SEED.txt` depends on the task: a part of a class as a polygon, or the points of a pose. So
  `segmentation.py` and `keypoints.py` create the lines.
- Coordinates are shares of the image with six decimals.
- `data.yaml` names no directory, so that the pull can be moved: its readers then take its own.
"""

from __future__ import annotations

from labelmint_client import Model
from labelmint_client.pull.directory import Json, PullDirectory
from labelmint_client.pull.formats import Kept, LabelMode, Written
from labelmint_client.pull.labels import labels_of
from labelmint_client.pull.pixels import image_png

CALL = """from ultralytics.data.dataset import YOLODataset
from ultralytics.data.utils import check_det_dataset

data = check_det_dataset("data.yaml")
task = "pose" if "kpt_shape" in data else "segment"
for sample in YOLODataset(data["train"], data=data, task=task, augment=False).get_labels():
    print(sample["im_file"], [data["names"][int(i)] for i in sample["cls"].ravel()])"""

_HEAD = """# `yolo segment train data=data.yaml`, or `yolo pose train data=data.yaml`
train: images
# Readers demand this line. Name the images of another pull here, to validate on samples that were not trained on.
val: images
"""


class Writer:
    """Writes two files per sample."""

    def __init__(self, directory: PullDirectory, model: Model, label_mode: LabelMode) -> None:
        self._directory = directory
        self._model = model
        self._labels = labels_of(model)

    def reopen(self, files: list[Json], samples: int) -> None:
        pass  # nothing to reopen: each sample of the shard has its own files

    def add(self, written: Written) -> Kept:
        lines = "".join(
            " ".join([str(class_id), *(f"{share:.6f}" if isinstance(share, float) else str(share) for share in values)])
            + "\n"
            for class_id, values in self._labels.yolo_lines(written, self._model)
        )
        image = self._directory.write(f"images/{written.key}.png", image_png(written.image))
        return Kept([image, self._directory.write(f"labels/{written.key}.txt", lines.encode("ascii"))])

    def end_shard(self, index: int) -> list[Json]:
        return []

    def finish(self) -> list[Json]:
        facts = self._labels.yolo_facts(self._model)
        lines = (f"{name}: {value}\n" for name, value in facts.items())
        return [self._directory.write("data.yaml", (_HEAD + "".join(lines)).encode())]
