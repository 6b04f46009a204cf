"""What is wrong with the content of a file, and how to show a hostile name in a message.

Rules of this file:
- A reader raises `Malformed` without the file's name, because it may read a part of a file, or memory. The code that
  opened the file converts the error to an UnusableFile, which names the file.
- Text from a file enters a message only through `quoted` or `escaped`, because a hostile file could otherwise write
  anything into a terminal or a log.
"""

from __future__ import annotations

from typing import Protocol

_MAX_QUOTED = 60
_MAX_ESCAPED = 200


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


def quoted(text: str | bytes) -> str:
    """A name from a file in quotes, of bounded length and without control characters."""
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    return repr(text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "...")


def escaped(name: str) -> str:
    """A name from a file without quotes, of bounded length and in ASCII."""
    return ascii(name if len(name) <= _MAX_ESCAPED else name[:_MAX_ESCAPED] + "...")[1:-1]
