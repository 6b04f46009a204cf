"""The table of the formats of a pull: what each is for, and what it can hold.

Rules of this file:
- It needs no library of the extra `pull`, so that `labelmint pull --help` lists the formats without it.
- The module `pull/NAME.py` writes the format NAME.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PullFormat:
    """
    about: what the format is for, in a few words.
    data: the files that Hugging Face `datasets` opens; empty if it cannot open the format.
    label_modes: whether labels are PNGs that `label_mode` may make gray.
    only_label_images: whether the format holds only label images, and so no keypoints.
    """

    about: str
    data: tuple[str, ...] = ()
    label_modes: bool = False
    only_label_images: bool = False


PULL_FORMATS: Mapping[str, PullFormat] = {
    "webdataset": PullFormat("tar shards for streaming", ("shard-*.tar",)),
    "coco": PullFormat("instances or keypoints in JSON", ("images/*.png",)),
    "folder": PullFormat("PNG images and labels", ("images/*.png", "metadata.jsonl"), label_modes=True),
    "parquet": PullFormat("tables for Hugging Face datasets", ("data/train-*.parquet",), label_modes=True),
    "masks": PullFormat("PNG images and gray masks of class ids", ("images/*.png",), only_label_images=True),
    "voc": PullFormat("PASCAL VOC", ("VOCdevkit/VOC2012/JPEGImages/*.jpg",), only_label_images=True),
    "yolo": PullFormat("segments or poses for Ultralytics YOLO", ("images/*.png",)),
    "labelme": PullFormat("polygons or points to correct in labelme", ("images/*.png",)),
    "mds": PullFormat("shards for Mosaic Streaming"),
}

LABEL_MODES = tuple(name for name, each in PULL_FORMATS.items() if each.label_modes)
