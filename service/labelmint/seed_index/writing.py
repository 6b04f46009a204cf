"""Writes one file of an index of seeds in small parts, so that an interrupted run loses little and the next goes on.

Rules of this file:
- The parts of an unfinished file are Parquet files in a hidden directory beside it, which one process at a time uses.
  Each part, and the file into which they are joined, is written aside, synchronized to the disk and renamed.
- The bytes of a file depend on its rows alone, not on interruptions.
- A part or a file counts only if it describes the same samples. Otherwise the error names it and what differs.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from labelmint.core.errors import UnusableFile
from labelmint.core.task import task_of
from labelmint.seed_index.layout import ROW_GROUP_SEEDS, SEED, Described, metadata_of, read_metadata, score_column

# An interrupted run loses fewer rows than this. A row group has a whole number of parts.
PART_SEEDS = 4096
# Of a part: whoever looks for Parquet files does not take it for a file of an index.
_SUFFIX = ".part"


def shard_of(seeds: range, index: int, count: int) -> range:
    """Shard `index` of `count`: a contiguous run of whole row groups; the last row group of the range may be short."""
    groups = -(-len(seeds) // ROW_GROUP_SEEDS)
    first, last = (groups * each // count for each in (index, index + 1))
    return seeds[first * ROW_GROUP_SEEDS : last * ROW_GROUP_SEEDS]


@contextmanager
def writing(directory: Path, described: Described, seeds: range, score_kinds: Sequence[str]) -> Iterator[IndexFile]:
    """Open the file of an index for a run of seeds, and go on where an earlier run stopped.

    Raises UnusableFile if another process writes the same file, if the directory has some of these seeds in another
    file, or if what an earlier run left does not fit.
    """
    name = _name(described)
    _check_neighbours(directory, name, seeds)
    name = f"{name}-{seeds.start:010}-{seeds.stop:010}"
    parts = directory / f".{name}"
    with _locked(parts):
        try:
            yield IndexFile(directory / f"{name}.parquet", parts, described, seeds=seeds, score_kinds=score_kinds)
        finally:
            if not any(parts.glob(f"*{_SUFFIX}")):
                # Another process may open the lock at this moment; it then looks for parts and the file anew.
                shutil.rmtree(parts, ignore_errors=True)


class IndexFile:
    """A file of an index that is being written: `add` a row for each of the `missing` seeds, then `finish`."""

    def __init__(
        self, path: Path, parts: Path, described: Described, *, seeds: range, score_kinds: Sequence[str]
    ) -> None:
        self.path, self.seeds = path, seeds
        self._parts, self._described = parts, described
        self._schema = _schema(described, score_kinds)
        self._rows: list[tuple[npt.NDArray[Any], ...]] = []
        self._is_finished = path.exists()
        if self._is_finished:
            self._check(path, seeds)
        self._num_written = len(seeds) if self._is_finished else self._num_in_parts()

    @property
    def missing(self) -> range:
        """The seeds that have no row yet, in order."""
        return self.seeds[self._num_written + len(self._rows) :]

    def add(self, *values: npt.NDArray[Any]) -> None:
        """Add the row of the first missing seed: float32 [S] of the score kinds, then uint32 or float32 [K] of labels.

        Raises UnusableFile if a part cannot be written.
        """
        self._rows.append(values)
        part = self.seeds[self._num_written : self._num_written + PART_SEEDS]
        if len(self._rows) == len(part):
            columns = [column for stacked in map(np.stack, zip(*self._rows, strict=True)) for column in stacked.T]
            table = pa.Table.from_arrays([pa.array(part, pa.uint32()), *map(pa.array, columns)], schema=self._schema)
            self._write(self._part(part), [table])
            self._num_written += len(part)
            self._rows.clear()

    def finish(self) -> None:
        """Join the parts, of which none is missing, into the file, and remove them; raises UnusableFile."""
        if not self._is_finished:
            self._write(self.path, map(self._row_group, _split(self.seeds, ROW_GROUP_SEEDS)))
            self._is_finished = True
        for part in self._parts.glob(f"*{_SUFFIX}"):
            part.unlink()

    def _num_in_parts(self) -> int:
        """The number of rows in the parts that follow each other from the first one on."""
        count = 0
        for part in _split(self.seeds, PART_SEEDS):
            if not self._part(part).exists():
                break
            self._check(self._part(part), part)
            count += len(part)
        return count

    def _part(self, seeds: range) -> Path:
        return self._parts / f"{seeds.start:010}{_SUFFIX}"

    def _row_group(self, seeds: range) -> pa.Table:
        parts = (self._part(part) for part in _split(seeds, PART_SEEDS))
        try:
            return pa.concat_tables(map(_table, parts)).combine_chunks()
        except (pa.ArrowException, OSError) as error:
            raise _damaged(self._parts, error) from error

    def _check(self, path: Path, seeds: range) -> None:
        """Raises UnusableFile unless a part or a file has these samples."""
        try:
            with pq.ParquetFile(path) as file:
                metadata, schema = file.metadata, file.schema_arrow
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error
        found, wanted = (asdict(each) for each in (read_metadata(path, metadata.metadata), self._described))
        if different := [
            f"{name} {found[name]!r}, not {wanted[name]!r}" for name in wanted if found[name] != wanted[name]
        ]:
            raise UnusableFile(
                path, f"is about other samples: {'; '.join(different)}; remove it, or give another --out"
            )
        if not schema.equals(self._schema) or metadata.num_rows != len(seeds):
            raise UnusableFile(path, "has other columns or rows than this labelmint writes; remove it and index again")

    def _write(self, path: Path, tables: Iterable[pa.Table]) -> None:
        """Write each table as a row group."""
        aside = self._parts / "aside"
        try:
            with aside.open("wb") as stream:
                # The reader finds flipped bits by the checksums of the pages.
                with pq.ParquetWriter(
                    stream, self._schema, compression="zstd", use_dictionary=False, write_page_checksum=True
                ) as writer:
                    for table in tables:
                        writer.write_table(table, row_group_size=ROW_GROUP_SEEDS)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, path)
            _synchronize(path.parent)
        except OSError as error:
            aside.unlink(missing_ok=True)
            problem = f"cannot be written: {error.strerror or error}; what was indexed before is kept"
            raise UnusableFile(path, f"{problem}: make room, then run the same command again") from error


def _table(path: Path) -> pa.Table:
    with pq.ParquetFile(path) as file:
        return file.read()


def _schema(described: Described, score_kinds: Sequence[str]) -> pa.Schema:
    label = pa.uint32() if task_of(described.task).measure == "area" else pa.float32()
    scores = [(score_column(kind), pa.float32()) for kind in score_kinds]
    labels = [(described.label_column(name), label) for name in described.label_names]
    return pa.schema([(SEED, pa.uint32()), *scores, *labels], metadata_of(described))


def _name(described: Described) -> str:
    """The part of a file's name that is the same for all files of an index."""
    each = [described.model, described.digest[:12], described.executor, f"psi{described.truncation_psi}"]
    if described.class_index is not None:
        each.append(f"class{described.class_index}")
    return re.sub(r"[^\w.-]", "_", "-".join(each))


