"""Writes samples for the program labelme: `images/SEED.png`, `images/SEED.json`, and the names in `labels.txt`.

Rules of this file:
- The task decides on the shapes: polygons of the parts of each class, or points. So `segmentation.py` and
  `keypoints.py` create them.
- `labelmint fit --mask-format labelme` reads these files next to the images of `labelmint synth`.
"""

from __future__ import annotations

import json

from labelmint_client import Model
from labelmint_client.pull.directory import Json, PullDirectory
from labelmint_client.pull.formats import Kept, LabelMode, Written, names_txt
from labelmint_client.pull.labels import labels_of
from labelmint_client.pull.pixels import image_png
from labelmint_client.tasks import task_of

CALL = """# To correct the labels: labelme images --labels labels.txt
import json
from pathlib import Path

for path in sorted(Path("images").glob("*.json")):
    shapes = json.loads(path.read_text())["shapes"]
    print(path.stem, [(shape["label"], shape["shape_type"], len(shape["points"])) for shape in shapes])"""

_VERSION = "5.5.0"  # of labelme, since which the fields of a file are these


class Writer:
    """Writes two files per sample."""

    def __init__(self, directory: PullDirectory, model: Model, label_mode: LabelMode) -> None:
        self._directory = directory
        self._model = model
        self._labels = labels_of(model)

    def reopen(self, files: list[Json], samples: int) -> None:
        pass  # nothing to reopen: each sample of the shard has its own files

    def add(self, written: Written) -> Kept:
        height, width, _ = written.image.shape
        content: Json = {
            "version": _VERSION,
            "flags": {},
            "shapes": [
                {
                    "label": name,
                    "points": [list(point) for point in points],
                    "group_id": None,
                    "description": "",
                    "shape_type": kind,
                    "flags": {},
                    "mask": None,
                }
                for name, kind, points in self._labels.labelme_shapes(written, self._model)
            ],
            "imagePath": f"{written.key}.png",
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }
        image = self._directory.write(f"images/{written.key}.png", image_png(written.image))
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        return Kept([image, self._directory.write(f"images/{written.key}.json", text.encode("ascii"))])

    def end_shard(self, index: int) -> list[Json]:
        return []

    def finish(self) -> list[Json]:
        names = getattr(self._model, task_of(self._model).names)
        return [self._directory.write("labels.txt", names_txt(names))]
