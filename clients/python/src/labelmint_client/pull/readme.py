"""The README.md of a pulled directory: what it is, and the calls that open it.

Rules of this file:
- Its head is what Hugging Face `datasets` reads: which files are data, so that it does not guess.
- Each call is as a reader would type it in the directory, and tests/clients/pull/test_opening.py types them.
"""

from __future__ import annotations

from labelmint_client import Model
from labelmint_client.pull.formats import LabelMode
from labelmint_client.pull.labels import Labels, labels_of

README = "README.md"

_DATA = {
    "webdataset": ("shard-*.tar",),
    "folder": ("images/*.png", "metadata.jsonl"),
    "parquet": ("data/train-*.parquet",),
    "coco": ("images/*.png",),
}
_DATASETS = """import os

import datasets

rows = datasets.load_dataset(os.getcwd(), split="train")
print(rows)"""
_WEBDATASET = """from glob import glob

import webdataset

for sample in webdataset.WebDataset(sorted(glob("shard-*.tar")), shardshuffle=False).decode("pil"):
    print(sample["__key__"], sample["image.png"].size, {answer})"""
_PARQUET = """import pandas

table = pandas.read_parquet("data")
print(table[["seed", "js_score"]])"""
_COCO = """from pycocotools.coco import COCO

coco = COCO("annotations/{name}")
print(len(coco.imgs), len(coco.anns))"""


def readme(name: str, label_mode: LabelMode, model: Model) -> str:
    """Of a pull in the format of that name."""
    labels = labels_of(model)
    paths = "".join(f"\n      - {path!r}" for path in _DATA[name])
    head = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path:{paths}\n---\n"
    calls = [_call(name, labels), _DATASETS]
    told = [
        f"# {model.name}",
        f"Samples of the model `{model.name}`, version {model.version}, minted by labelmint. `manifest.json` has the "
        "options, the\nmodel and the SHA-256 of the files, `samples.jsonl` a line for each sample.",
        "In this directory, any of these opens it:",
        *(f"```python\n{call}\n```" for call in calls),
        *labels.remarks(name, label_mode),
    ]
    return head + "\n\n".join(told) + "\n"


def _call(name: str, labels: Labels) -> str:
    if name == "webdataset":
        return _WEBDATASET.replace("{answer}", labels.CALLS[name])
    if name == "coco":
        return _COCO.replace("{name}", labels.CALLS[name])
    return _PARQUET if name == "parquet" else labels.CALLS[name]
