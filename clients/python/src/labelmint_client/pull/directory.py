"""The directory that a pull writes to: its lock, files that appear whole, and what is done so far.

Rules of this file:
- A file is written aside and renamed: whatever is killed, and whenever, what has its final name is whole.
- What is done is what the parts in the state directory say. A part is written when all files that it speaks of are on
  the disk; what was written after the last part is written again, with the same bytes.
- `manifest.json` is the last file that is written. The parts stay, so that a complete pull can be extended.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from labelmint_client.pull.errors import PullError

Json = dict[str, Any]

MANIFEST = "manifest.json"
_STATE = ".labelmint-pull"
_HEADER = "header.json"
_CHUNK = 1 << 20


def to_json(value: Any) -> bytes:
    """One line, keys in alphabetical order: the same value has the same bytes."""
    return json.dumps(value, sort_keys=True).encode() + b"\n"


def record(directory: Path, name: str) -> Json:
    """`path` below the directory, size in `bytes` and `sha256` in hexadecimal of a file; raises OSError."""
    digest = hashlib.sha256()
    with (directory / name).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
        return {"path": name, "bytes": file.tell(), "sha256": digest.hexdigest()}


class PullDirectory:
    """A directory under the lock of this process, made where it is missing. A context manager.

    Raises PullError when another pull writes to it, or when it holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = path / _STATE
        self._unsettled: list[Path] = []
        if path.exists() and not self._state.is_dir() and (not path.is_dir() or any(path.iterdir())):
            raise PullError(f"{path} exists and holds no unfinished pull; name a directory that is empty or new")
        self._state.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(self._state / "lock", blocking=False)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise PullError(f"another pull is writing to {path}; wait for it, or name another directory") from None

    def __enter__(self) -> PullDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def aside(self) -> Path:
        """Where the file that is published next is written."""
        return self._state / "aside"

    def publish(self, name: str) -> Json:
        """Gives what was written aside its name; returns its record."""
        self._rename_aside(self.path / name)
        return record(self.path, name)

    def write(self, name: str, data: bytes) -> Json:
        """Publishes a file with this content; returns its record."""
        self.aside.write_bytes(data)
        self._rename_aside(self.path / name)
        return {"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def header(self) -> Json | None:
        """What the whole pull must hold to, as `begin` was told; None before that."""
        return _read(self._state / _HEADER)

    def begin(self, header: Json) -> None:
        """From now on the directory holds a pull that is not complete, also where it held a smaller one that was."""
        self._write_state(_HEADER, header)
        (self.path / MANIFEST).unlink(missing_ok=True)
        self._settle()

    def add_part(self, index: int, part: Json) -> None:
        """All files of shard `index` are published; it replaces what there was of this shard."""
        self._settle()
        self._write_state(_part(index), part)

    def parts(self) -> Iterator[Json]:
        """The shards that are done, in order, one in memory at a time; the last may have room for more samples."""
        index = 0
        while (part := _read(self._state / _part(index))) is not None:
            yield part
            index += 1

    def complete(self, manifest: Json) -> None:
        """Writes the manifest, with which the pull is complete."""
        self._settle()
        self.write(MANIFEST, json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n")
        self._settle()

    def _write_state(self, name: str, value: Json) -> None:
        self.aside.write_bytes(to_json(value))
        self._rename_aside(self._state / name)
        self._settle()

    def _rename_aside(self, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.aside, target)
        self._unsettled.append(target)

    def _settle(self) -> None:
        """What was renamed survives a loss of power from now on."""
        for path in (*self._unsettled, *sorted({path.parent for path in self._unsettled}), self.path):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self._unsettled.clear()


def completed(path: Path) -> Json | None:
    """The manifest of a complete pull, None where there is none."""
    return _read(path / MANIFEST)


def extensible(path: Path) -> bool:
    """Whether a complete pull has what more samples can be added to."""
    return (path / _STATE / _HEADER).exists()


def _part(index: int) -> str:
    return f"part-{index:06d}.json"


def _read(path: Path) -> Json | None:
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise PullError(f"{path} is damaged ({error}); remove {path.parent} and pull again") from None
    if not isinstance(content, dict):
        raise PullError(f"{path} is no object of JSON; remove {path.parent} and pull again")
    return content
