"""The interface of the formats of a pull, and what several of them share.

Rules of this file:
- The module of a format has a class `Writer`, which is a Format. It also has the program `CALL`, which opens a pull and
  may contain `{answer}`, the part that depends on the task (`labels.py`).
- A format writes files only through the PullDirectory. It receives each sample once, in order, and the end of each
  shard. Between shards it keeps only what is in the parts, because another process may write the next shard.
- The module of a format is imported when it is used, because it may need libraries that other formats do not need.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, Protocol, TypeAlias

from labelmint_client import Model
from labelmint_client.pull.directory import Json, PullDirectory
from labelmint_client.pull.pixels import Bytes
from labelmint_client.pull_formats import PULL_FORMATS

FORMATS = tuple(PULL_FORMATS)
LabelMode = Literal["palette", "ids"]

# A line of a YOLO label: the class, and shares of the image or visibilities.
YoloLine: TypeAlias = tuple[int, list[float | int]]
# A shape of labelme: its label, its kind, and its points in pixels.
LabelmeShape: TypeAlias = tuple[str, str, list[tuple[float, float]]]
# A column of Mosaic Streaming: its name, its encoding, and the size of each value in bytes (None if they differ).
MdsColumn: TypeAlias = tuple[str, str, int | None]


@dataclass(frozen=True, eq=False)
class Written:
    """A sample in the form in which formats write it."""

    seed: int
    image: Bytes  # uint8 [H,W,3]
    label: Bytes | None  # uint8 [H,W] of class ids, 255 where ignored; None for a model of keypoints
    evidence: dict[str, Any]  # the sample's other fields, ready for JSON

    @property
    def key(self) -> str:
        """The sample's name in the data set: its seed, in ten digits."""
        return f"{self.seed:010d}"


@dataclass(frozen=True)
class Kept:
    """What a part keeps of a sample: the records of the sample's own files, and the annotations for `finish`."""

    files: list[Json] = field(default_factory=list)
    annotations: list[Json] = field(default_factory=list)


class Format(Protocol):
    """Writes one pull in one process."""

    def reopen(self, files: list[Json], samples: int) -> None:
        """Continue a shard that has this many samples. `files` is what `end_shard` returned for it."""

    def add(self, written: Written) -> Kept:
        """Add a sample to the shard."""

    def end_shard(self, index: int) -> list[Json]:
        """Publish the files that hold the whole shard and return their records."""

    def finish(self) -> list[Json]:
        """After the last shard, publish the files that exist once per pull and return their records."""


def open_format(name: str, directory: PullDirectory, model: Model, *, label_mode: LabelMode) -> Format:
    """Return the format of that name, one of FORMATS. `label_mode` is for formats that write labels as PNG."""
    opened: Format = import_module(f"labelmint_client.pull.{name}").Writer(directory, model, label_mode)
    return opened


def program(name: str, answer: str) -> str:
    """Return the program that opens a pull in the format of that name."""
    call: str = import_module(f"labelmint_client.pull.{name}").CALL
    return call.replace("{answer}", answer)


def label_of(written: Written) -> Bytes:
    """Return the label, uint8 [H,W], for a task or a format that has only labels with pixels."""
    assert written.label is not None, "a model of segmentation has a label"
    return written.label


def in_yaml(value: list[int] | list[str]) -> str:
    """Return a list in YAML. It is in JSON's form, which every reader of YAML reads."""
    return json.dumps(value, ensure_ascii=False)


def names_txt(names: Iterable[str]) -> bytes:
    """Return a text of one name per line: the first line has the name of id 0."""
    return "".join(f"{name}\n" for name in names).encode()
