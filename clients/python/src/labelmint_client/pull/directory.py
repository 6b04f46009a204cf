"""The directory that a pull writes to: its lock, atomic file writes, and the record of completed shards.

Rules of this file:
- Each file is written under a temporary name and then renamed. So a file with its final name is always complete, even
  if the process was killed.
- The parts in the state directory record what is done. A part is written after all its files are on the disk. Files
  that were written after the last part are written again, with the same bytes.
- `manifest.json` is written last. The parts stay, so that a complete pull can be extended.
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
    """Return one line of JSON. The keys are sorted, so that the same value always has the same bytes."""
    return json.dumps(value, sort_keys=True).encode() + b"\n"


def record(directory: Path, name: str) -> Json:
    """Return `path` below the directory, size in `bytes` and `sha256` in hexadecimal of a file. Raises OSError."""
    digest = hashlib.sha256()
    with (directory / name).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
        return {"path": name, "bytes": file.tell(), "sha256": digest.hexdigest()}


class PullDirectory:
    """A directory that this process has locked; it is created if missing. A context manager.

    Raises PullError if another pull is writing to the directory, or if it contains something other than a pull.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = path / _STATE
        self._unsettled: list[Path] = []
        if path.exists() and not self._state.is_dir() and (not path.is_dir() or any(path.iterdir())):
            raise PullError(f"{path} exists and holds no unfinished pull; name an empty or new directory")
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
        """The temporary path of the file that is published next."""
        return self._state / "aside"

    @property
    def collected(self) -> Path:
        """A temporary path for data of a shard that can only be written when the shard ends."""
        return self._state / "collected"

    def publish(self, name: str) -> Json:
        """Rename the temporary file to `name` and return its record."""
        self._rename_aside(self.path / name)
        return record(self.path, name)

    def write(self, name: str, data: bytes) -> Json:
        """Publish a file with this content and return its record."""
        self.aside.write_bytes(data)
        self._rename_aside(self.path / name)
        return {"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def header(self) -> Json | None:
        """Return the header that was given to `begin`, which holds for the whole pull; None before `begin`."""
        return _read(self._state / _HEADER)

    def begin(self, header: Json) -> None:
        """Begin an incomplete pull. If the directory holds a smaller complete pull, that becomes incomplete too."""
        self._write_state(_HEADER, header)
        (self.path / MANIFEST).unlink(missing_ok=True)
        self._settle()

    def add_part(self, index: int, part: Json) -> None:
        """Record that all files of shard `index` are published. This replaces an earlier record of the shard."""
        self._settle()
        self._write_state(_part(index), part)

    def parts(self) -> Iterator[Json]:
        """Yield the completed shards in order, one in memory at a time. The last one may have room for more samples."""
        index = 0
        while (part := _read(self._state / _part(index))) is not None:
            yield part
            index += 1

    def complete(self, manifest: Json) -> None:
        """Write the manifest, which makes the pull complete."""
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
        """Sync the renamed files to the disk, so that they survive a loss of power."""
        for path in (*self._unsettled, *sorted({path.parent for path in self._unsettled}), self.path):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self._unsettled.clear()


def completed(path: Path) -> Json | None:
    """Return the manifest of a complete pull, None if there is none."""
    return _read(path / MANIFEST)


def extensible(path: Path) -> bool:
    """Whether a complete pull still has the state that is needed to add samples."""
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
        raise PullError(f"{path} is not a JSON object; remove {path.parent} and pull again")
    return content
