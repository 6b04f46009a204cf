"""Zip archives as `labelmint export` writes them, and the weights of the `labelmint` backend that lie in one.

Rules of this file:
- Entries are stored, not compressed, and lie one behind the other from the first byte to the directory: nothing is
  hidden between them, nothing is larger than the file, and no two readers see different entries.
- The directory is held to a size before it is read, and each entry's own header to what the directory says of it.

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

MAX_ZIP_BYTES = (2 << 30) - 1  # beyond it the format changes
_MAX_DIRECTORY_BYTES = 1 << 20
_ENTRY = struct.Struct("<4s4xHHHHIIIHHHHHII")  # of the directory, from its signature to the entry's offset
_HEADER = struct.Struct("<4s2xHHHHIIIHH")
_END = struct.Struct("<4sHHHHIIH")
_ARRAY = re.compile(r"(projection_[1-9]\d{0,4}|bias[123]|weight[23]|task|score_kind)\.npy")
_ARRAY_HEADER_BYTES = 256
# numpy gives these no types.
_read_magic: Callable[[io.BytesIO], tuple[int, int]] = np.lib.format.read_magic
_read_header: Callable[[io.BytesIO], tuple[tuple[int, ...], bool, np.dtype[Any]]] = np.lib.format.read_array_header_1_0
# What numpy raises over the header of an array.
_UNREADABLE = (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, EOFError, tokenize.TokenError)


def read_directory(file: RegularFile) -> dict[str, tuple[int, int]]:
    """Where each entry's bytes start and how many they are; raises Malformed."""
    if file.size < _END.size or file.read(0, 4) != b"PK\x03\x04":
        raise Malformed("is no zip archive")
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
            raise Malformed(f"has the entry {shown(name)} twice, or not behind the one before it")
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
    """Raises Malformed unless the file holds plain arrays, each as large as it says. The backend looks at the rest."""
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
