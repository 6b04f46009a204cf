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
import struct
import tokenize
from collections.abc import Callable
from typing import Any

import numpy as np

from labelmint.triton.regular_file import Malformed, RegularFile, shown

MAX_ZIP_BYTES = (2 << 30) - 1  # above this, the format changes
_MAX_DIRECTORY_BYTES = 1 << 20
_ENTRY = struct.Struct("<4s4xHHHHIIIHHHHHII")  # an entry of the directory, from its signature to the entry's offset
_HEADER = struct.Struct("<4s2xHHHHIIIHH")
_END = struct.Struct("<4sHHHHIIH")
_ARRAY = re.compile(r"(projection_[1-9]\d{0,4}|bias[123]|weight[23]|task|score_kind)\.npy")
_ARRAY_HEADER_BYTES = 256
# numpy has no type annotations for these.
_read_magic: Callable[[io.BytesIO], tuple[int, int]] = np.lib.format.read_magic
_read_header: Callable[[io.BytesIO], tuple[tuple[int, ...], bool, np.dtype[Any]]] = np.lib.format.read_array_header_1_0
# numpy raises these for a malformed header of an array.
_UNREADABLE = (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, EOFError, tokenize.TokenError)


def read_directory(file: RegularFile) -> dict[str, tuple[int, int]]:
    """Return the start and length of each entry's bytes, by name. Raises Malformed."""
    if file.size < _END.size or file.read(0, 4) != b"PK\x03\x04":
        raise Malformed("is not a zip archive")
    end = file.size - _END.size
    signature, disk, first_disk, here, count, size, offset, comment = _END.unpack(file.read(end, _END.size))
    if (signature, disk, first_disk, here, comment) != (b"PK\x05\x06", 0, 0, count, 0) or offset + size != end:
        raise Malformed("is cut off or damaged: it does not end with the directory of a zip archive")
    if size > _MAX_DIRECTORY_BYTES:
        raise Malformed(f"has a directory of {size} bytes")
    entries: dict[str, tuple[int, int]] = {}
    position, expected = offset, 0
    for _ in range(count):
        if position + _ENTRY.size > end:
            raise Malformed("has a directory that is cut off")
        fields = _ENTRY.unpack(file.read(position, _ENTRY.size))
        signature, flags, method, time, date, crc, packed, length, name_bytes, extra, note, *_, start = fields
        if position + _ENTRY.size + name_bytes > end:
            raise Malformed("has a directory that is cut off")
        raw = file.read(position + _ENTRY.size, name_bytes)
        if signature != b"PK\x01\x02" or extra or note or not re.fullmatch(rb"[A-Za-z0-9_./]{1,200}", raw):
            raise Malformed(f"has a damaged entry {shown(raw)}")
        name = raw.decode("ascii")
        if flags or method or packed != length:
            raise Malformed(f"has the entry {shown(name)} compressed or encrypted, which no export does")
        if start != expected or name in entries:
            raise Malformed(f"has the entry {shown(name)} twice, or not directly after the one before it")
        header = (b"PK\x03\x04", flags, method, time, date, crc, packed, length, name_bytes, 0)
        data = start + _HEADER.size + name_bytes
        expected = data + length
        if expected > offset:
            raise Malformed(f"declares more bytes for the entry {shown(name)} than are there")
        if (
            _HEADER.unpack(file.read(start, _HEADER.size)) != header
            or file.read(start + _HEADER.size, name_bytes) != raw
        ):
            raise Malformed(f"has two different headers for the entry {shown(name)}")
        entries[name] = (data, length)
        position += _ENTRY.size + name_bytes
    if position != end or expected != offset:
        raise Malformed("has bytes that belong to no entry")
    return entries


def check_native(file: RegularFile) -> None:
    """Raises Malformed unless the file has plain arrays of the declared sizes. The backend checks the rest."""
    for name, (start, length) in read_directory(file).items():
        if not _ARRAY.fullmatch(name):
            raise Malformed(f"has the entry {shown(name)}, which no export has")
        head = io.BytesIO(file.read(start, min(length, _ARRAY_HEADER_BYTES)))
        try:
            if _read_magic(head) != (1, 0):
                raise ValueError("another version of the format")
            shape, _, dtype = _read_header(head)
        except _UNREADABLE as error:
            raise Malformed(f"has an array {shown(name)} that cannot be read: {str(error)[:100]}") from None
        if dtype.hasobject or dtype.kind not in "fU":
            raise Malformed(f"has the array {shown(name)} of a type that no export has")
        declared = dtype.itemsize * math.prod(shape)
        if min(shape, default=0) < 0 or declared != length - head.tell():
            raise Malformed(f"declares {declared} bytes for the array {shown(name)} and holds {length - head.tell()}")
