"""Reads keypoints of the images that `synth` wrote, in the format that the user names.

Rules of this file:
- The format is never guessed. Files of other formats in the same directory are ignored.
- A CSV has a header, and each row has a cell for each column. A keypoint that is not labelled (visible 0) may leave x
  and y empty.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from labelmint.core.errors import UnusableFile
from labelmint.models.annotations import coco
from labelmint.models.annotations.directory import AnnotatedDataset, Palette, read_drawn, read_names, write_names
from labelmint.models.annotations.files import write_text
from labelmint.models.annotations.marks import Keypoint, Points, gather

KeypointFormat = Literal["csv", "coco"]

_HEADER = ["seed", "name", "x", "y"]
_VISIBLE = "visible"


def csv_path(directory: Path) -> Path:
    return directory / "keypoints.csv"


def write_keypoints(
    directory: Path, names: tuple[str, ...], palette: Palette, *, keypoints: Mapping[int, Points]
) -> None:
    """Write keypoints as an annotator would, in the format `csv`. For each seed: float32 [K,3] of x, y, visibility."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow([*_HEADER, _VISIBLE])
    for seed, points in keypoints.items():
        for name, (x, y, visible) in zip(names, points.tolist(), strict=True):
            # Nine digits are enough to read back exactly the same float32.
            place = (f"{x:.9g}", f"{y:.9g}") if visible else ("", "")
            writer.writerow([seed, name, *place, int(visible)])
    write_text(csv_path(directory), lines.getvalue())
    write_names(directory / "keypoints.json", names, palette)


def read_keypoints(directory: Path, keypoint_format: str = "csv") -> AnnotatedDataset:
    """Read all keypoints. Raises UnusableFile that names the first file and place that is missing or wrong."""
    drawn = read_drawn(directory)
    mend = 'list the keypoints as [{"name": "nose", "rgb": [255, 0, 0]}, ...]'
    names, palette = read_names(directory / "keypoints.json", mend)
    entries = _read_csv(csv_path(directory)) if keypoint_format == "csv" else coco.read_keypoints(directory, drawn)
    keypoints = gather(entries, names, drawn, directory=directory)
    return AnnotatedDataset(
        "keypoints", drawn.truncation_psi, names, palette, drawn.images, keypoints, drawn.class_indices
    )


def _read_csv(path: Path) -> Iterator[Keypoint]:
    if not path.is_file():
        raise UnusableFile(path, f"does not exist; write it with the header {','.join(_HEADER)}")
    try:
        # Spreadsheet programs write a byte order mark; "utf-8-sig" skips it.
        rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        header = next(rows, [])
        if header not in (_HEADER, [*_HEADER, _VISIBLE]):
            raise UnusableFile(
                path, f"has the header {','.join(header)!r}; it must be {','.join(_HEADER)}[,{_VISIBLE}]"
            )
        for row in rows:
            if row:  # skip empty lines
                yield _parsed(row, header, path, line=rows.line_num)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UnusableFile(path, f"is not CSV: {error}") from error


def _parsed(row: list[str], header: list[str], path: Path, *, line: int) -> Keypoint:
    if len(row) != len(header):
        raise UnusableFile(path, f"line {line} has {len(row)} columns, but the header has {len(header)}")
    cells = dict(zip(header, row, strict=True))
    where = f"line {line} ({cells['name']!r})"
    try:
        visible = int(cells.get(_VISIBLE, "2"))
        x, y = (float(cells["x"]), float(cells["y"])) if visible else (0.0, 0.0)
        return Keypoint(int(cells["seed"]), path, where, cells["name"], x, y, visible)
    except ValueError as error:
        raise UnusableFile(path, f"{where} has a value that is not a number: {error}") from error
