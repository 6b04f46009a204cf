"""Writes samples as tar shards for WebDataset, byte for byte like the gateway's samples.tar.

Rules of this file:
- The same samples give the same bytes: the headers are ustar, without a time or an owner.
- The members of a sample are `image.png`, the label members of its task (segmentation: `label.npy`), and `json`.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from typing import BinaryIO

from labelmint_client import Model
from labelmint_client.pull.directory import Json, PullDirectory
from labelmint_client.pull.formats import Kept, LabelMode, Written
from labelmint_client.pull.labels import labels_of
from labelmint_client.pull.pixels import image_png

CALL = """from glob import glob

import webdataset

for sample in webdataset.WebDataset(sorted(glob("shard-*.tar")), shardshuffle=False).decode("pil"):
    print(sample["__key__"], sample["image.png"].size, {answer})"""

_END = b"\0" * (2 * tarfile.BLOCKSIZE)


class Writer:
    """Writes one file per shard: `shard-000000.tar` and so on."""

    def __init__(self, directory: PullDirectory, model: Model, label_mode: LabelMode) -> None:
        self._directory = directory
        self._labels = labels_of(model)
        self._archive: BinaryIO | None = None

    def reopen(self, files: list[Json], samples: int) -> None:
        (file,) = files
        with (self._directory.path / file["path"]).open("rb") as before:
            self._archive = self._directory.aside.open("wb")
            shutil.copyfileobj(before, self._archive)
        self._archive.seek(file["bytes"] - len(_END))
        self._archive.truncate()

    def add(self, written: Written) -> Kept:
        if self._archive is None:
            self._archive = self._directory.aside.open("wb")
        members = {
            "image.png": image_png(written.image),
            **self._labels.members(written),
            "json": json.dumps({**written.evidence, "next_seed": written.seed + 1}, sort_keys=True).encode(),
        }
        for suffix, data in members.items():
            header = tarfile.TarInfo(f"{written.key}.{suffix}")  # mode 0644, owner 0 without a name, time 0
            header.size = len(data)
            self._archive.write(header.tobuf(tarfile.USTAR_FORMAT) + data + b"\0" * (-len(data) % tarfile.BLOCKSIZE))
        return Kept()

    def end_shard(self, index: int) -> list[Json]:
        assert self._archive is not None, "a shard has at least one sample"
        self._archive.write(_END)
        self._archive.close()
        self._archive = None
        return [self._directory.publish(f"shard-{index:06d}.tar")]

    def finish(self) -> list[Json]:
        return []
