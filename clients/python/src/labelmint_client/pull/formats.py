"""What a format of a pull is.

Rules of this file:
- A format writes files by way of the PullDirectory only. It is told of each sample once, in order, and of each shard's
  end; between shards it keeps nothing but what is in the parts, for the next shard may be another process's.
- The module of a format is imported when it is used: it may need libraries that the others do not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, Protocol

from labelmint_client import Model
from labelmint_client.pull.directory import Json, PullDirectory
from labelmint_client.pull.pixels import Bytes

FORMATS = ("webdataset", "coco", "folder", "parquet")
LabelMode = Literal["palette", "ids"]


@dataclass(frozen=True, eq=False)
class Written:
    """A sample as it is written."""

    seed: int
    image: Bytes  # uint8 [H,W,3]
    label: Bytes | None  # uint8 [H,W] of class ids, 255 where ignored; None for a model of keypoints
    evidence: dict[str, Any]  # for JSON

    @property
    def key(self) -> str:
        """The sample's name in the data set: its seed in ten digits."""
        return f"{self.seed:010d}"


@dataclass(frozen=True)
class Kept:
    """What the part keeps of a sample: the records of the files that hold it alone, and annotations for `finish`."""

    files: list[Json] = field(default_factory=list)
    annotations: list[Json] = field(default_factory=list)


class Format(Protocol):
    """Writes one pull in one process."""

    def reopen(self, files: list[Json], samples: int) -> None:
        """Goes on with a shard that has so many samples; `files` are what `end_shard` returned for them."""

    def add(self, written: Written) -> Kept:
        """Takes a sample of the shard."""

    def end_shard(self, index: int) -> list[Json]:
        """Publishes what holds the shard as a whole; returns the records of these files."""

    def finish(self) -> list[Json]:
        """After the last shard, publishes what the pull has one of; returns the records of these files."""


def open_format(name: str, directory: PullDirectory, model: Model, label_mode: LabelMode) -> Format:
    """The format of that name, one of FORMATS; `label_mode` is for those that write labels as PNG."""
    opened: Format = import_module(f"labelmint_client.pull.{name}").Writer(directory, model, label_mode)
    return opened
