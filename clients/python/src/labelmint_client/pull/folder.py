"""Samples as a directory of images and a directory of labels: `images/SEED.png` and `labels/SEED.png`.

Rules of this file:
- A label is a palette PNG whose indices are class ids. A model of keypoints has `keypoints/SEED.json` instead.
"""

from __future__ import annotations

from labelmint_client import Model
from labelmint_client.pull.directory import Json, PullDirectory, to_json
from labelmint_client.pull.formats import Kept, Written
from labelmint_client.pull.pixels import image_png, label_png


class Writer:
    """Two files a sample."""

    def __init__(self, directory: PullDirectory, model: Model, shards: int) -> None:
        self._directory = directory
        self._palette = model.palette

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
        return []
