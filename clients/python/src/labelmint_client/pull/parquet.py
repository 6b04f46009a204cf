"""Writes samples as Parquet files for Hugging Face `datasets`: `data/train-00000.parquet` and so on.

Rules of this file:
- `image` and `label` are structs of `bytes` (PNG) and `path`, declared as the feature Image. So `datasets` returns PIL
  images. The label is a palette or gray PNG; as an array, it holds the class ids.
- `classes` has the ids of the classes that a label contains, declared as the feature ClassLabel, which has the names.
- `class_index` is the class that a conditional generator drew, a ClassLabel too; other models have no such column.
- Row groups are small, because a reader must load a whole row group to get one image.
"""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from labelmint_client import Model
from labelmint_client.pull.directory import Json, PullDirectory
from labelmint_client.pull.formats import Kept, LabelMode, Written
from labelmint_client.pull.labels import labels_of
from labelmint_client.pull.pixels import IGNORE, image_png

CALL = """import pandas

table = pandas.read_parquet("data")
print(table[["seed", "js_score"]])"""

_ROW_GROUP = 100
_CLASSES = "classes"
_CLASS = "class_index"

_TEXT, _INTEGER, _REAL, _TRUTH = pa.string(), pa.int64(), pa.float64(), pa.bool_()
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", _TEXT)])
_EVIDENCE = {
    "model": _TEXT,
    "model_version": _TEXT,
    "model_digest": _TEXT,
    "seed": _INTEGER,
    "accepted": _TRUTH,
    "js_score": _REAL,
    "threshold": _REAL,
    "calibration_id": _TEXT,
    "truncation_psi": _REAL,
    "style_seed": _INTEGER,
    "crossover": _INTEGER,
    "group_id": _TEXT,
}


class Writer:
    """Writes one file per shard."""

    def __init__(self, directory: PullDirectory, model: Model, label_mode: LabelMode) -> None:
        self._directory = directory
        self._palette = model.palette if label_mode == "palette" else None
        self._labels = labels_of(model)
        types = {"image": _IMAGE, self._labels.COLUMN: self._labels.column_type(), **_EVIDENCE}
        features = {name: _feature(kind) for name, kind in types.items()}
        if self._labels.HAS_LABEL_IMAGE and _has_classes(directory):
            types[_CLASSES] = pa.list_(_INTEGER)
            features[_CLASSES] = [{"_type": "ClassLabel", "names": list(model.class_names)}]
        if model.generator_classes:
            types[_CLASS] = _INTEGER
            features[_CLASS] = {"_type": "ClassLabel", "names": list(model.generator_classes)}
        told = json.dumps({"info": {"features": features}}, sort_keys=True)
        self._schema = pa.schema(types.items(), metadata={"huggingface": told})
        self._rows: list[dict[str, Any]] = []
        self._file: Any = None  # a pq.ParquetWriter, which has no type annotations

    def reopen(self, files: list[Json], samples: int) -> None:
        (file,) = files
        with pq.ParquetFile(self._directory.path / file["path"]) as before:  # type: ignore[no-untyped-call]
            rows = (row for batch in before.iter_batches(_ROW_GROUP) for row in batch.to_pylist())
            for row in islice(rows, samples):
                self._add_row(row)

    def add(self, written: Written) -> Kept:
        image = {"bytes": image_png(written.image), "path": f"{written.key}.png"}
        row = {**written.evidence, "image": image, self._labels.COLUMN: self._labels.cell(written, self._palette)}
        if written.label is not None:
            row[_CLASSES] = [class_id for class_id in np.unique(written.label).tolist() if class_id != IGNORE]
        self._add_row(row)
        return Kept()

    def end_shard(self, index: int) -> list[Json]:
        if self._rows:
            self._write_rows()
        assert self._file is not None, "a shard has at least one sample"
        self._file.close()
        self._file = None
        return [self._directory.publish(f"data/train-{index:05d}.parquet")]

    def finish(self) -> list[Json]:
        return []

    def _add_row(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == _ROW_GROUP:
            self._write_rows()

    def _write_rows(self) -> None:
        if self._file is None:
            self._file = pq.ParquetWriter(self._directory.aside, self._schema)  # type: ignore[no-untyped-call]
        self._file.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows.clear()


def _has_classes(directory: PullDirectory) -> bool:
    """Whether the pull has the column of classes. Earlier versions wrote none, and all files need the same columns."""
    first = next(directory.parts(), None)
    if first is None:
        return True
    (file,) = first["files"]
    return _CLASSES in pq.read_schema(directory.path / file["path"]).names  # type: ignore[no-untyped-call]


def _feature(kind: pa.DataType) -> Any:
    """Return the description of a type in `datasets`."""
    if kind == _IMAGE:
        return {"_type": "Image"}
    if pa.types.is_list(kind):
        return [_feature(kind.value_type)]
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    names = {pa.bool_(): "bool", pa.float32(): "float32", pa.float64(): "float64", pa.int64(): "int64"}
    return {"_type": "Value", "dtype": names.get(kind, "string")}
