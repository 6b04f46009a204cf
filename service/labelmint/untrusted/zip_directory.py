"""Reads the directory of a zip archive whose entries are stored, not compressed.

Rules of this file:
- Every size is compared with the file before memory is taken for it, and entries together are no larger than the file.
- Names are unique, and none leads out of the archive.
- The standard library's reader is not used for two reasons: it makes some 500 bytes of objects from each 46 bytes of a
  hostile directory, and a damaged field can raise any kind of exception.

Source: APPNOTE.TXT 4.3 of PKWARE, zip64 included.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from labelmint.untrusted.content import Malformed, Source, quoted

MAGIC = b"PK\x03\x04"
_END = struct.Struct("<4sHHHHIIH")
_LONG_END_LOCATOR = struct.Struct("<4s4xQ4x")
_LONG_END = struct.Struct("<4s28x3Q")
_ENTRY = struct.Struct("<4s4xHHHHIIIHHH8xI")  # an entry of the directory, from its signature to the header's position
_HEADER = struct.Struct("<4s2xHHHHIIIHH")


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """`start` is the position of the entry's own header, `length` its number of bytes.

    `fields` are flags, method, time, date, checksum, and the lengths of the bytes (twice) and of the name, as the
    directory has them; `extras` is the length of what the directory says beyond these.
    """

    name: str
    start: int
    length: int
    fields: tuple[int, ...]
    extras: int

    @property
    def checksum(self) -> int:
        return self.fields[4]


@dataclass(frozen=True)
class ZipDirectory:
    """The entries of an archive in the order of its directory, which lies at `start` and ends at `end`."""

    source: Source
    entries: dict[str, ZipEntry]
    start: int
    end: int

    def content(self, entry: ZipEntry) -> tuple[int, int]:
        """The start and the length of an entry's bytes; raises Malformed."""
        signature, *_, name_length, extra = _HEADER.unpack(self.source.read(entry.start, _HEADER.size))
        if signature != MAGIC:
            raise Malformed(f"has a damaged zip entry {quoted(entry.name)}")
        return entry.start + _HEADER.size + name_length + extra, entry.length

    def check_canonical(self) -> None:
        """Raises Malformed unless all readers see the same entries.

        The entries then lie directly one after another, from the first byte to the directory, and the directory is the
        last thing in the file; each entry's own header agrees with the directory, and neither has optional fields.
        """
        position = 0
        for entry in self.entries.values():
            raw = entry.name.encode()
            header = self.source.read(entry.start, _HEADER.size)
            if entry.start != position:
                raise Malformed(f"has the entry {quoted(entry.name)} not directly after the one before it")
            if entry.extras or _HEADER.unpack(header) != (MAGIC, *entry.fields, 0):
                raise Malformed(f"has two different headers for the entry {quoted(entry.name)}")
            if self.source.read(entry.start + _HEADER.size, len(raw)) != raw:
                raise Malformed(f"has two different headers for the entry {quoted(entry.name)}")
            position += _HEADER.size + len(raw) + entry.length
        if position != self.start or self.end + _END.size != self.source.size:
            raise Malformed("has bytes that belong to no entry")


def read_directory(source: Source, max_bytes: int) -> ZipDirectory:
    """Raises Malformed, also for a directory of more than `max_bytes`."""
    if source.size < _END.size or source.read(0, 4) != MAGIC:
        raise Malformed("is not a zip archive")
    count, size, start = _end_of(source)
    if size > max_bytes:
        raise Malformed(f"has a zip directory of {size} bytes; at most {max_bytes} are read")
    entries: dict[str, ZipEntry] = {}
    position, end = start, start + size
    while position < end:
        entry, position = _entry(source, position, end)
        if entry.name in entries:
            raise Malformed(f"has the zip entry {quoted(entry.name)} twice")
        entries[entry.name] = entry
    if len(entries) != count:
        raise Malformed("has a damaged zip directory")
    if sum(entry.length for entry in entries.values()) > source.size:
        raise Malformed("has zip entries that overlap, or that declare more bytes than are there")
    return ZipDirectory(source, entries, start, end)


def _end_of(source: Source) -> tuple[int, int, int]:
    """The number of entries, and the size and the position of the directory. Our writers leave no comment."""
    end = source.size - _END.size
    signature, disk, first_disk, here, count, size, start, comment = _END.unpack(source.read(end, _END.size))
    if signature != b"PK\x05\x06" or comment:
        raise Malformed("is cut off or damaged: it does not end with the directory of a zip archive")
    if count == 0xFFFF or size == 0xFFFFFFFF or start == 0xFFFFFFFF:
        signature, locator = _LONG_END_LOCATOR.unpack(source.read(end - _LONG_END_LOCATOR.size, _LONG_END_LOCATOR.size))
        long_signature, count, size, start = _LONG_END.unpack(source.read(locator, _LONG_END.size))
        if signature != b"PK\x06\x07" or long_signature != b"PK\x06\x06":
            raise Malformed("has a damaged zip64 directory")
    elif (disk, first_disk, here) != (0, 0, count):
        raise Malformed("is cut off or damaged: it does not end with the directory of a zip archive")
    if start + size > end:
        raise Malformed("is cut off: its zip directory does not lie within it")
    return count, size, start


def _entry(source: Source, position: int, end: int) -> tuple[ZipEntry, int]:
    """The entry of the directory at `position`, and where the next one begins."""
    if position + _ENTRY.size > end:
        raise Malformed("has a damaged zip directory")
    signature, *fields, extra_length, note, start = _ENTRY.unpack(source.read(position, _ENTRY.size))
    flags, method, _, _, _, packed, length, name_length = fields
    after_name = position + _ENTRY.size + name_length
    if signature != b"PK\x01\x02" or after_name + extra_length + note > end:
        raise Malformed("has a damaged zip directory")
    name = _name(bytes(source.read(after_name - name_length, name_length)))
    extra = source.read(after_name, extra_length)
    length, packed, start = _long_fields(extra, [length, packed, start])
    if method or flags & 1 or packed != length:
        raise Malformed(f"has the zip entry {quoted(name)} compressed or encrypted, which no writer of ours does")
    return ZipEntry(name, start, length, tuple(fields), extra_length + note), after_name + extra_length + note


def _name(raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed("has a zip entry whose name is not UTF-8") from None
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        raise Malformed(f"has a zip entry with the path {quoted(name)}")
    return name


def _long_fields(extra: bytes | memoryview, fields: list[int]) -> list[int]:
    """Replace the fields that do not fit in 32 bits by those of the zip64 extra field, in this order."""
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, position)
        content = extra[position + 4 : position + 4 + size]
        if kind == 1:
            long = iter(struct.unpack(f"<{len(content) // 8}Q", content[: len(content) // 8 * 8]))
            return [next(long, field) if field == 0xFFFFFFFF else field for field in fields]
        position += 4 + size
    return fields
