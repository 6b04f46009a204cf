"""Bytes from outside, in memory or in a file; what is wrong with them, and how to show a hostile name in a message.

Rules of this file:
- A reader raises `Malformed` without the file's name, because it may read a part of a file, or memory. The code that
  opened the file converts the error to an UnusableFile, which names the file.
- Text from a file enters a message only through `quoted` or `escaped`, because a hostile file could otherwise write
  anything into a terminal or a log.
- Opening never blocks on a pipe or a device: the file is opened non-blocking, and its type is checked before a read.
- A read needs one window of memory, whatever the file's size. `RegularFile` maps no file into memory: if someone
  truncates a mapped file, the process that reads it is killed.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Protocol

from labelmint.core.errors import UnusableFile

_MAX_QUOTED = 60
_MAX_ESCAPED = 200
_WINDOW_BYTES = 1 << 16


class Malformed(ValueError):
    """The content of a file is not what it should be."""


class Source(Protocol):
    """Bytes of a known number that can be read at any place."""

    size: int

    def read(self, start: int, length: int) -> bytes | memoryview:
        """Exactly these bytes; raises Malformed where the source does not have them."""


class Memory:
    """A source that lies in memory or is mapped; reading copies nothing."""

    def __init__(self, data: memoryview) -> None:
        self.size = len(data)
        self._data = data

    def read(self, start: int, length: int) -> memoryview:
        if start < 0 or length < 0 or start + length > self.size:
            raise Malformed(f"is cut off: it ends at {self.size}, bytes {start} to {start + length} are needed")
        return self._data[start : start + length]


class RegularFile:
    """A regular file of a known `size`, open for reading; a context manager."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        """Raises UnusableFile unless `path` is, or leads to, a regular file of at most `max_bytes`."""
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UnusableFile(path, "does not exist") from None
        except OSError as error:
            raise UnusableFile(path, f"cannot be opened: {error.strerror}") from error
        status = os.fstat(self._descriptor)
        self.size = status.st_size
        problem = ""
        if not stat.S_ISREG(status.st_mode):
            problem = "is not a regular file; remove it"
        elif self.size > max_bytes:
            problem = f"has {self.size} bytes; at most {max_bytes} are read"
        if problem:
            os.close(self._descriptor)
            raise UnusableFile(path, problem)
        self._start, self._window = 0, b""

    def __enter__(self) -> RegularFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def read(self, start: int, length: int) -> bytes:
        """Return exactly these bytes. Raises Malformed if the file does not have them."""
        if start < 0 or length < 0 or start + length > self.size:
            raise Malformed(f"is cut off: it ends at {self.size}, but bytes {start} to {start + length} are needed")
        offset = start - self._start
        if offset < 0 or offset + length > len(self._window):
            wanted = max(length, min(_WINDOW_BYTES, self.size - start))
            self._start, self._window, offset = start, self._pread(start, wanted), 0
            if len(self._window) < length:
                raise Malformed("became shorter while it was read")
        return self._window[offset : offset + length]

    def _pread(self, start: int, length: int) -> bytes:
        parts = []
        while length > 0 and (part := os.pread(self._descriptor, length, start)):
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return b"".join(parts)


def quoted(text: str | bytes) -> str:
    """A name from a file in quotes, of bounded length and without control characters."""
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    return repr(text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "...")


def escaped(name: str) -> str:
    """A name from a file without quotes, of bounded length and in ASCII."""
    return ascii(name if len(name) <= _MAX_ESCAPED else name[:_MAX_ESCAPED] + "...")[1:-1]
