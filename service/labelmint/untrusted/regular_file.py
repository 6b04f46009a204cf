"""Reads untrusted files: opens only regular files of a bounded size and reads only within that size.

Rules of this file:
- Opening never blocks on a pipe or a device: the file is opened non-blocking, and its type is checked before a read.
- A read needs one window of memory, whatever the file's size. No file is mapped into memory: if someone truncates a
  mapped file, the process that reads it is killed.
- `Malformed` describes what is wrong with the content, without the file's name. The code that opened the file adds it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import TracebackType

from labelmint.core.errors import UnusableFile
from labelmint.untrusted.content import Malformed

_WINDOW_BYTES = 1 << 16


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
