"""Writes samples as shards for Mosaic Streaming: `shard.00000.mds` and so on, and `index.json`.

Rules of this file:
- A shard is: the number of samples, where each begins and the last one ends, the columns in JSON, and the samples. A
  sample is the sizes of its values, without those of a fixed size, and then its values. Numbers are little-endian.
- These are the bytes of `streaming.MDSWriter`, which is not used. It keeps a whole shard in memory, cannot continue one
  that has room, and writes neither aside nor from two processes; it also needs torch and the libraries of five clouds.
- The samples are collected in a second temporary file, because the head of a shard depends on all of them.
"""

from __future__ import annotations

import json
import shutil
import struct
from itertools import accumulate, pairwise
from typing import BinaryIO

from labelmint_client import Model
from labelmint_client.pull.directory import Json, PullDirectory
from labelmint_client.pull.errors import PullError
from labelmint_client.pull.formats import Kept, LabelMode, Written
from labelmint_client.pull.labels import labels_of
from labelmint_client.pull.pixels import image_png

CALL = """from streaming import StreamingDataset

for sample in StreamingDataset(local=".", batch_size=1, shuffle=False):
    print(sample["seed"], sample["image"].size, {answer})"""

_LARGEST = 2**32 - 1  # where a sample begins is stored in four bytes


class Writer:
    """Writes one file per shard."""

    def __init__(self, directory: PullDirectory, model: Model, label_mode: LabelMode) -> None:
        self._directory = directory
        self._labels = labels_of(model)
        columns = [("image", "png", None), ("json", "json", None), ("seed", "int", 8), self._labels.mds_column(model)]
        self._names, self._encodings, self._fixed_sizes = zip(*sorted(columns), strict=True)
        self._sizes: list[int] = []  # of the samples of this shard
        self._samples: BinaryIO | None = None

    def reopen(self, files: list[Json], samples: int) -> None:
        (file,) = files
        with (self._directory.path / file["path"]).open("rb") as before:
            (count,) = struct.unpack("<I", before.read(4))
            places = struct.unpack(f"<{count + 1}I", before.read(4 * (count + 1)))
            self._sizes = [end - begin for begin, end in pairwise(places[: samples + 1])]
            before.seek(places[0])
            self._samples = self._directory.collected.open("wb")
            shutil.copyfileobj(before, self._samples)
        self._samples.seek(sum(self._sizes))
        self._samples.truncate()

    def add(self, written: Written) -> Kept:
        if self._samples is None:
            self._samples = self._directory.collected.open("wb")
        values = {
            "image": image_png(written.image),
            "json": json.dumps(written.evidence, sort_keys=True).encode("ascii"),
            "seed": struct.pack("<q", written.seed),
            **self._labels.mds_value(written),
        }
        parts = [values[name] for name in self._names]
        sizes = [len(part) for part, fixed in zip(parts, self._fixed_sizes, strict=True) if fixed is None]
        data = b"".join((struct.pack(f"<{len(sizes)}I", *sizes), *parts))
        self._sizes.append(len(data))
        if self._samples.tell() + len(data) + self._head_size() > _LARGEST:
            raise PullError(
                f"shards of Mosaic Streaming end before {_LARGEST} bytes; pull into another directory with a smaller "
                f"samples_per_shard, such as {len(self._sizes) // 2}"
            )
        self._samples.write(data)
        return Kept()

    def end_shard(self, index: int) -> list[Json]:
        assert self._samples is not None, "a shard has at least one sample"
        self._samples.close()
        self._samples = None
        places = accumulate(self._sizes, initial=self._head_size())
        head = struct.pack(f"<{len(self._sizes) + 2}I", len(self._sizes), *places) + self._head()
        with self._directory.aside.open("wb") as shard, self._directory.collected.open("rb") as samples:
            shard.write(head)
            shutil.copyfileobj(samples, shard)
        self._sizes = []
        return [self._directory.publish(f"shard.{index:05d}.mds")]

    def finish(self) -> list[Json]:
        self._directory.collected.unlink(missing_ok=True)
        shards = [
            {
                **self._description(),
                "raw_data": {"basename": file["path"], "bytes": file["bytes"], "hashes": {}},
                "samples": len(part["samples"]),
                "zip_data": None,
            }
            for part in self._directory.parts()
            for file in part["files"]
        ]
        text = json.dumps({"shards": shards, "version": 2}, sort_keys=True)
        return [self._directory.write("index.json", text.encode("ascii"))]

    def _head_size(self) -> int:
        return 4 * (len(self._sizes) + 2) + len(self._head())

    def _head(self) -> bytes:
        return json.dumps(self._description(), sort_keys=True).encode("ascii")

    def _description(self) -> Json:
        return {
            "version": 2,
            "format": "mds",
            "compression": None,
            "hashes": [],
            "size_limit": None,
            "column_names": self._names,
            "column_encodings": self._encodings,
            "column_sizes": self._fixed_sizes,
        }
