"""The README.md of a pulled directory: what it is, and the calls that open it.

Rules of this file:
- Its head is what Hugging Face `datasets` reads: which files are data, so that it does not guess.
- Each call is as a reader would type it in the directory, and tests/clients/pull/test_opening.py types them.
"""

from __future__ import annotations

from labelmint_client import Model
from labelmint_client.pull.formats import LabelMode
from labelmint_client.pull.sides import SIDES

README = "README.md"

_DATA = {
    "webdataset": ("shard-*.tar",),
    "folder": ("images/*.png", "metadata.jsonl"),
    "parquet": ("data/train-*.parquet",),
    "coco": ("images/*.png",),
}
_DATASETS = """import os

import datasets

rows = datasets.load_dataset(os.getcwd(), split="train")  # it takes no "."
print(rows)"""
_WEBDATASET = """from glob import glob

import webdataset

for sample in webdataset.WebDataset(sorted(glob("shard-*.tar")), shardshuffle=False).decode("pil"):
    print(sample["__key__"], sample["image.png"].size, {answer})"""
_FOLDER = """from pathlib import Path

import numpy
from PIL import Image

for path in sorted(Path("images").iterdir()):
    image = numpy.asarray(Image.open(path))
    class_ids = numpy.asarray(Image.open(Path("labels", path.name)))
    print(path.stem, image.shape, class_ids.shape, class_ids.max())"""
_FOLDER_POINTS = """import json
from pathlib import Path

for path in sorted(Path("keypoints").iterdir()):
    print(path.stem, json.loads(path.read_text())[0])"""
_PARQUET = """import pandas

table = pandas.read_parquet("data")
print(table[["seed", "js_score"]])"""
_COCO = """from pycocotools.coco import COCO

coco = COCO("annotations/{name}")
print(len(coco.imgs), len(coco.anns))"""

_PALETTE = """The labels are palette PNGs: the palette indices are the class ids, which PIL reads. A reader that
turns them into gray (OpenCV's IMREAD_GRAYSCALE, torchvision, PIL's convert("L")) gives the gray of the palette's
colours, which are no class ids. `labelmint pull --label-mode ids` writes class ids as gray, for every reader."""
_IDS = "The labels are gray PNGs: the values are the class ids. They look black, because class ids are small numbers."
_EXACT = """`instances.json` has polygons along the edges of pixels, which pycocotools fills exactly. OpenCV's fillPoly
draws the border too, so that its regions are up to a pixel larger; `instances_rle.json` has the same regions as run
lengths, which are exact in every reader. Hugging Face `datasets` finds the images alone."""


def readme(name: str, label_mode: LabelMode, model: Model) -> str:
    """Of a pull in the format of that name."""
    points = model.task == "keypoints"
    paths = "".join(f"\n      - {path!r}" for path in _DATA[name])
    head = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path:{paths}\n---\n"
    calls = [_call(name, points), _DATASETS]
    told = [
        f"# {model.name}",
        f"Samples of the model `{model.name}`, version {model.version}, minted by labelmint. `manifest.json` has the "
        "options, the\nmodel and the SHA-256 of the files, `samples.jsonl` a line for each sample.",
        "In this directory, any of these opens it:",
        *(f"```python\n{call}\n```" for call in calls),
        *_remarks(name, label_mode, points),
    ]
    return head + "\n\n".join(told) + "\n"


def _call(name: str, points: bool) -> str:
    if name == "webdataset":
        return _WEBDATASET.replace(
            "{answer}", 'sample["json"]["keypoints"][0]' if points else 'sample["label.npy"].shape'
        )
    if name == "folder":
        return _FOLDER_POINTS if points else _FOLDER
    if name == "parquet":
        return _PARQUET
    return _COCO.replace("{name}", "keypoints.json" if points else "instances.json")


def _remarks(name: str, label_mode: LabelMode, points: bool) -> list[str]:
    if name == "coco":
        return [f"In `keypoints.json` {SIDES}." if points else _EXACT]
    if name in ("folder", "parquet") and not points:
        return [_IDS if label_mode == "ids" else _PALETTE]
    return []
