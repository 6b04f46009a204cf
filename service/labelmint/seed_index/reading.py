"""Reads an index of seeds: the footers of all files at the start, and a row group's columns when they are asked for.

Rules of this file:
- What a file declares is checked against what is in it: the footers when the index is opened, the values of a row group
  when it is decoded. A file that fails either check is refused with one line (UnusableFile).
- Files are read, not mapped: a mapped file that another process cuts short would end the gateway. A file that has
  changed since the index was opened is refused, because its footer no longer describes it.
- Decoded columns stay in a cache of bounded size. `columns` may be called in several threads at once, the other methods
  only in the one that opened the index.
- pyarrow is imported here only, and this file only by a gateway that has an index.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from cachetools import LRUCache

from labelmint.core.errors import UnusableFile
from labelmint.core.task import task_of
from labelmint.seed_index.layout import SEED, Described, read_metadata

T = TypeVar("T")

Column: TypeAlias = npt.NDArray[Any]

CACHE_BYTES = 128 << 20
MAX_ROW_GROUP_SEEDS = 1 << 20  # other programs write row groups of up to this size
_SEED_END = 2**32
_Stamp: TypeAlias = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class _File:
    path: Path
    stamp: _Stamp
    footer: pq.FileMetaData


@dataclass(frozen=True, eq=False)
class Part:
    """The row group `number` of a file: the seeds from `first` up to, not including, `end`."""

    file: _File
    number: int
    first: int
    end: int


class SeedIndex:
    """The Parquet files in a directory and the directories below it."""

    def __init__(self, directory: Path, *, cache_bytes: int = CACHE_BYTES) -> None:
        """Raises UnusableFile if there is no file, or one that is not a file of an index or that overlaps another."""
        parts: dict[Described, list[Part]] = {}
        for path in _paths(directory):
            described, found = _opened(path)
            parts.setdefault(described, []).extend(found)
        self._parts = {described: _in_order(found) for described, found in parts.items()}
        self._firsts = {described: [part.first for part in found] for described, found in self._parts.items()}
        self._cache: LRUCache[tuple[Part, str], Column] = LRUCache(cache_bytes, lambda column: column.nbytes)
        self._lock = threading.Lock()

    @property
    def described(self) -> tuple[Described, ...]:
        """What the index describes, without what it has no usable file of any more."""
        return tuple(described for described, parts in self._parts.items() if parts)

    def runs(self, described: Described) -> list[tuple[int, int]]:
        """The ranges of indexed seeds, ascending, each with its end excluded; no two of them touch."""
        runs: list[tuple[int, int]] = []
        for part in self._parts.get(described, ()):
            if runs and runs[-1][1] == part.first:
                runs[-1] = runs[-1][0], part.end
            else:
                runs.append((part.first, part.end))
        return runs

    def part_at(self, described: Described, seed: int) -> Part | None:
        """The row group that has this seed; None if the index lacks it."""
        place = bisect_right(self._firsts.get(described, ()), seed)
        part = self._parts[described][place - 1] if place else None
        return part if part is not None and seed < part.end else None

    def next_first(self, described: Described, seed: int) -> int:
        """The first seed above `seed` at which a row group begins; 2^32 if there is none."""
        firsts = self._firsts.get(described, ())
        place = bisect_right(firsts, seed)
        return firsts[place] if place < len(firsts) else _SEED_END

    def columns(self, part: Part, names: Iterable[str]) -> dict[str, Column]:
        """The values of these columns, one for each seed of the row group; raises UnusableFile."""
        names = tuple(names)
        with self._lock:
            found = {name: column for name in names if (column := self._cache.get((part, name))) is not None}
        if missing := [name for name in names if name not in found]:
            decoded = _decoded(part, missing)
            with self._lock:
                for name, column in decoded.items():
                    if column.nbytes <= self._cache.maxsize:
                        self._cache[part, name] = column
            found |= decoded
        return found

    def leave_out(self, part: Part) -> bool:
        """Forget the file that has this row group; returns False if that was done before."""
        known = False
        for described, parts in self._parts.items():
            kept = [each for each in parts if each.file is not part.file]
            if len(kept) < len(parts):
                known = True
                self._parts[described], self._firsts[described] = kept, [each.first for each in kept]
                break
        return known


def _paths(directory: Path) -> list[Path]:
    """Raises UnusableFile."""
    try:
        if not directory.is_dir():
            raise UnusableFile(directory, "is not a directory; give that of an index which `labelmint index` wrote")
        below = ((path, path.relative_to(directory).parts) for path in directory.rglob("*.parquet"))
        found = sorted(path for path, parts in below if path.is_file() and not any(map(_is_hidden, parts)))
    except OSError as error:
        raise UnusableFile(directory, f"cannot be read: {error.strerror}") from error
    if not found:
        raise UnusableFile(directory, "holds no file of an index (*.parquet); write one with `labelmint index`")
    return found


def _is_hidden(name: str) -> bool:
    """Whether a file or directory is not for readers: `labelmint index` keeps unfinished files in hidden ones."""
    return name.startswith(".")


def _in_order(parts: list[Part]) -> list[Part]:
    """Sort row groups by their seeds; raises UnusableFile if two have the same ones."""
    parts.sort(key=lambda part: part.first)
    for before, after in pairwise(parts):
        if after.first < before.end:
            raise UnusableFile(
                after.file.path,
                f"describes seed {after.first}, as {before.file.path} does; remove one of them, or index again",
            )
    return parts


def _opened(path: Path) -> tuple[Described, list[Part]]:
    """What a file describes, and its row groups, from its footer; raises UnusableFile."""

    def read(file: FileIO) -> tuple[Described, list[Part]]:
        footer = pq.read_metadata(file)
        described = read_metadata(path, footer.metadata)
        _check_columns(path, footer.schema.to_arrow_schema(), described)
        return described, _parts(_File(path, _stamp(file), footer))

    return _reading(path, read)


def _check_columns(path: Path, schema: pa.Schema, described: Described) -> None:
    areas = task_of(described.task).measure == "area"
    wanted = {SEED: True, described.score_column: False}  # whether a column has whole numbers
    wanted |= {described.label_column(name): areas for name in described.label_names}
    for name, whole in wanted.items():
        if schema.names.count(name) != 1:
            raise UnusableFile(path, f"has {schema.names.count(name)} columns {name!r}, not one; index again")
        kind = schema.field(name).type
        fits = pa.types.is_integer(kind) if whole else pa.types.is_float32(kind) or pa.types.is_float64(kind)
        if not fits:
            raise UnusableFile(path, f"has {kind} in column {name!r}, not {'whole' if whole else 'real'} numbers")


def _parts(file: _File) -> list[Part]:
    """The row groups of a file, whose seeds its footer has in its statistics; raises UnusableFile."""
    footer, parts = file.footer, list[Part]()
    column = next(index for index in range(footer.num_columns) if footer.schema.column(index).path == SEED)
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        statistics, rows = group.column(column).statistics, group.num_rows
        if statistics is None or not statistics.has_min_max:
            raise UnusableFile(file.path, f"has no statistics of the seeds in row group {number}; index again")
        first, last = statistics.min, statistics.max
        if not (1 <= rows <= MAX_ROW_GROUP_SEEDS and 0 <= first <= last < _SEED_END and last - first == rows - 1):
            raise UnusableFile(
                file.path,
                f"has {rows} rows for the seeds {first} to {last} in row group {number}; there must be one for each "
                f"seed, and at most {MAX_ROW_GROUP_SEEDS}; index again",
            )
        if parts and first != parts[-1].end:
            raise UnusableFile(
                file.path, f"has seed {first} after seed {parts[-1].end - 1}; seeds must ascend without a gap"
            )
        parts.append(Part(file, number, first, last + 1))
    return parts


def _decoded(part: Part, names: Sequence[str]) -> dict[str, Column]:
    """Decode columns of a row group, and compare its seeds with its footer; raises UnusableFile."""
    file = part.file

    def read(opened: FileIO) -> dict[str, Column]:
        if _stamp(opened) != file.stamp:
            raise UnusableFile(file.path, "has changed since the gateway started; start the gateway again to read it")
        reader = pq.ParquetFile(opened, metadata=file.footer, page_checksum_verification=True)
        table = reader.read_row_group(part.number, columns=[SEED, *names], use_threads=False)
        columns = {name: _values(file.path, table, name) for name in (SEED, *names)}
        if not np.array_equal(columns.pop(SEED), np.arange(part.first, part.end)):
            raise UnusableFile(file.path, f"has other seeds in row group {part.number} than its footer says")
        return columns

    return _reading(file.path, read)


def _values(path: Path, table: pa.Table, name: str) -> Column:
    column = table.column(name)
    if column.null_count:
        raise UnusableFile(path, f"has no value in column {name!r} for some seeds; index again")
    # pyarrow's own conversion imports pandas where it is installed, which takes a second. A copy, so that the memory of
    # pyarrow's pool is free at once.
    kind = column.type
    letter = "f" if pa.types.is_floating(kind) else "u" if pa.types.is_unsigned_integer(kind) else "i"
    dtype = np.dtype(f"<{letter}{kind.bit_width // 8}")
    parts = [
        np.frombuffer(chunk.buffers()[1], dtype, len(chunk), chunk.offset * dtype.itemsize) for chunk in column.chunks
    ]
    return np.concatenate(parts)


def _reading(path: Path, read: Callable[[FileIO], T]) -> T:
    """The result of `read` on the opened file; raises UnusableFile also for what pyarrow raises."""
    try:
        with FileIO(path) as file:
            return read(file)
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        problem = error.strerror if isinstance(error, OSError) and error.strerror else _first_line(error)
        raise UnusableFile(path, f"cannot be read as a file of an index: {problem}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _stamp(file: FileIO) -> _Stamp:
    """What tells an opened file from one that has replaced or changed it."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