def _split(seeds: range, size: int) -> list[range]:
    return [seeds[start : start + size] for start in range(0, len(seeds), size)]


def _check_neighbours(directory: Path, name: str, seeds: range) -> None:
    """Raises UnusableFile if another file of the index, finished or not, has some of the seeds."""
    pattern = re.compile(rf"\.?{re.escape(name)}-(\d{{10}})-(\d{{10}})(\.parquet)?")
    for path in sorted(directory.iterdir()) if directory.exists() else ():
        if match := pattern.fullmatch(path.name):
            start, stop = int(match[1]), int(match[2])
            if (start, stop) != (seeds.start, seeds.stop) and start < seeds.stop and seeds.start < stop:
                unfinished = "" if match[3] else ", unfinished,"
                raise UnusableFile(
                    path, f"has{unfinished} the seeds {start}:{stop} of these samples; index others, or remove it"
                )


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Make a directory and hold its lock until the end of the block; raises UnusableFile if another process has it."""
    path = directory / "lock"
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # another process has just finished the file and removed the directory
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
                yield
                return
        except BlockingIOError:
            raise UnusableFile(directory, "is in use: another process indexes these seeds at this moment") from None
        finally:
            os.close(descriptor)


def _synchronize(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _damaged(path: Path, error: Exception) -> UnusableFile:
    return UnusableFile(path, f"is damaged ({str(error).splitlines()[0]}); remove it and run the same command again")
