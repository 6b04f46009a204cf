"""What a file of an index says about itself: its columns, and the samples that its rows describe. Pure functions.

Rules of this file:
- A file is Parquet. It has one row for each seed of a range, ascending and without a gap, in row groups of consecutive
  seeds. Several files form an index if they describe the same samples (`Described`) and their ranges do not overlap.
- The columns: `seed`; `score_KIND`, a JS score in nats for each kind that the pipeline's outputs give, always with the
  model's own; `pixels_NAME`, the number of pixels of each class, or `confidence_NAME`, that of each keypoint. They hold
  what the pipeline gave, without rounding, so that the gateway judges an indexed seed exactly as it judges a sample.
- What the rows describe is JSON in the file's metadata under the key `labelmint_index`. A file without it, or with an
  entry that this version does not know, is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from labelmint.core.errors import UnusableFile
from labelmint.core.served_model import ServedModel
from labelmint.core.task import Measure, task_of

METADATA_KEY = b"labelmint_index"
SEED = "seed"
ROW_GROUP_SEEDS = 65_536
_FORMAT = 1
# What a column of labels holds: not the area itself, a share, which would be rounded.
_COLUMNS: Mapping[Measure, str] = {"area": "pixels", "confidence": "confidence"}


@dataclass(frozen=True)
class Described:
    """The samples that the rows of a file describe. Two files with equal values belong to one index.

    `digest` and `executor` are the model's: samples of one digest may differ between executors. `class_index` is None
    for a model without generator classes. `label_names` are the classes or keypoints, in the model's order.
    `resolution` is in pixels.
    """

    model: str
    digest: str
    executor: str
    truncation_psi: float
    class_index: int | None
    task: str
    score_kind: str
    resolution: int
    label_names: tuple[str, ...]

    @classmethod
    def of(cls, model: ServedModel, *, truncation_psi: float, class_index: int | None) -> Described:
        return cls(
            model=model.name,
            digest=model.digest,
            executor=model.executor.name,
            truncation_psi=truncation_psi,
            class_index=class_index,
            task=model.task.name,
            score_kind=model.score_kind,
            resolution=model.resolution,
            label_names=model.label_names,
        )

    @property
    def score_column(self) -> str:
        """The column of the scores that the gate judges."""
        return score_column(self.score_kind)

    def label_column(self, name: str) -> str:
        """The column of a class or keypoint."""
        return f"{_COLUMNS[task_of(self.task).measure]}_{name}"


def score_column(kind: str) -> str:
    return f"score_{kind}"


def metadata_of(described: Described) -> dict[bytes, bytes]:
    """The metadata of a file."""
    return {METADATA_KEY: json.dumps({"format": _FORMAT, **asdict(described)}, sort_keys=True).encode()}


def read_metadata(path: Path, metadata: Mapping[bytes, bytes] | None) -> Described:
    """What a file describes; raises UnusableFile, which says what is wrong with its metadata."""
    text = (metadata or {}).get(METADATA_KEY)
    if text is None:
        raise UnusableFile(path, "is not an index of seeds: write one with `labelmint index`")
    try:
        entries: dict[str, Any] = json.loads(text)
        if (found := entries.pop("format")) != _FORMAT:
            raise UnusableFile(path, f"has format {found!r}, this labelmint reads format {_FORMAT}; index again")
        described = Described(**{**entries, "label_names": tuple(entries["label_names"])})
        _check(described)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UnusableFile(path, f"has damaged metadata ({error}); index again") from error
    return described


def _check(described: Described) -> None:
    for name in ("model", "digest", "executor", "task", "score_kind"):
        if not isinstance(getattr(described, name), str):
            raise ValueError(f"{name} is not text")
    task_of(described.task)
    if not re.fullmatch("[0-9a-f]{64}", described.digest):
        raise ValueError("digest is not a SHA-256")
    if not 0.0 <= described.truncation_psi <= 2.0:
        raise ValueError(f"truncation_psi is {described.truncation_psi!r}")
    if described.class_index is not None and (type(described.class_index) is not int or described.class_index < 0):
        raise ValueError(f"class_index is {described.class_index!r}")
    if type(described.resolution) is not int or not 1 <= described.resolution <= 1 << 14:
        raise ValueError(f"resolution is {described.resolution!r}")
    if not described.label_names or not all(isinstance(name, str) for name in described.label_names):
        raise ValueError("label_names are not names")
