"""Checks zip archives as `labelmint export` writes them, and the weights of the `labelmint` backend in such an archive.

Rules of this file:
- Entries must be stored, not compressed, and lie directly one after another from the first byte to the directory. Then
  nothing is hidden between them, nothing is larger than the file, and all readers see the same entries.
- The size of the directory is checked before it is read. The header of each entry must agree with the directory.

Source: APPNOTE.TXT 4.3 of PKWARE, and numpy's description of the .npy format.
"""

from __future__ import annotations

import io
import math
import re
import tokenize
from collections.abc import Callable
from typing import Any

import numpy as np

from labelmint.untrusted.content import Malformed, RegularFile, quoted
from labelmint.untrusted.zip_directory import read_directory

MAX_ZIP_BYTES = (2 << 30) - 1  # above this, the format changes
_MAX_DIRECTORY_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_./]{1,200}", re.ASCII)
_ARRAY = re.compile(r"(projection_[1-9]\d{0,4}|bias[123]|weight[23]|task|score_kind)\.npy")
_ARRAY_HEADER_BYTES = 256
# numpy has no type annotations for these.
_read_magic: Callable[[io.BytesIO], tuple[int, int]] = np.lib.format.read_magic
_read_header: Callable[[io.BytesIO], tuple[tuple[int, ...], bool, np.dtype[Any]]] = np.lib.format.read_array_header_1_0
# numpy raises these for a malformed header of an array.
_UNREADABLE = (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, EOFError, tokenize.TokenError)


def entries_of(file: RegularFile) -> dict[str, tuple[int, int]]:
    """Return the start and length of each entry's bytes, by name. Raises Malformed unless an export may have them."""
    directory = read_directory(file, _MAX_DIRECTORY_BYTES)
    if odd := [name for name in directory.entries if not _NAME.fullmatch(name)]:
        raise Malformed(f"has a damaged entry {quoted(odd[0])}")
    if flagged := [name for name, entry in directory.entries.items() if entry.fields[0]]:
        raise Malformed(f"has the entry {quoted(flagged[0])} with flags that no export has")
    directory.check_canonical()
    return {name: directory.content(entry) for name, entry in directory.entries.items()}


def check_native(file: RegularFile) -> None:
    """Raises Malformed unless the file has plain arrays of the declared sizes. The backend checks the rest."""
    for name, (start, length) in entries_of(file).items():
        if not _ARRAY.fullmatch(name):
            raise Malformed(f"has the entry {quoted(name)}, which no export has")
        head = io.BytesIO(file.read(start, min(length, _ARRAY_HEADER_BYTES)))
        try:
            if _read_magic(head) != (1, 0):
                raise ValueError("another version of the format")
            shape, _, dtype = _read_header(head)
        except _UNREADABLE as error:
            raise Malformed(f"has an array {quoted(name)} that cannot be read: {str(error)[:100]}") from None
        if dtype.hasobject or dtype.kind not in "fU":
            raise Malformed(f"has the array {quoted(name)} of a type that no export has")
        declared = dtype.itemsize * math.prod(shape)
        if min(shape, default=0) < 0 or declared != length - head.tell():
            raise Malformed(f"declares {declared} bytes for the array {quoted(name)} and holds {length - head.tell()}")
