"""Writes samples as images and masks: `images/SEED.png`, `masks/SEED.png`, and the class names in `classes.txt`.

Rules of this file:
- A mask is a gray PNG whose values are the class ids. An ignored pixel is 255.
- `classes.txt` has the name of class 0 in its first line, and so on.
"""

from __future__ import annotations

from labelmint_client import Model
from labelmint_client.pull.directory import Json, PullDirectory
from labelmint_client.pull.formats import Kept, LabelMode, Written, label_of, names_txt
from labelmint_client.pull.pixels import image_png, label_png

CALL = """from pathlib import Path

import numpy
from PIL import Image

names = Path("classes.txt").read_text().splitlines()
for path in sorted(Path("masks").iterdir()):
    image = numpy.asarray(Image.open(Path("images", path.name)))
    class_ids = numpy.asarray(Image.open(path))  # 255 where ignored
    print(path.stem, image.shape, class_ids.shape, [names[i] for i in numpy.unique(class_ids) if i < 255])"""


class Writer:
    """Writes two files per sample."""

    def __init__(self, directory: PullDirectory, model: Model, label_mode: LabelMode) -> None:
        self._directory = directory
        self._names = model.class_names

    def reopen(self, files: list[Json], samples: int) -> None:
        pass  # nothing to reopen: each sample of the shard has its own files

    def add(self, written: Written) -> Kept:
        image = self._directory.write(f"images/{written.key}.png", image_png(written.image))
        return Kept([image, self._directory.write(f"masks/{written.key}.png", label_png(label_of(written), None))])

    def end_shard(self, index: int) -> list[Json]:
        return []

    def finish(self) -> list[Json]:
        return [self._directory.write("classes.txt", names_txt(self._names))]
